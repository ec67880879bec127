//! What the fuzz targets of NBD run: the server against a plain list of bytes and against anything, and the client
//! against anything.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::client::Client;
use super::client::reply::{Expected, Head, Source};
use super::proto::{self, Command, Fields, REQUEST_LEN, Request};
use super::server::connection::Connection;
use super::server::exports::Exports;
use super::server::negotiation::{self, Negotiation, Then, Tls};
use crate::{BlockBackend, Capabilities, Disk, Error, Result};

const SIZE: usize = 128 << 10;
/// What is known to be a hole is so in whole blocks.
const BLOCK: usize = 4096;

/// Memory that knows its holes.
#[derive(Debug)]
struct Sparse(RwLock<Vec<u8>>);

impl BlockBackend for Sparse {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { cheap_zeroes: true, knows_holes: true, ..Capabilities::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut bytes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        bytes[offset as usize..offset as usize + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.write_at(&vec![0; len as usize], offset)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let blocks = bytes.chunks(BLOCK).enumerate().skip(offset as usize / BLOCK);
        let mut data = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        Ok(data.next().map(|(number, _)| (number * BLOCK) as u64..((number + 1) * BLOCK) as u64))
    }
}

fn sparse() -> Disk {
    Disk::from_backend(Sparse(RwLock::new(vec![0; SIZE])))
}

/// Serves a disk by the empty name and by `x`.
fn serve(disk: &Disk, stream: UnixStream) -> io::Result<()> {
    Connection::new(&exports(disk), Arc::new(stream.into()), &Arc::default()).serve()
}

fn exports(disk: &Disk) -> Exports {
    let exports = Exports::default();
    for name in ["", "x"] {
        exports.add(name, disk.clone()).unwrap();
    }
    exports
}

/// A session after the handshake, to its orderly end.
fn session(disk: &Disk, structured: bool, talk: impl FnOnce(&mut UnixStream)) {
    let (client, server) = UnixStream::pair().unwrap();
    std::thread::scope(move |scope| {
        // Closed by a panic, too: the server would wait for more, and the panic for the server.
        let mut client = client;
        scope.spawn(|| serve(disk, server).unwrap());
        let mut said = u32::from(proto::HANDSHAKE_FLAGS).to_be_bytes().to_vec();
        let mut answered = 18 + 10;
        if structured {
            let context = [&[0; 4][..], &1u32.to_be_bytes(), &proto::counted(proto::ALLOCATION)].concat();
            said.extend(proto::option(proto::OPT_STRUCTURED_REPLY, &[]));
            said.extend(proto::option(proto::OPT_SET_META_CONTEXT, &context));
            answered += 20 + 20 + 4 + proto::ALLOCATION.len() + 20;
        }
        said.extend(proto::option(proto::OPT_EXPORT_NAME, &[]));
        client.write_all(&said).unwrap();
        client.read_exact(&mut vec![0; answered]).unwrap();
        talk(&mut client);
        let goodbye = Request { flags: 0, command: Command::Disconnect, handle: 0, offset: 0, len: 0 };
        client.write_all(&goodbye.encode()).unwrap();
    });
}

/// Requests of an NBD client: on a disk, in one session, against a plain list of bytes.
pub fn nbd_requests(bytes: &[u8]) {
    parsing(bytes);
    let structured = bytes.first().is_some_and(|first| first & 1 == 1);
    let (disk, mut plain) = (sparse(), vec![0; SIZE]);
    session(&disk, structured, |stream| {
        for (number, word) in bytes.chunks_exact(9).take(40).enumerate() {
            let request = choose(word, number as u64);
            if request.command == Command::Disconnect {
                continue;
            }
            let data =
                vec![word[8]; if request.command == Command::Write { request.len as usize } else { 0 }];
            stream.write_all(&request.encode()).unwrap();
            stream.write_all(&data).unwrap();
            let range = fine(&request, structured);
            let errno = match (request.command, structured) {
                (Command::Read | Command::BlockStatus, true) => chunks(stream, &request, &plain),
                _ => simple(stream, &request, &plain),
            };
            assert_eq!(errno == 0, range.is_some(), "{request:?}: {errno}");
            match (request.command, range) {
                (Command::Write, Some(range)) => plain[range].fill(word[8]),
                (Command::Trim | Command::WriteZeroes, Some(range)) => plain[range].fill(0),
                _ => {}
            }
        }
    });
    let mut found = vec![0; SIZE];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == plain);
}

/// What is read of a request is what stands in it; of an option, a part of the option.
fn parsing(bytes: &[u8]) {
    if let Some((name, asked)) = negotiation::asked_name(bytes) {
        assert_eq!(name.len() + 6 + 2 * asked.len(), bytes.len());
    }
    if let Some((name, queries)) = negotiation::queries(bytes) {
        let queries = queries.iter().map(|query| 4 + query.len()).sum::<usize>();
        assert_eq!(name.len() + 8 + queries, bytes.len());
    }
    let Some(head) = bytes.first_chunk::<REQUEST_LEN>() else { return };
    match Request::parse(head) {
        Some(request) => assert_eq!(request.encode(), *head),
        None => assert_ne!(head[..4], proto::REQUEST_MAGIC.to_be_bytes()),
    }
}

/// A request made of a few bytes: mostly within the disk, and sometimes beyond its end or that of all numbers.
fn choose(word: &[u8], handle: u64) -> Request {
    let command = [
        Command::Read,
        Command::Write,
        Command::Disconnect,
        Command::Flush,
        Command::Trim,
        Command::Other(5),
        Command::WriteZeroes,
        Command::BlockStatus,
    ][usize::from(word[0] >> 1 & 7)];
    let flags = u16::from(word[1] & 0x1f) & if word[1] & 0x80 == 0 { command.flags() } else { 0x1f };
    let mut offset = u64::from(u16::from_le_bytes([word[2], word[3]])) * 2;
    let mut len = u32::from(u16::from_le_bytes([word[4], word[5]])) >> (word[6] % 8);
    if word[7] == 0xff {
        offset = u64::MAX - offset;
    }
    if word[7] == 0xfe && command != Command::Write {
        len = u32::MAX - len;
    }
    Request { flags, command, handle, offset, len }
}

/// The bytes that a request is about, if it is one that has to succeed.
fn fine(request: &Request, structured: bool) -> Option<Range<usize>> {
    let end = request.offset.checked_add(request.len.into()).filter(|end| *end <= SIZE as u64);
    let mut known = request.command.flags();
    if !structured {
        known &= !proto::ask::DONT_FRAGMENT;
    }
    let fast_and_full = proto::ask::FAST | proto::ask::NO_HOLE;
    let possible = match request.command {
        Command::Other(_) | Command::Disconnect => false,
        Command::BlockStatus => structured && request.len > 0,
        Command::WriteZeroes => request.flags & fast_and_full != fast_and_full,
        _ => true,
    };
    if !possible || request.flags & !known != 0 {
        return None;
    }
    if request.command == Command::Flush {
        return Some(0..0);
    }
    Some(request.offset as usize..end? as usize)
}

/// Takes a simple reply; its error number.
fn simple(stream: &mut UnixStream, request: &Request, plain: &[u8]) -> u32 {
    let head: [u8; 16] = receive(stream);
    let mut fields = Fields(&head);
    let (magic, errno, handle) = (fields.u32(), fields.u32().unwrap(), fields.u64());
    assert_eq!((magic, handle), (Some(proto::SIMPLE_MAGIC), Some(request.handle)));
    if errno == 0 && request.command == Command::Read {
        let mut found = vec![0; request.len as usize];
        stream.read_exact(&mut found).unwrap();
        assert!(found == plain[request.offset as usize..][..found.len()], "{request:?}");
    }
    errno
}

/// Takes a structured reply; its error number.
fn chunks(stream: &mut UnixStream, request: &Request, plain: &[u8]) -> u32 {
    let mut at = request.offset as usize;
    let end = at.saturating_add(request.len as usize);
    loop {
        let head: [u8; 20] = receive(stream);
        let mut fields = Fields(&head[4..]);
        let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
        assert_eq!((&head[..4], fields.u64()), (&proto::CHUNK_MAGIC.to_be_bytes()[..], Some(request.handle)));
        let mut data = vec![0; fields.u32().unwrap() as usize];
        stream.read_exact(&mut data).unwrap();
        let mut fields = Fields(&data);
        match kind {
            proto::chunk::ERROR => {
                assert_eq!(flags, proto::chunk::DONE);
                return fields.u32().unwrap();
            }
            proto::chunk::NONE => assert_eq!(request.len, 0),
            // In order, and without gaps.
            proto::chunk::DATA => {
                assert_eq!(fields.u64(), Some(at as u64));
                assert!(fields.0 == &plain[at..at + fields.0.len()]);
                at += fields.0.len();
            }
            proto::chunk::HOLE => {
                assert_eq!(fields.u64(), Some(at as u64));
                let len = fields.u32().unwrap() as usize;
                assert!(plain[at..at + len].iter().all(|byte| *byte == 0));
                at += len;
            }
            proto::chunk::BLOCK_STATUS => {
                assert_eq!(fields.u32(), Some(1));
                let one = request.flags & proto::ask::ONE != 0;
                assert!(fields.0.len() == 8 || !one);
                let mut last = None;
                while let (Some(len), Some(state)) = (fields.u32(), fields.u32()) {
                    assert!(len > 0 && last != Some(state), "extents that could be one");
                    let part = &plain[at..at + len as usize];
                    assert!(state == 0 || state == 3 && part.iter().all(|byte| *byte == 0));
                    (at, last) = (at + len as usize, Some(state));
                }
                assert!(at == end || one);
                at = end;
            }
            other => panic!("a chunk of kind {other}"),
        }
        let fragments = request.flags & proto::ask::DONT_FRAGMENT == 0;
        if flags & proto::chunk::DONE != 0 {
            assert_eq!(at, end, "{request:?}");
            return 0;
        }
        assert!(fragments && at < end);
    }
}

fn receive<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Options of an NBD client, of which the first byte says how much is asked: each is answered as the protocol has it,
/// and nobody gets more than was agreed on.
pub fn nbd_negotiation(bytes: &[u8]) {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let exports = exports(&sparse());
    let tls = [Tls::Off, Tls::Required, Tls::On][usize::from(first % 3)];
    let mut negotiation = Negotiation::new(&exports, tls);
    let (mut encrypted, mut structured) = (tls != Tls::Required, false);
    while let [number, len, more @ ..] = rest {
        let data;
        (data, rest) = more.split_at(more.len().min(usize::from(*len)));
        let option = u32::from(number % 12);
        let answer = negotiation.option(option, data, first & 0x80 != 0);
        match answer.then {
            Then::Serve(agreed) => {
                assert!(encrypted && agreed.structured == structured && (structured || !agreed.status));
                assert!(option == proto::OPT_GO || option == proto::OPT_EXPORT_NAME);
            }
            Then::StartTls => {
                assert!(!encrypted && option == proto::OPT_STARTTLS);
                negotiation.encrypted();
                (encrypted, structured) = (true, false);
            }
            Then::More | Then::HangUp => {}
        }
        if option == proto::OPT_EXPORT_NAME {
            continue;
        }
        let said = answers(option, &answer.bytes);
        structured |= option == proto::OPT_STRUCTURED_REPLY && said == proto::REP_ACK;
        let early = [proto::OPT_STARTTLS, proto::OPT_ABORT].contains(&option);
        assert!(encrypted || early || said == proto::REP_ERR_TLS_REQD);
    }
}

/// Checks that these are answers to an option: any number that say something, and one that ends them, which is
/// given back.
fn answers(option: u32, bytes: &[u8]) -> u32 {
    let mut fields = Fields(bytes);
    loop {
        assert_eq!((fields.u64(), fields.u32()), (Some(proto::OPTION_REPLY_MAGIC), Some(option)));
        let kind = fields.u32().unwrap();
        let data = fields.counted().unwrap();
        if kind == proto::REP_ACK || kind & 1 << 31 != 0 {
            assert!(data.is_empty() && fields.0.is_empty());
            return kind;
        }
        assert!(!data.is_empty());
    }
}

/// A client that says anything: it is served or hung up on, and no thread stays.
pub fn nbd_client(bytes: &[u8]) {
    let disk = sparse();
    let (client, server) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = serve(&disk, server);
        });
        scope.spawn(|| {
            // Whatever it answers is read, so that it never waits for room.
            let _ = io::copy(&mut &client, &mut io::sink());
        });
        let _ = (&client).write_all(bytes);
        let _ = rustix::net::shutdown(&client, rustix::net::Shutdown::Write);
    });
}

/// Bytes that a server sends.
struct Bytes<'b>(&'b [u8]);

impl Source for Bytes<'_> {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(buf)
    }
}

/// Replies of a server that says anything: each byte that was asked for has come just once when the reply is said to
/// be good, and no others have been touched.
pub fn nbd_replies(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let (structured, status) = (first & 1 == 1, first & 2 == 2);
    let (offset, len) = (4096, usize::from(first >> 2));
    let command = if status { Command::BlockStatus } else { Command::Read };
    let mut data = vec![0xee; if status { 0 } else { len }];
    let mut source = Bytes(rest);
    let mut expected = Expected::new(command, structured, offset, &mut data);
    expected.context = Some(1);
    let done = loop {
        let left = source.0.len();
        let taken = Head::receive(&mut source).and_then(|head| expected.take(head, &mut source));
        assert!(source.0.len() < left || taken.is_err(), "it goes on without anything to go on with");
        match taken {
            Ok(None) => {}
            Ok(Some(done)) => break done,
            Err(_) => return,
        }
    };
    match done {
        Err(errno) => assert_ne!(errno, 0),
        Ok(()) if status => assert!(!structured || expected.extent.is_some_and(|(len, _)| len > 0)),
        Ok(()) => {
            // Without gaps: so many bytes have come, or holes that say so.
            let came = rest.len() - source.0.len();
            assert!(came >= if structured { 20 } else { 16 + len });
        }
    }
}

/// A server that says anything, to a client that asks a few things: every call ends, and after the first lie
/// nothing is believed.
pub fn nbd_server(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let (client, mut server) = UnixStream::pair().unwrap();
    let mut said = Vec::new();
    if first & 1 == 1 {
        said.extend(proto::greeting());
        said.extend(proto::option_reply(proto::OPT_STRUCTURED_REPLY, proto::REP_ACK, &[]));
        let context = [&[0, 0, 0, 1][..], proto::ALLOCATION.as_bytes()].concat();
        said.extend(proto::option_reply(proto::OPT_SET_META_CONTEXT, proto::REP_META_CONTEXT, &context));
        said.extend(proto::option_reply(proto::OPT_SET_META_CONTEXT, proto::REP_ACK, &[]));
        let export = [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &0x6du16.to_be_bytes()].concat();
        said.extend(proto::option_reply(proto::OPT_GO, proto::REP_INFO, &export));
        said.extend(proto::option_reply(proto::OPT_GO, proto::REP_ACK, &[]));
    }
    said.extend(bytes);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = server.write_all(&said);
            let _ = rustix::net::shutdown(&server, rustix::net::Shutdown::Write);
            let _ = io::copy(&mut server, &mut io::sink());
        });
        let patience = Duration::from_secs(5);
        let builder = Client::builder("").timeouts(patience, patience);
        let deadline = Instant::now() + patience;
        let address = std::path::Path::new("a fuzzer").into();
        let Ok(client) = builder.agree(Arc::new(client.into()), address, deadline) else { return };
        let disk = client.into_disk();
        let mut buf = vec![0; 5000.min(disk.size() as usize)];
        let results: [Result<(), Error>; 4] = [
            disk.next_data(0).map(|found| assert!(found.is_none_or(|found| found.start < found.end))),
            disk.read_at(&mut buf, 0),
            disk.write_at(&buf, 0),
            disk.flush(),
        ];
        let dead = results.iter().position(|result| {
            result.as_ref().is_err_and(|error| error.kind() == crate::ErrorKind::Protocol)
        });
        let after = dead.map_or(&[][..], |dead| &results[dead..]);
        assert!(disk.read_only() || buf.is_empty() || after.iter().all(Result::is_err));
    });
}

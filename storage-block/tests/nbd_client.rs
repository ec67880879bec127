//! The client against servers, ours and those of others, and against servers that lie.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use storage_block::{
    Capabilities, Disk, ErrorKind, IoLimits, Limiter, MemoryDisk, Rate, RawFile, nbd, testing,
};

mod tools;
use tools::{Daemon, have};

/// Runs the conformance suite on what `serve` serves: it gets the size and a path for the socket, and gives what has to
/// stay.
fn conforms<T>(serve: impl Fn(u64, &Path) -> T) {
    let dir = tempfile::tempdir().unwrap();
    let servers = RefCell::new(Vec::new());
    testing::conformance(|size| {
        let socket = dir.path().join(servers.borrow().len().to_string());
        servers.borrow_mut().push(serve(size, &socket));
        nbd::Client::connect(socket, "").unwrap().into_disk()
    });
}

#[test]
fn conforms_on_our_server() {
    conforms(|size, socket| nbd::Server::bind(socket, MemoryDisk::new(size).unwrap().into_disk()).unwrap());
    conforms(|size, socket| {
        let raw = RawFile::create(socket.with_extension("raw"), size).unwrap().into_disk();
        nbd::Server::bind(socket, raw).unwrap()
    });
}

#[test]
fn the_disk_is_what_the_server_says_it_is() {
    let dir = tempfile::tempdir().unwrap();
    // What its block is, what a client is told, and whether a discard frees anything.
    for (number, (block, told, frees)) in
        [(4096, 4096, true), (16384, 16384, false), (64 << 20, 4096, true), (3000, 4096, false)]
            .into_iter()
            .enumerate()
    {
        let mut claimed = Capabilities::default();
        (claimed.physical_block, claimed.discard_frees) = (block, frees);
        let served = testing::claiming(1 << 20, claimed).unwrap();
        let socket = dir.path().join(number.to_string());
        let _server = nbd::Server::bind(&socket, served).unwrap();
        let found = nbd::Client::connect(socket, "").unwrap().into_disk().capabilities();
        assert_eq!((found.logical_block, found.physical_block), (512, told));
        assert_eq!((found.discard_frees, found.cheap_zeroes, found.knows_holes), (frees, true, true));
    }
    let socket = dir.path().join("raw");
    let raw = RawFile::create(dir.path().join("disk"), 1 << 20).unwrap().into_disk();
    let _server = nbd::Server::bind(&socket, raw).unwrap();
    let found = nbd::Client::builder("").read_only(true).connect(socket).unwrap().into_disk().capabilities();
    assert!(found.discard_frees && found.cheap_zeroes && found.knows_holes && !found.in_files);
}

/// However many parts a read is answered in it is one operation, of the bytes that are read; and so is one of holes, and the
/// question where they are.
#[test]
fn every_request_counts_once_against_the_limits() {
    let dir = tempfile::tempdir().unwrap();
    let raw = RawFile::create(dir.path().join("disk"), 4 << 20).unwrap().into_disk();
    for part in 0..4 {
        raw.write_at(&[7; 64 << 10], part << 18).unwrap();
    }
    type Ask = fn(&Disk);
    let cases: [(&str, Ask, u64, u64); 3] = [
        ("data and holes", |disk| disk.read_at(&mut vec![0; 1 << 20], 0).unwrap(), 1, 4 * (64 << 10)),
        ("holes", |disk| disk.read_at(&mut vec![0; 1 << 20], 2 << 20).unwrap(), 1, 0),
        ("where data is", |disk| assert_eq!(disk.next_data(2 << 20).unwrap(), None), 1, 0),
    ];
    for (number, (what, ask, ops, bytes)) in cases.into_iter().enumerate() {
        // All that is saved up is used when it is this much, and not before.
        for (extra, used_up) in [(0, true), (1, false)] {
            let socket = dir.path().join(format!("{number}-{extra}"));
            let slow = |burst| Rate { per_second: 1, burst };
            let ops = Limiter::new(IoLimits { ops: Some(slow(ops + extra)), ..IoLimits::NONE });
            // One that lets nothing pass once it is used up.
            let bytes = Limiter::new(IoLimits { bytes: Some(slow(bytes + extra * 4096)), ..IoLimits::NONE });
            let _server = nbd::Server::bind(&socket, raw.limited(&ops).limited(&bytes)).unwrap();
            ask(&nbd::Client::connect(socket, "").unwrap().into_disk());
            assert_eq!(ops.delay().is_some(), used_up, "{what}: operations, and {extra} more");
            let expected = used_up && bytes.limits().bytes != Some(slow(0));
            assert_eq!(bytes.delay().is_some(), expected, "{what}: bytes, and {extra} more");
        }
    }
}

#[test]
fn conforms_on_qemu_nbd() {
    if !have(&["qemu-nbd"]) {
        return;
    }
    conforms(|size, socket| {
        let raw = socket.with_extension("raw");
        RawFile::create(&raw, size).unwrap();
        Daemon::start(socket, &["qemu-nbd", "-t", "-f", "raw", "--discard=unmap", raw.to_str().unwrap()])
    });
}

#[test]
fn conforms_on_nbdkit() {
    if !have(&["nbdkit"]) {
        return;
    }
    for arguments in [
        &[][..],
        // Simple replies alone, the old way in, and no zeroing.
        &["--no-sr"],
        &["--filter=nozero"],
        // Whole blocks alone.
        &["--filter=blocksize-policy"],
    ] {
        conforms(|size, socket| {
            let size = size.to_string();
            let policy =
                ["blocksize-minimum=4096", "blocksize-error-policy=error", "blocksize-preferred=4096"];
            let policy = if arguments.contains(&"--filter=blocksize-policy") { &policy[..] } else { &[] };
            Daemon::start(socket, &[&["nbdkit", "-f"], arguments, &["memory", &size], policy].concat())
        });
    }
}

/// What is less than a block is put into its place in one, at both ends.
#[test]
fn parts_of_blocks_are_put_in_their_places() {
    if !have(&["nbdkit"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let policy = ["--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096"];
    let error = ["blocksize-preferred=4096", "blocksize-error-policy=error"];
    let _daemon = Daemon::start(&socket, &[&["nbdkit", "-f"], &policy[..], &error].concat());
    let disk = nbd::Client::connect(socket, "").unwrap().into_disk();
    let mut oracle = vec![0; 1 << 20];
    for (number, (offset, len)) in
        [(0, 1), (5, 4000), (4000, 200), (4095, 4098), (8192, 4096), (100, 50_000), (4096, 9000), (77, 8115)]
            .into_iter()
            .enumerate()
    {
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251 + number * 7) as u8).collect();
        disk.write_at(&bytes, offset as u64).unwrap();
        oracle[offset..offset + len].copy_from_slice(&bytes);
        disk.write_zeroes((offset + len / 3) as u64, (len / 2) as u64).unwrap();
        oracle[offset + len / 3..][..len / 2].fill(0);
        let mut found = vec![0; 1 << 20];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == oracle, "{len} bytes at {offset}");
        disk.read_at(&mut found[..len], offset as u64).unwrap();
        assert!(found[..len] == oracle[offset..offset + len], "{len} bytes at {offset}");
    }
}

/// Ranges that may hold data.
fn data(disk: &Disk) -> Vec<std::ops::Range<u64>> {
    let (mut at, mut found) = (0, Vec::new());
    while let Some(range) = disk.next_data(at).unwrap() {
        at = range.end;
        found.push(range);
    }
    found
}

#[test]
fn knows_the_holes_of_the_other_side() {
    let dir = tempfile::tempdir().unwrap();
    let served = RawFile::create(dir.path().join("raw"), 64 << 20).unwrap().into_disk();
    served.write_at(&[1; 4096], 1 << 20).unwrap();
    served.write_at(&[2; 8192], 32 << 20).unwrap();
    let _server = nbd::Server::bind(dir.path().join("s"), served.clone()).unwrap();
    let disk = nbd::Client::connect(dir.path().join("s"), "").unwrap().into_disk();
    let expected = [1 << 20..(1 << 20) + 4096, 32 << 20..(32 << 20) + 8192];
    assert_eq!((data(&served), data(&disk)), (expected.to_vec(), expected.to_vec()));
    // From the middle of either.
    assert_eq!(disk.next_data((1 << 20) + 7).unwrap(), Some((1 << 20) + 7..(1 << 20) + 4096));
    assert_eq!(disk.next_data((1 << 20) + 4097).unwrap(), Some(expected[1].clone()));
    assert_eq!(disk.next_data((32 << 20) + 8192).unwrap(), None);

    if !have(&["qemu-nbd"]) {
        return;
    }
    let raw = dir.path().join("raw");
    let _daemon =
        Daemon::start(&dir.path().join("q"), &["qemu-nbd", "-t", "-f", "raw", raw.to_str().unwrap()]);
    let disk = nbd::Client::connect(dir.path().join("q"), "").unwrap().into_disk();
    assert_eq!(data(&disk), expected);
}

#[test]
fn many_threads_share_a_connection() {
    let dir = tempfile::tempdir().unwrap();
    let served = MemoryDisk::new(16 << 20).unwrap().into_disk();
    let _server = nbd::Server::bind(dir.path().join("s"), served.clone()).unwrap();
    let disk = nbd::Client::connect(dir.path().join("s"), "").unwrap().into_disk();
    // More than may be on their way at the same time.
    std::thread::scope(|scope| {
        for number in 0..100u8 {
            let disk = &disk;
            scope.spawn(move || {
                let offset = u64::from(number) * 150_000;
                for round in 1..=8usize {
                    let len = [512, 100, 70_000, 4096][round % 4];
                    let bytes = vec![number ^ round as u8; len];
                    disk.write_at(&bytes, offset).unwrap();
                    let mut found = vec![0; len];
                    disk.read_at(&mut found, offset).unwrap();
                    assert!(found == bytes);
                }
            });
        }
    });
}

#[test]
fn errors_of_the_server_have_their_kinds() {
    let dir = tempfile::tempdir().unwrap();
    let read_only = RawFile::create(dir.path().join("raw"), 1 << 20).unwrap();
    drop(read_only);
    let read_only = RawFile::open(dir.path().join("raw"), true).unwrap().into_disk();
    let server = nbd::Server::builder().export("a", read_only).bind(dir.path().join("s")).unwrap();
    let disk = nbd::Client::connect(dir.path().join("s"), "a").unwrap().into_disk();
    assert!(disk.read_only());
    let kind = |result: storage_block::Result<()>| result.map_err(|error| error.kind());
    assert_eq!(kind(disk.write_at(&[1], 0)), Err(ErrorKind::ReadOnly));
    assert_eq!(kind(disk.flush()), Ok(()));
    for (export, expected) in [("b", ErrorKind::NotFound), ("", ErrorKind::NotFound)] {
        assert_eq!(
            nbd::Client::connect(dir.path().join("s"), export).map_err(|e| e.kind()).err(),
            Some(expected)
        );
    }
    assert_eq!(
        nbd::Client::connect(dir.path().join("none"), "").map_err(|e| e.kind()).err(),
        Some(ErrorKind::NotFound)
    );
    // A server that goes away takes nothing else along.
    drop(server);
    for _ in 0..2 {
        assert_eq!(kind(disk.read_at(&mut [0], 0)), Err(ErrorKind::Io));
    }
}

#[test]
fn a_server_without_space_says_so() {
    if !have(&["nbdkit"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (error, kind) in
        [("ENOSPC", ErrorKind::NoSpace), ("EPERM", ErrorKind::ReadOnly), ("EIO", ErrorKind::Io)]
    {
        let socket = dir.path().join(error);
        let error = format!("error={error}");
        let command = ["nbdkit", "-f", "--filter=error", "memory", "1M", &error, "error-pwrite-rate=100%"];
        let _daemon = Daemon::start(&socket, &command);
        let disk = nbd::Client::connect(socket, "").unwrap().into_disk();
        assert_eq!(disk.write_at(&[1], 0).map_err(|e| e.kind()), Err(kind));
        // It goes on.
        disk.read_at(&mut [0; 512], 0).unwrap();
    }
}

const SIZE: u64 = 1 << 20;

/// A server that does as it is told: it comes to terms with a client, and answers its first request with
/// `reply`, which gets the request's handle.
fn lying(structured: bool, reply: impl FnOnce(&[u8]) -> Vec<u8> + Send + 'static) -> nbd::Client {
    lying_for(Duration::from_millis(300), structured, reply)
}

/// The same with a client of this patience.
fn lying_for(
    patience: Duration,
    structured: bool,
    reply: impl FnOnce(&[u8]) -> Vec<u8> + Send + 'static,
) -> nbd::Client {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        negotiate(&mut stream, structured, FLAGS);
        let mut request = [0; 28];
        if stream.read_exact(&mut request).is_ok() {
            let _ = stream.write_all(&reply(&request[8..16]));
            // The other side has to find out by itself.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let client = nbd::Client::builder("").timeouts(Duration::from_secs(5), patience);
    client.connect(dir.path().join("s")).unwrap()
}

/// An answer to an option.
fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
    let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes);
    [&magic[..], numbers.as_flattened(), data].concat()
}

/// What an export can do: flushes, FUA, trims, zeroes and several connections.
const FLAGS: u16 = 0x016d;
const FLUSH: u16 = 1 << 2;
const FUA: u16 = 1 << 3;

fn negotiate(stream: &mut UnixStream, structured: bool, flags: u16) {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
        let bytes = match option {
            8 if !structured => answer(8, 0x8000_0001, &[]),
            10 => [answer(10, 4, b"\0\0\0\x05base:allocation"), answer(10, 1, &[])].concat(),
            7 => {
                let export = [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
                [answer(7, 3, &export), answer(7, 1, &[])].concat()
            }
            other => answer(other, 1, &[]),
        };
        stream.write_all(&bytes).unwrap();
        if option == 7 {
            return;
        }
    }
}

fn chunk(flags: u16, kind: u16, handle: &[u8], data: &[u8]) -> Vec<u8> {
    let head = [&[0x66, 0x8e, 0x33, 0xef], &flags.to_be_bytes()[..], &kind.to_be_bytes(), handle].concat();
    [&head, &(data.len() as u32).to_be_bytes()[..], data].concat()
}

fn piece(flags: u16, handle: &[u8], at: u64, len: usize) -> Vec<u8> {
    chunk(flags, 1, handle, &[&at.to_be_bytes()[..], &vec![7; len]].concat())
}

fn hole(flags: u16, handle: &[u8], at: u64, len: u32) -> Vec<u8> {
    chunk(flags, 2, handle, &[&at.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

fn simple(errno: u32, handle: &[u8]) -> Vec<u8> {
    [&[0x67, 0x44, 0x66, 0x98], &errno.to_be_bytes()[..], handle].concat()
}

type Reply = fn(&[u8]) -> Vec<u8>;

/// What a read of 1024 bytes at 4096 makes of a reply, and the request after it.
fn check_read(name: &str, structured: bool, reply: Reply, expected: Result<(), ErrorKind>) {
    let disk = lying(structured, reply).into_disk();
    let begun = Instant::now();
    let mut buf = [1; 1024];
    let found = disk.read_at(&mut buf, 4096).map_err(|error| error.kind());
    assert_eq!(found, expected, "{name}");
    // Nothing is believed any more of one that has lied, and nothing else will come of the others.
    assert!(disk.flush().is_err(), "{name}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{name}");
}

#[test]
fn lies_are_errors() {
    const LIE: Result<(), ErrorKind> = Err(ErrorKind::Protocol);
    let table: &[(&str, bool, Reply, Result<(), ErrorKind>)] = &[
        ("the truth", true, |h| piece(1, h, 4096, 1024), Ok(())),
        ("in pieces", true, |h| [piece(0, h, 4608, 512), hole(1, h, 4096, 512)].concat(), Ok(())),
        ("a simple truth", false, |h| [simple(0, h), vec![7; 1024]].concat(), Ok(())),
        ("no reply", true, |_| vec![0; 16], LIE),
        ("another handle", true, |_| piece(1, b"whatever", 4096, 1024), LIE),
        ("another simple handle", false, |_| simple(0, b"whatever"), LIE),
        ("simple and not structured", true, |h| [simple(0, h), vec![7; 1024]].concat(), LIE),
        ("structured and not simple", false, |h| piece(1, h, 4096, 1024), LIE),
        ("before", true, |h| piece(1, h, 4095, 1024), LIE),
        ("beyond", true, |h| piece(1, h, 4096, 1025), LIE),
        ("far beyond", true, |h| hole(1, h, u64::MAX, u32::MAX), LIE),
        ("a hole beyond", true, |h| hole(1, h, 4096, 1025), LIE),
        ("an empty hole", true, |h| hole(0, h, 4096, 0), LIE),
        ("an empty piece", true, |h| piece(0, h, 4096, 0), LIE),
        ("too little", true, |h| piece(1, h, 4096, 1023), LIE),
        ("nothing", true, |h| chunk(1, 0, h, &[]), LIE),
        ("nothing, and more to come", true, |h| chunk(0, 0, h, &[]), LIE),
        ("twice", true, |h| [piece(0, h, 4096, 1024), hole(1, h, 4096, 1)].concat(), LIE),
        ("overlapping", true, |h| [piece(0, h, 4200, 100), piece(1, h, 4096, 105)].concat(), LIE),
        ("a gap", true, |h| [piece(0, h, 4096, 500), piece(1, h, 4600, 520)].concat(), LIE),
        ("a hole of no length", true, |h| chunk(1, 2, h, &[0; 8]), LIE),
        ("a huge chunk", true, |h| [&chunk(1, 1, h, &[])[..16], &[0xff; 4]].concat(), LIE),
        ("block status", true, |h| chunk(1, 5, h, &[0; 12]), LIE),
        ("an unknown kind", true, |h| chunk(1, 77, h, &[]), LIE),
        ("an error", true, |h| chunk(1, 0x8001, h, &[0, 0, 0, 28, 0, 0]), Err(ErrorKind::NoSpace)),
        ("an unknown error", true, |h| chunk(1, 0x8077, h, &[0, 0, 0, 5]), Err(ErrorKind::Io)),
        ("an error of zero", true, |h| chunk(1, 0x8001, h, &[0; 6]), LIE),
        ("a short error", true, |h| chunk(1, 0x8001, h, &[0; 3]), LIE),
        ("a long error", true, |h| chunk(1, 0x8001, h, &[1; 5000]), LIE),
        ("errors for ever", true, |h| chunk(0, 0x8001, h, &[0, 0, 0, 5, 0, 0]).repeat(100), LIE),
        ("a simple error", false, |h| simple(1, h), Err(ErrorKind::ReadOnly)),
        // And silence.
        ("half a head", true, |h| piece(1, h, 4096, 1024)[..19].to_vec(), Err(ErrorKind::Io)),
        ("half a piece", true, |h| piece(1, h, 4096, 1024)[..500].to_vec(), Err(ErrorKind::Io)),
        ("silence", false, |_| Vec::new(), Err(ErrorKind::Io)),
        ("a part for ever", true, |h| piece(0, h, 4096, 1024), Err(ErrorKind::Io)),
    ];
    for (name, structured, reply, expected) in table {
        check_read(name, *structured, *reply, *expected);
    }
}

#[test]
fn lies_about_holes_are_errors() {
    let status = |context: u32, len: u32, state: u32| {
        move |handle: &[u8]| {
            let fields = [context, len, state].map(u32::to_be_bytes);
            chunk(1, 5, handle, fields.as_flattened())
        }
    };
    type Boxed = Box<dyn FnOnce(&[u8]) -> Vec<u8> + Send>;
    let found = |reply: Boxed| lying(true, reply).into_disk().next_data(0).map_err(|error| error.kind());
    assert_eq!(found(Box::new(status(5, 4096, 0))), Ok(Some(0..4096)));
    // One that is longer than the disk is cut to it, and none can be empty.
    assert_eq!(found(Box::new(status(5, u32::MAX, 0))), Ok(Some(0..SIZE)));
    assert_eq!(found(Box::new(status(5, u32::MAX, 3))), Ok(None));
    assert_eq!(found(Box::new(status(5, 0, 3))), Err(ErrorKind::Protocol));
    assert_eq!(found(Box::new(status(6, 4096, 3))), Err(ErrorKind::Protocol));
    assert_eq!(found(Box::new(|h| simple(0, h))), Err(ErrorKind::Protocol));
    assert_eq!(found(Box::new(|h| chunk(1, 0, h, &[]))), Err(ErrorKind::Protocol));
    assert_eq!(found(Box::new(|h| chunk(1, 5, h, &[0; 16]))), Err(ErrorKind::Protocol));
    assert_eq!(found(Box::new(|h| piece(1, h, 0, 4096))), Err(ErrorKind::Protocol));
}

#[test]
fn what_one_learns_of_the_server_all_learn() {
    let silence: Reply = |_| Vec::new();
    for (reply, patience, kind) in [
        (silence, Duration::from_millis(300), ErrorKind::Io),
        // Who sleeps is woken, long before its time.
        (|_| vec![0; 16], Duration::from_secs(100), ErrorKind::Protocol),
    ] {
        let begun = Instant::now();
        let disk = lying_for(patience, true, reply).into_disk();
        std::thread::scope(|scope| {
            for number in 0..70u64 {
                let disk = &disk;
                scope.spawn(move || {
                    let found = disk.read_at(&mut [0; 512], number * 512).map_err(|error| error.kind());
                    assert_eq!(found, Err(kind));
                });
            }
        });
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}

/// A client of an export with these flags, and the flags and the kind of each of its requests, all of which go well.
fn connect(
    flags: u16,
    read_only: bool,
) -> (storage_block::Result<nbd::Client>, std::sync::mpsc::Receiver<(u16, u16)>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        negotiate(&mut stream, false, flags);
        let mut request = [0; 28];
        while stream.read_exact(&mut request).is_ok() {
            let number = |at: usize| u16::from_be_bytes([request[at], request[at + 1]]);
            tell.send((number(4), number(6))).unwrap();
            if number(6) == 1 {
                stream.read_exact(&mut vec![0; usize::from(number(26))]).unwrap();
            }
            stream.write_all(&simple(0, &request[8..16])).unwrap();
        }
    });
    (nbd::Client::builder("").read_only(read_only).connect(dir.path().join("s")), told)
}

/// What was flushed is durable, whatever the server can do: none is asked for what it does not offer.
#[test]
fn a_server_that_cannot_flush_writes_through_or_is_only_read() {
    const WRITE: u16 = 1;
    const ZEROES: u16 = 6;
    for (flags, asked) in [
        (FLAGS, [(0, WRITE), (0, ZEROES), (0, 3)].to_vec()),
        (FLAGS & !FUA, [(0, WRITE), (0, ZEROES), (0, 3)].to_vec()),
        (FLAGS & !FLUSH, [(1, WRITE), (1, ZEROES)].to_vec()),
    ] {
        let (client, told) = connect(flags, false);
        let disk = client.unwrap().into_disk();
        disk.write_at(&[7; 512], 0).unwrap();
        disk.write_zeroes(0, 4096).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let told: Vec<_> = told.iter().filter(|(_, kind)| *kind != 2).collect();
        assert_eq!(told, asked, "{flags:#x}");
    }
    let neither = FLAGS & !FLUSH & !FUA;
    assert_eq!(connect(neither, false).0.err().map(|e| e.kind()), Some(ErrorKind::Unsupported));
    for (flags, read_only) in [(neither, true), (neither | 2, false)] {
        let disk = connect(flags, read_only).0.unwrap().into_disk();
        assert!(disk.read_only());
        disk.flush().unwrap();
    }
}

/// What becomes of a handshake with a server that says just this.
fn handshake(bytes: &[u8]) -> Option<ErrorKind> {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let bytes = bytes.to_vec();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let second = Duration::from_millis(300);
    let client = nbd::Client::builder("").timeouts(second, second).connect(dir.path().join("s"));
    let kind = client.err().map(|error| error.kind());
    server.join().unwrap();
    kind
}

#[test]
fn handshakes_that_cannot_be_are_errors() {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    let no = 0x8000_0001;
    let plain = [&greeting[..], &answer(8, no, &[])].concat();
    let export = |size: u64| [&[0, 0], &size.to_be_bytes()[..], &[0, 1]].concat();
    let with = |parts: &[Vec<u8>]| [&plain[..], &parts.concat()].concat();
    let blocks =
        |min: u32, max: u32| [&[0, 3][..], &[min, 4096, max].map(u32::to_be_bytes).concat()].concat();
    let half = [&greeting[..], &answer(8, no, &[])[..7]].concat();
    for (name, bytes, kind) in [
        ("half an answer", half, ErrorKind::Io),
        ("silence", vec![], ErrorKind::Io),
        ("another protocol", b"SSH-2.0-OpenSSH_9.2p1".to_vec(), ErrorKind::Protocol),
        (
            "the old style",
            [b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53", &[0; 140][..]].concat(),
            ErrorKind::Protocol,
        ),
        ("no fixed newstyle", b"NBDMAGICIHAVEOPT\0\x02".to_vec(), ErrorKind::Protocol),
        ("no answer", [&greeting[..], &[0; 20]].concat(), ErrorKind::Protocol),
        ("an answer to another option", [&greeting[..], &answer(3, 1, &[])].concat(), ErrorKind::Protocol),
        (
            "a huge answer",
            [&greeting[..], &answer(8, 1, &[])[..16], &[0xff; 4]].concat(),
            ErrorKind::Protocol,
        ),
        ("answers for ever", [&greeting[..], &answer(8, 2, &[]).repeat(2000)].concat(), ErrorKind::Protocol),
        ("TLS alone", [&greeting[..], &answer(8, 0x8000_0005, &[])].concat(), ErrorKind::Untrusted),
        ("no such export", with(&[answer(7, 0x8000_0006, &[])]), ErrorKind::NotFound),
        ("a refusal", with(&[answer(7, 0x8000_0002, &[])]), ErrorKind::Io),
        ("no export", with(&[answer(7, 1, &[])]), ErrorKind::Protocol),
        ("half an export", with(&[answer(7, 3, &[0; 5]), answer(7, 1, &[])]), ErrorKind::Protocol),
        ("a disk too large", with(&[answer(7, 3, &export(1 << 63)), answer(7, 1, &[])]), ErrorKind::Protocol),
        ("half a sector", with(&[answer(7, 3, &export(1000)), answer(7, 1, &[])]), ErrorKind::InvalidSize),
        (
            "blocks of no size",
            with(&[answer(7, 3, &export(512)), answer(7, 3, &blocks(0, 4096)), answer(7, 1, &[])]),
            ErrorKind::Protocol,
        ),
        (
            "blocks larger than requests",
            with(&[answer(7, 3, &export(512)), answer(7, 3, &blocks(512, 1)), answer(7, 1, &[])]),
            ErrorKind::Protocol,
        ),
        ("half an old way in", with(&[answer(7, no, &[]), vec![0; 9]]), ErrorKind::Io),
    ] {
        assert_eq!(handshake(&bytes), Some(kind), "{name}");
    }
}

//! The server against bytes, those that a client sends and those that none does.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use storage_block::{Disk, ErrorKind, MemoryDisk, RawFile, nbd};

fn server(size: u64) -> (tempfile::TempDir, nbd::Server, Disk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(size).unwrap().into_disk();
    let server = nbd::Server::bind(dir.path().join("s"), disk.clone()).unwrap();
    (dir, server, disk)
}

fn path(server: &nbd::Server) -> &Path {
    match server.address() {
        nbd::Address::Unix(path) => path,
        other => panic!("{other} is no Unix socket"),
    }
}

/// A client that has been through the handshake.
fn connect(server: &nbd::Server) -> UnixStream {
    let mut stream = UnixStream::connect(path(server)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(&option(1, b"")).unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    stream
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn request(flags: u16, kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let head = [
        0x2560_9513u32.to_be_bytes(),
        [flags.to_be_bytes(), kind.to_be_bytes()].concat().try_into().unwrap(),
    ];
    [&head.concat(), &b"handle.."[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// The error number of the next reply.
fn reply(stream: &mut UnixStream) -> u32 {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!((&bytes[..4], &bytes[8..]), (&[0x67, 0x44, 0x66, 0x98][..], &b"handle.."[..]));
    u32::from_be_bytes(bytes[4..8].try_into().unwrap())
}

/// Whether the server has hung up.
fn hung_up(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    !matches!(stream.read_to_end(&mut rest), Ok(read) if read > 0)
}

#[test]
fn requests_that_cannot_be_are_errors() {
    let (_dir, server, _disk) = server(1 << 20);
    let mut stream = connect(&server);
    let size = 1 << 20;
    for (flags, kind, offset, len, errno) in [
        (0, 0, size - 1, 2, 22),
        (0, 0, u64::MAX, 1, 22),
        (0, 0, 0, u32::MAX, 22),
        (0, 0, 0, (32 << 20) + 1, 22),
        (0x80, 0, 0, 1, 22),
        (0, 4, size, 1, 28),
        (0, 6, u64::MAX, u32::MAX, 28),
        (0, 7, 0, 512, 22),
        (0, 99, 0, 0, 95),
        (1, 3, 0, 0, 0),
        (0, 6, 0, size as u32, 0),
        (0, 4, 0, 0, 0),
    ] {
        stream.write_all(&request(flags, kind, offset, len)).unwrap();
        assert_eq!(reply(&mut stream), errno, "{flags} {kind} {offset} {len}");
    }
    // A write brings its bytes along, also when it is refused.
    stream.write_all(&request(0, 1, size - 1, 3)).unwrap();
    stream.write_all(&[1; 3]).unwrap();
    assert_eq!(reply(&mut stream), 28);
    stream.write_all(&request(0, 0, size - 3, 3)).unwrap();
    assert_eq!(reply(&mut stream), 0);
    let mut bytes = [1; 3];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 3]);
}

#[test]
fn whoever_breaks_the_protocol_is_hung_up_on() {
    let (_dir, server, _disk) = server(1 << 20);
    let before_options = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(path(&server)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        let _ = stream.write_all(bytes);
        stream
    };
    let flags = 3u32.to_be_bytes();
    let endless = [&b"IHAVEOPT"[..], &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    for bytes in [
        &[0xff; 4][..],
        &[&flags[..], &b"NOTMAGIC"[..], &[0; 8]].concat(),
        &[&flags[..], &endless].concat(),
        &[&flags[..], &option(1, b"another export")].concat(),
    ] {
        assert!(hung_up(&mut before_options(bytes)), "{bytes:x?}");
    }
    for bytes in [&[0; 28][..], &request(0, 1, 0, (32 << 20) + 1), &request(0, 2, 0, 0)] {
        let mut stream = connect(&server);
        stream.write_all(bytes).unwrap();
        assert!(hung_up(&mut stream), "{bytes:x?}");
    }
    // Options that are merely wrong are answered.
    for (number, data, kind) in [
        (7, &b""[..], 0x8000_0003u32),
        (7, &[0, 0, 0, 9, 0, 0], 0x8000_0003),
        (7, &[255; 6], 0x8000_0003),
        (6, &[0, 0, 0, 1, b'x', 0, 0], 0x8000_0006),
        (3, b"x", 0x8000_0003),
        (5, b"", 0x8000_0001),
        (8, b"", 1),
        (2, b"", 1),
    ] {
        let mut stream = before_options(&[&flags[..], &option(number, data)].concat());
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(head[12..16], kind.to_be_bytes(), "option {number} with {data:x?}");
    }
    // One that vanishes in the middle of a request.
    let mut stream = connect(&server);
    stream.write_all(&request(0, 1, 0, 1000)[..20]).unwrap();
    drop(stream);
    assert_eq!(run_flush(&server), 0);
}

fn run_flush(server: &nbd::Server) -> u32 {
    let mut stream = connect(server);
    stream.write_all(&request(0, 3, 0, 0)).unwrap();
    reply(&mut stream)
}

#[test]
fn dropping_the_server_ends_everything() {
    let (_dir, server, disk) = server(32 << 20);
    // Clients that are silent, in the handshake and after it, and one that reads no reply.
    let mut handshake = UnixStream::connect(path(&server)).unwrap();
    let mut silent = connect(&server);
    let mut deaf = connect(&server);
    for _ in 0..8 {
        deaf.write_all(&request(0, 0, 0, 32 << 20)).unwrap();
    }
    let path = path(&server).to_owned();
    drop(server);
    assert!(!path.exists());
    handshake.read_exact(&mut [0; 18]).unwrap();
    assert!(hung_up(&mut handshake) && hung_up(&mut silent));
    // Nobody else holds the disk's backend any more, so the socket can be served again.
    nbd::Server::bind(path, disk).unwrap();
}

#[test]
fn sockets_with_long_names_and_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(4096).unwrap().into_disk();
    let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    let server = nbd::Server::bind(deep.join("socket"), disk.clone()).unwrap();
    assert!(path(&server).exists());
    let kind = |path: &Path| nbd::Server::bind(path, disk.clone()).map(|_| ()).map_err(|error| error.kind());
    assert_eq!(kind(&deep.join("socket")), Err(ErrorKind::InUse));
    drop(server);
    assert!(!deep.join("socket").exists());

    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    assert_eq!(kind(&file), Err(ErrorKind::InUse));
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");

    // What a process that died has left.
    let stale = dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    assert_eq!(kind(&stale), Ok(()));
}

/// A client that has asked for structured replies and block status.
fn connect_structured(server: &nbd::Server) -> UnixStream {
    let mut stream = UnixStream::connect(path(server)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(&option(8, b"")).unwrap();
    assert_eq!(answer(&mut stream), (8, 1, vec![]));
    stream.write_all(&option(10, &context("", &["base:allocation"]))).unwrap();
    assert_eq!(answer(&mut stream), (10, 4, [&[0, 0, 0, 1][..], b"base:allocation"].concat()));
    assert_eq!(answer(&mut stream), (10, 1, vec![]));
    stream.write_all(&option(7, &[0; 6])).unwrap();
    while answer(&mut stream).1 != 1 {}
    stream
}

/// What an option about metadata brings along.
fn context(export: &str, queries: &[&str]) -> Vec<u8> {
    let counted = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let queries: Vec<Vec<u8>> = queries.iter().map(|query| counted(query)).collect();
    [&counted(export)[..], &(queries.len() as u32).to_be_bytes(), &queries.concat()].concat()
}

/// The next answer to an option: which, its kind, and what it says.
fn answer(stream: &mut UnixStream) -> (u32, u32, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(16) as usize];
    stream.read_exact(&mut data).unwrap();
    (number(8), number(12), data)
}

/// The next chunk of a reply: its flags, its kind, and what it says.
fn chunk(stream: &mut UnixStream) -> (u16, u16, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    assert_eq!((&head[..4], &head[8..16]), (&[0x66, 0x8e, 0x33, 0xef][..], &b"handle.."[..]));
    let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data).unwrap();
    (u16::from_be_bytes([head[4], head[5]]), u16::from_be_bytes([head[6], head[7]]), data)
}

#[test]
fn options_are_answered_as_they_should() {
    let dir = tempfile::tempdir().unwrap();
    let disk = || MemoryDisk::new(1 << 20).unwrap().into_disk();
    let server = nbd::Server::builder().export("", disk()).export("b", disk()).export("a/\u{e4}", disk());
    let server = server.bind(dir.path().join("s")).unwrap();
    let mut stream = UnixStream::connect(path(&server)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let name = |name: &str| context(name, &[]);
    let (list, set) = (9, 10);
    let allocation = |id: u8| (4, [&[0, 0, 0, id][..], b"base:allocation"].concat());
    let (done, invalid, unknown) = ((1, vec![]), (0x8000_0003u32, vec![]), (0x8000_0006u32, vec![]));
    let export = |name: &str| (2, [&[0, 0, 0, name.len() as u8][..], name.as_bytes()].concat());
    let info = |flags: u16| (3, [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &flags.to_be_bytes()].concat());
    let blocks = (3, [&[0, 3][..], &[1u32, 4096, 32 << 20].map(u32::to_be_bytes).concat()].concat());
    let flags = 0b1001_0110_1101;
    let mut step = 0;
    let mut check = |number: u32, data: &[u8], expected: &[&(u32, Vec<u8>)]| {
        step += 1;
        stream.write_all(&option(number, data)).unwrap();
        for &&(kind, ref data) in expected {
            assert_eq!(answer(&mut stream), (number, kind, data.clone()), "step {step}");
        }
    };
    check(3, b"", &[&export(""), &export("a/\u{e4}"), &export("b"), &done]);
    // Metadata goes with structured replies alone.
    check(list, &name("b"), &[&invalid]);
    check(set, &context("b", &["base:allocation"]), &[&invalid]);
    check(6, &[0, 0, 0, 1, b'b', 0, 0], &[&info(flags), &blocks, &done]);
    check(8, b"x", &[&invalid]);
    check(8, b"", &[&done]);
    check(
        6,
        &[0, 0, 0, 1, b'b', 0, 1, 0, 1],
        &[&info(flags | 1 << 7), &blocks, &(3, vec![0, 1, b'b']), &done],
    );
    check(list, &name("b"), &[&allocation(0), &done]);
    check(list, &context("b", &["base:"]), &[&allocation(0), &done]);
    check(list, &context("b", &["qemu:"]), &[&done]);
    check(list, &context("b", &["x", "base:allocation"]), &[&allocation(0), &done]);
    check(list, &name("none"), &[&unknown]);
    check(set, &name("b"), &[&done]);
    check(set, &context("b", &["base:"]), &[&done]);
    check(set, &context("none", &["base:allocation"]), &[&unknown]);
    check(set, &context("b", &["base:allocation"])[..9], &[&invalid]);
    check(set, &[&context("b", &[])[..], b"x"].concat(), &[&invalid]);
    check(set, &[0, 0, 0, 1, b'b', 255, 255, 255, 255], &[&invalid]);
    // What was agreed on for one export is not for another.
    check(set, &context("b", &["base:allocation"]), &[&allocation(1), &done]);
    check(6, &[0, 0, 0, 1, b'x', 0, 0], &[&unknown]);
    check(7, &[0, 0, 0, 0, 0, 0], &[&info(flags | 1 << 7), &blocks, &done]);
    stream.write_all(&request(0, 7, 0, 512)).unwrap();
    assert_eq!(chunk(&mut stream), (1, 0x8001, vec![0, 0, 0, 22, 0, 0]));

    // Exports come and go, and who has one keeps it.
    assert_eq!(server.add("b", disk()).map_err(|e| e.kind()), Err(ErrorKind::AlreadyExists));
    assert!(server.remove("").is_some() && server.remove("").is_none());
    stream.write_all(&request(0, 3, 0, 0)).unwrap();
    assert_eq!(reply(&mut stream), 0);
    let mut stream = UnixStream::connect(path(&server)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&[&3u32.to_be_bytes()[..], &option(7, &[0; 6])].concat()).unwrap();
    assert_eq!(answer(&mut stream), (7, unknown.0, vec![]));
    server.add("", disk()).unwrap();
    stream.write_all(&option(1, b"")).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
}

#[test]
fn holes_are_told_of() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let disk = RawFile::create(dir.path().join("raw"), 8 * MIB).unwrap().into_disk();
    disk.write_at(&[7; 4096], 2 * MIB).unwrap();
    disk.write_at(&[8; 4096], 2 * MIB + 8192).unwrap();
    let server = nbd::Server::bind(dir.path().join("s"), disk).unwrap();
    let mut stream = connect_structured(&server);
    let status = |extents: &[[u32; 2]]| {
        [&[0, 0, 0, 1][..], &extents.concat().into_iter().flat_map(u32::to_be_bytes).collect::<Vec<_>>()]
            .concat()
    };
    let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let data = |at: u64, parts: &[(u8, usize)]| {
        let bytes: Vec<u8> = parts.iter().flat_map(|(byte, len)| vec![*byte; *len]).collect();
        [&at.to_be_bytes()[..], &bytes].concat()
    };
    let error = |errno: u8| vec![0, 0, 0, errno, 0, 0];
    let rest = (6 * MIB - 12288) as u32;
    let islands = [(7, 4096), (0, 4096), (8, 4096)];
    for (flags, kind, offset, len, chunks) in [
        (
            0,
            7,
            0,
            8 * MIB as u32,
            &[(1, 5, status(&[[2 << 20, 3], [4096, 0], [4096, 3], [4096, 0], [rest, 3]]))][..],
        ),
        (8, 7, 0, 8 << 20, &[(1, 5, status(&[[2 << 20, 3]]))]),
        (8, 7, 2 * MIB + 5, 8 << 10, &[(1, 5, status(&[[4091, 0]]))]),
        (0, 7, 2 * MIB + 4095, 2, &[(1, 5, status(&[[1, 0], [1, 3]]))]),
        (0, 7, 0, 0, &[(1, 0x8001, error(22))]),
        (0, 7, 8 * MIB - 1, 2, &[(1, 0x8001, error(22))]),
        (2, 7, 0, 512, &[(1, 0x8001, error(22))]),
        // Reads: a hole worth it, none worth it, and one piece because it is asked for.
        (0, 0, MIB, 1 << 20, &[(1, 2, hole(MIB, 1 << 20))]),
        (
            0,
            0,
            2 * MIB - 65536,
            131_072,
            &[
                (0, 2, hole(2 * MIB - 65536, 65536)),
                (0, 1, data(2 * MIB, &islands)),
                (1, 2, hole(2 * MIB + 12288, 65536 - 12288)),
            ],
        ),
        (0, 0, 2 * MIB, 12288, &[(1, 1, data(2 * MIB, &islands))]),
        (4, 0, 2 * MIB - 65536, 65536 + 4096, &[(1, 1, data(2 * MIB - 65536, &[(0, 65536), (7, 4096)]))]),
        (0, 0, 2 * MIB, 0, &[(1, 0, vec![])]),
        (0, 0, 8 * MIB, 1, &[(1, 0x8001, error(22))]),
        (0, 0, 0, u32::MAX, &[(1, 0x8001, error(22))]),
        (2, 0, 0, 1, &[(1, 0x8001, error(22))]),
    ] {
        stream.write_all(&request(flags, kind, offset, len)).unwrap();
        for (number, expected) in chunks.iter().enumerate() {
            assert!(chunk(&mut stream) == *expected, "chunk {number} of {flags} {kind} {offset} {len}");
        }
    }
}

/// The blocks a file takes on the disk below.
fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks()
}

#[test]
fn zeroes_make_holes_unless_they_must_not() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let disk = RawFile::create(&raw, 4 << 20).unwrap().into_disk();
    disk.write_at(&vec![9; 4 << 20], 0).unwrap();
    disk.flush().unwrap();
    let full = allocated(&raw);
    let server = nbd::Server::bind(dir.path().join("s"), disk.clone()).unwrap();
    let mut stream = connect(&server);
    // Force unit access is 1, no hole 2, fast 16.
    for (flags, errno, zeroed, taken) in [
        (2 | 16, 95, false, full),
        (2 | 1, 0, true, full),
        (4, 22, true, full),
        (16 | 1, 0, true, full - (1 << 20) / 512),
    ] {
        stream.write_all(&request(flags, 6, 1 << 20, 1 << 20)).unwrap();
        assert_eq!(reply(&mut stream), errno, "{flags}");
        let mut found = vec![1; 4 << 20];
        disk.read_at(&mut found, 0).unwrap();
        for (at, part) in found.chunks(1 << 20).enumerate() {
            let expected = if at == 1 && zeroed { 0 } else { 9 };
            assert!(part.iter().all(|byte| *byte == expected), "{flags}: part {at}");
        }
        assert_eq!(allocated(&raw), taken, "{flags}");
    }
}

#[test]
fn zeroes_are_not_called_fast_where_they_are_written_out() {
    let (_dir, server, disk) = server(1 << 20);
    disk.write_at(&[9; 4096], 0).unwrap();
    let mut stream = connect(&server);
    for (flags, errno, byte) in [(16, 95, 9), (0, 0, 0)] {
        stream.write_all(&request(flags, 6, 0, 4096)).unwrap();
        assert_eq!(reply(&mut stream), errno, "{flags}");
        let mut found = [1; 4096];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == [byte; 4096], "{flags}");
    }
}

#[test]
fn requests_that_come_together_are_answered_together() {
    let (_dir, server, disk) = server(1 << 20);
    disk.write_at(&[3; 1 << 20], 0).unwrap();
    let mut stream = connect(&server);
    let mut bytes = Vec::new();
    for number in 0..200u64 {
        bytes.extend(request(0, 0, number * 512, 512));
        bytes.extend(request(0, 1, number * 512, 511));
        bytes.extend([4; 511]);
    }
    // The last in halves.
    let (last, halves) = (request(0, 1, 0, 100_000), [5; 100_000]);
    bytes.extend(&last);
    let writer = {
        let mut stream = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            stream.write_all(&bytes).unwrap();
            stream.write_all(&halves[..7]).unwrap();
            stream.write_all(&halves[7..]).unwrap();
        })
    };
    for _ in 0..200 {
        assert_eq!(reply(&mut stream), 0);
        let mut found = [0; 512];
        stream.read_exact(&mut found).unwrap();
        assert!(found == [3; 512]);
        assert_eq!(reply(&mut stream), 0);
    }
    assert_eq!(reply(&mut stream), 0);
    writer.join().unwrap();
    let mut found = vec![0; 100 << 10];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found[..100_000].iter().all(|byte| *byte == 5));
    assert!(found[100_352..].chunks(512).all(|part| part[..511] == [4; 511] && part[511] == 3));
}

#[test]
fn who_dawdles_in_the_handshake_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let limit = Duration::from_millis(300);
    let server = nbd::Server::builder().export("", disk).handshake_timeout(limit);
    let server = server.bind(dir.path().join("s")).unwrap();
    let begun = Instant::now();
    let mut silent = UnixStream::connect(path(&server)).unwrap();
    let mut slow = UnixStream::connect(path(&server)).unwrap();
    let dripping = {
        let mut slow = slow.try_clone().unwrap();
        std::thread::spawn(move || {
            // One that always has something to say, and never comes to the point.
            let listing = [&3u32.to_be_bytes()[..], &option(3, b"").repeat(1 << 20)].concat();
            listing.iter().try_for_each(|byte| {
                std::thread::sleep(Duration::from_millis(1));
                slow.write_all(&[*byte])
            })
        })
    };
    // Whoever is through is not in a hurry.
    let mut through = connect(&server);
    for stream in [&mut silent, &mut slow] {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert!(dripping.join().unwrap().is_err());
    assert!((limit..Duration::from_secs(8)).contains(&begun.elapsed()));
    through.write_all(&request(0, 3, 0, 0)).unwrap();
    assert_eq!(reply(&mut through), 0);
}

#[test]
fn one_connection_too_many_is_closed() {
    let (_dir, server, _disk) = server(1 << 20);
    let mut served: Vec<UnixStream> = (0..nbd::MAX_CONNECTIONS).map(|_| connect(&server)).collect();
    let mut refused = UnixStream::connect(path(&server)).unwrap();
    assert!(hung_up(&mut refused));
    for stream in &mut served {
        stream.write_all(&request(0, 3, 0, 0)).unwrap();
        assert_eq!(reply(stream), 0);
    }
}

#[test]
fn ports_are_for_this_host_alone() {
    let (_dir, _server, disk) = server(1 << 20);
    let bind = |address: &str| {
        let server = nbd::Server::builder().export("x", disk.clone());
        server.bind(address.parse::<std::net::SocketAddr>().unwrap())
    };
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        assert_eq!(bind(address).err().map(|error| error.kind()), Some(ErrorKind::Untrusted), "{address}");
    }
    let server = bind("127.0.0.1:0").unwrap();
    let nbd::Address::Tcp(port) = server.address().clone() else { panic!("it is a port") };
    assert_eq!(bind(&port.to_string()).err().map(|error| error.kind()), Some(ErrorKind::InUse));
    let client = nbd::Client::connect(port, "x").unwrap().into_disk();
    client.write_at(b"hello", 1000).unwrap();
    let mut found = [0; 5];
    disk.read_at(&mut found, 1000).unwrap();
    assert_eq!(&found, b"hello");
    drop(server);
    assert!(client.flush().is_err());
    assert_eq!(nbd::Client::connect(port, "x").err().map(|error| error.kind()), Some(ErrorKind::Io));
}

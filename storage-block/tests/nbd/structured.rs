//! Options, structured replies, holes and block status.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use storage_block::{ErrorKind, MemoryDisk, RawFile, nbd};

use super::wire::*;

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
    // No trims and no fast zeroes: memory is as long in writing those as others.
    let flags = 0b0001_0100_1101;
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

//! What goes over the wire, made and taken apart by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use storage_block::{Disk, MemoryDisk, nbd};

pub(super) fn server(size: u64) -> (tempfile::TempDir, nbd::Server, Disk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(size).unwrap().into_disk();
    let server = nbd::Server::bind(dir.path().join("s"), disk.clone()).unwrap();
    (dir, server, disk)
}

pub(super) fn path(server: &nbd::Server) -> &Path {
    match server.address() {
        nbd::Address::Unix(path) => path,
        other => panic!("{other} is no Unix socket"),
    }
}

/// A client that has been through the handshake.
pub(super) fn connect(server: &nbd::Server) -> UnixStream {
    let mut stream = UnixStream::connect(path(server)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(&option(1, b"")).unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    stream
}

pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

pub(super) fn request(flags: u16, kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let head = [
        0x2560_9513u32.to_be_bytes(),
        [flags.to_be_bytes(), kind.to_be_bytes()].concat().try_into().unwrap(),
    ];
    [&head.concat(), &b"handle.."[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// The error number of the next reply.
pub(super) fn reply(stream: &mut UnixStream) -> u32 {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!((&bytes[..4], &bytes[8..]), (&[0x67, 0x44, 0x66, 0x98][..], &b"handle.."[..]));
    u32::from_be_bytes(bytes[4..8].try_into().unwrap())
}

/// Whether the server has hung up.
pub(super) fn hung_up(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    !matches!(stream.read_to_end(&mut rest), Ok(read) if read > 0)
}

/// A client that has asked for structured replies and block status.
pub(super) fn connect_structured(server: &nbd::Server) -> UnixStream {
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
pub(super) fn context(export: &str, queries: &[&str]) -> Vec<u8> {
    let counted = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let queries: Vec<Vec<u8>> = queries.iter().map(|query| counted(query)).collect();
    [&counted(export)[..], &(queries.len() as u32).to_be_bytes(), &queries.concat()].concat()
}

/// The next answer to an option: which, its kind, and what it says.
pub(super) fn answer(stream: &mut UnixStream) -> (u32, u32, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(16) as usize];
    stream.read_exact(&mut data).unwrap();
    (number(8), number(12), data)
}

/// The next chunk of a reply: its flags, its kind, and what it says.
pub(super) fn chunk(stream: &mut UnixStream) -> (u16, u16, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    assert_eq!((&head[..4], &head[8..16]), (&[0x66, 0x8e, 0x33, 0xef][..], &b"handle.."[..]));
    let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data).unwrap();
    (u16::from_be_bytes([head[4], head[5]]), u16::from_be_bytes([head[6], head[7]]), data)
}

//! The server against bytes, those that a client sends and those that none does.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod structured;
mod wire;
mod zeroing;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use storage_block::{BlockBackend, Disk, Error, ErrorKind, IoLimits, Limiter, MemoryDisk, Rate, Result, nbd};

use wire::*;

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

/// A disk that fails at all that changes it.
#[derive(Debug)]
struct Failing(ErrorKind);

impl Failing {
    fn fail(&self) -> Result<()> {
        Err(Error::new(self.0, "as it should"))
    }
}

impl BlockBackend for Failing {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        self.fail()
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        self.fail()
    }

    fn flush(&self) -> Result<()> {
        self.fail()
    }
}

/// A client is told what has gone wrong as far as the protocol has a number for it.
#[test]
fn failures_have_the_numbers_of_the_protocol() {
    for (kind, errno, told) in [
        (ErrorKind::NoSpace, 28, ErrorKind::NoSpace),
        (ErrorKind::Cancelled, 108, ErrorKind::Io),
        (ErrorKind::Corrupt, 5, ErrorKind::Io),
        (ErrorKind::Io, 5, ErrorKind::Io),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = nbd::Server::bind(dir.path().join("s"), Disk::new(Failing(kind)).unwrap()).unwrap();
        let mut stream = connect(&server);
        for (command, bytes) in [(1, &[7; 512][..]), (3, &[]), (4, &[]), (6, &[])] {
            let len = if command == 3 { 0 } else { 512 };
            stream.write_all(&[&request(0, command, 0, len)[..], bytes].concat()).unwrap();
            assert_eq!(reply(&mut stream), errno, "{kind:?} at {command}");
        }
        let client = nbd::Client::connect(server.address().clone(), "").unwrap().into_disk();
        let results = [client.write_at(&[7; 512], 0), client.flush(), client.write_zeroes(0, 512)];
        assert!(results.iter().all(|result| result.as_ref().is_err_and(|e| e.kind() == told)), "{results:?}");
    }
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
    handshake.read_exact(&mut [0; 18]).unwrap();
    let mut silent = connect(&server);
    let mut deaf = connect(&server);
    for _ in 0..8 {
        deaf.write_all(&request(0, 0, 0, 32 << 20)).unwrap();
    }
    let path = path(&server).to_owned();
    drop(server);
    assert!(!path.exists());
    assert!(hung_up(&mut handshake) && hung_up(&mut silent));
    // Nobody else holds the disk's backend any more, so the socket can be served again.
    nbd::Server::bind(path, disk).unwrap();
}

/// Also where its requests have months to wait for what their disk is limited to.
#[test]
fn dropping_the_server_ends_what_waits_for_limits() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(32 << 20).unwrap().into_disk();
    let limiter = Limiter::new(IoLimits { bytes: Some(Rate { per_second: 1, burst: 1 }), ..IoLimits::NONE });
    let server = nbd::Server::bind(dir.path().join("s"), disk.limited(&limiter)).unwrap();
    let mut client = connect(&server);
    client.write_all(&request(0, 0, 0, 32 << 20)).unwrap();
    assert_eq!(reply(&mut client), 0);
    client.read_exact(&mut vec![0; 32 << 20]).unwrap();
    // Whoever takes the bytes of the last has let others take the first two.
    client.write_all(&[request(0, 0, 0, 32 << 20), request(0, 0, 0, 32 << 20)].concat()).unwrap();
    client.write_all(&request(0, 1, 0, 32 << 20)).unwrap();
    client.write_all(&vec![7; 32 << 20]).unwrap();
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(server);
        ended.send(())
    });
    end.recv_timeout(Duration::from_secs(30)).expect("it waits for the limits");
    // What waited may be told why it ends.
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert!(rest.chunks(16).all(|reply| reply[4..8] == 108u32.to_be_bytes()), "{rest:x?}");
    let mut found = [9; 512];
    disk.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [0; 512], "what has not passed is not written");
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

/// As many as the server is told, one of whom makes room for the next.
#[test]
fn a_server_serves_as_many_as_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let server = nbd::Server::builder().export("", disk).max_connections(2);
    let server = server.bind(dir.path().join("socket")).unwrap();
    let mut served = [connect(&server), connect(&server)];
    assert!(hung_up(&mut UnixStream::connect(path(&server)).unwrap()));
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

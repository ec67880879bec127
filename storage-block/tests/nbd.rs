//! The server against clients that others wrote, and against bytes that no client sends.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use storage_block::{Disk, ErrorKind, MemoryDisk, RawFile, Store, Volume, nbd};

/// Whether the tool is there; a test that cannot run says so, and fails under CI.
fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{tool} is not installed; the NBD server is not tested with it"));
    }
    found
}

fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("SKIPPED: {why}");
}

fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("");
    assert!(output.status.success(), "{tool} {args:?} failed: {text}");
    text
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn image(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = if at >> 18 & 1 == 0 { (state >> 24) as u8 } else { 0 };
    }
    bytes
}

#[test]
fn libnbd_tools() {
    if !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(40 << 20);
    let raw = dir.path().join("raw");
    std::fs::write(&raw, &bytes).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (snapshot, _) = store.import(&RawFile::open(&raw, true).unwrap().into_disk(), &mut |_| ()).unwrap();

    let socket = dir.path().join("s");
    let server = nbd::Server::bind(&socket, snapshot.disk()).unwrap();
    let info = run("nbdinfo", &[&uri(&socket)]);
    for line in
        ["protocol: newstyle-fixed", "export-size: 41943040", "is_read_only: true", "can_multi_conn: true"]
    {
        assert!(info.contains(line), "{info}");
    }
    assert!(run("nbdinfo", &["--list", &uri(&socket)]).contains("export=\"\""));
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri(&socket), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    drop(server);
    assert!(!socket.exists());

    // Into a volume, over several connections at once.
    let volume = Volume::create(&dir.path().join("volume"), None, 40 << 20).unwrap();
    let server = nbd::Server::bind(&socket, volume.disk()).unwrap();
    run("nbdcopy", &["--flush", "--connections=4", raw.to_str().unwrap(), &uri(&socket)]);
    drop(server);
    let (copied, stats) = volume.snapshot(&store).unwrap();
    assert_eq!((copied.digest(), stats.stored_bytes), (snapshot.digest(), 0));
}

#[test]
fn qemu_tools() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(8 << 20);
    let raw = dir.path().join("raw");
    std::fs::write(&raw, &bytes).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (snapshot, _) = store.import(&RawFile::open(&raw, true).unwrap().into_disk(), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), 8 << 20).unwrap();
    let socket = dir.path().join("s");
    let server = nbd::Server::bind(&socket, volume.disk()).unwrap();
    let (uri, raw) = (uri(&socket), raw.to_str().unwrap());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", raw, &uri]);

    // The same to the raw file and to the volume: plain, forced, zeroed and trimmed.
    let commands = [
        "write -P 1 0 512",
        "write -P 2 3584 1024",
        "write -f -P 3 65024 70000",
        "aio_write -P 4 1M 2M",
        "aio_write -P 5 4M 64k",
        "aio_flush",
        "write -z 1500k 300k",
        "write -z -u 5M 100k",
        "write -P 6 5M 4k",
        "flush",
        "read -P 6 5M 4k",
        "read -P 3 65024 70000",
        "read -P 0 1500k 300k",
    ];
    let args: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    for target in [raw, &uri] {
        let said = run("qemu-io", &[&["-f", "raw", target], &args[..]].concat());
        assert!(!said.contains("failed"), "{said}");
    }
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", raw, &uri]);
    run("qemu-io", &["-f", "raw", &uri, "-c", "discard 2M 1M", "-c", "flush", "-c", "read -P 0 2M 1M"]);
    let converted = dir.path().join("converted.qcow2");
    let converted = converted.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, converted]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, converted]);
    drop(server);

    // It was all flushed: the volume opened anew is the same.
    drop(volume);
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    let _server = nbd::Server::bind(&socket, volume.disk()).unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, converted]);
}

#[test]
fn fio_verifies() {
    if !have("fio") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let volume = Volume::create(&dir.path().join("volume"), None, 16 << 20).unwrap();
    let _server = nbd::Server::bind(&socket, volume.disk()).unwrap();
    let help = run("fio", &["--enghelp"]);
    if !help.contains("nbd") {
        skip("this fio has no NBD engine");
        return;
    }
    let uri = format!("--uri={}", uri(&socket));
    run(
        "fio",
        &[
            "--name=v",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--iodepth=16",
            "--size=16M",
        ]
        .into_iter()
        .chain(["--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--blockalign=512"])
        .collect::<Vec<_>>(),
    );
}

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
fn quiescing_holds_requests_off() {
    let (_dir, server, disk) = server(1 << 20);
    let mut stream = connect(&server);
    let quiesced = server.quiesce();
    stream.write_all(&request(0, 1, 0, 4)).unwrap();
    stream.write_all(&[1; 4]).unwrap();
    let mut bytes = [0; 4];
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 4]);
    drop(quiesced);
    assert_eq!(reply(&mut stream), 0);
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4]);
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

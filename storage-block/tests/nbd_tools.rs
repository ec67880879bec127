//! The server with the tools of others: libnbd's, QEMU's and fio, on volumes and snapshots.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::path::Path;

use storage_block::{MemoryDisk, RawFile, Snapshot, Store, Volume, nbd};

mod tools;
use tools::{have, image, run, skip};

const MIB: usize = 1 << 20;

/// A volume made of a snapshot of `bytes`, in a store of its own.
fn volume(dir: &Path, bytes: &[u8]) -> (Store, Snapshot, Volume) {
    let store = Store::open(dir.join("store")).unwrap();
    let image = MemoryDisk::from_vec(bytes.to_vec()).unwrap().into_disk();
    let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("volume"), Some(&snapshot), snapshot.size()).unwrap();
    (store, snapshot, volume)
}

#[test]
fn libnbd_tools() {
    if !have(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(40 * MIB);
    let (store, snapshot, volume) = volume(dir.path(), &bytes);
    let server = nbd::Server::builder().export("a snapshot", snapshot.disk()).export("vol", volume.disk());
    let server = server.bind(dir.path().join("s")).unwrap();
    let (base, vol) = (server.address().uri("a snapshot"), server.address().uri("vol"));

    let info = run("nbdinfo", &[&base]);
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export-size: 41943040",
        "base:allocation",
        "is_read_only: true",
        "can_multi_conn: true",
        "can_df: true",
        "block_size_minimum: 1",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "no {line:?} in {info}");
    }
    let info = run("nbdinfo", &[&vol]);
    for line in
        ["is_read_only: false", "can_fast_zero: true", "can_fua: true", "can_zero: true", "can_trim: true"]
    {
        assert!(info.contains(line), "no {line:?} in {info}");
    }
    let list = run("nbdinfo", &["--list", &server.address().uri("")]);
    for export in ["export=\"a snapshot\"", "export=\"vol\""] {
        assert!(list.contains(export), "{list}");
    }
    // What is zeroes in the image is holes, in turns of 256 KiB.
    let map = run("nbdinfo", &["--map", &base]);
    let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(map.len(), 160);
    for (number, line) in map.iter().enumerate() {
        let (state, name) = if number % 2 == 0 { ("0", "data") } else { ("3", "hole,zero") };
        assert_eq!(*line, [&(number << 18).to_string(), "262144", state, name]);
    }

    let copy = dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    run("nbdcopy", &[&base, copy]);
    assert!(std::fs::read(copy).unwrap() == bytes);
    // From server to server, and from a file over several connections at once.
    volume.disk().write_at(&[1; 3 * MIB], 7).unwrap();
    run("nbdcopy", &["--flush", &base, &vol]);
    assert_eq!(volume.snapshot(&store).unwrap().0.digest(), snapshot.digest());
    volume.disk().write_at(&[1; 3 * MIB], 7).unwrap();
    run("nbdcopy", &["--flush", "--connections=4", copy, &vol]);
    drop(server);
    let (copied, stats) = volume.snapshot(&store).unwrap();
    assert_eq!((copied.digest(), stats.stored_bytes), (snapshot.digest(), 0));
}

#[test]
fn qemu_tools() {
    if !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(8 * MIB);
    let raw = dir.path().join("raw");
    std::fs::write(&raw, &bytes).unwrap();
    let (store, snapshot, volume) = volume(dir.path(), &bytes);
    let server = nbd::Server::builder().export("vol", volume.disk()).export("base", snapshot.disk());
    let server = server.bind(dir.path().join("s")).unwrap();
    let (uri, base) = (server.address().uri("vol"), server.address().uri("base"));
    let (uri, raw) = (&uri[..], raw.to_str().unwrap());
    let same = |one: &str, other: &str| run("qemu-img", &["compare", "-f", "raw", "-F", "raw", one, other]);
    same(raw, uri);
    same(raw, &base);

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
    for target in [raw, uri] {
        let said = run("qemu-io", &[&["-f", "raw", target], &args[..]].concat());
        assert!(!said.contains("failed"), "{said}");
    }
    same(raw, uri);
    run("qemu-io", &["-f", "raw", uri, "-c", "discard 2M 1M", "-c", "flush", "-c", "read -P 0 2M 1M"]);
    // Holes are known to be such; the rest of the image was data and zeroes in turns of 256 KiB.
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", uri]);
    let hole =
        r#""start": 2097152, "length": 1048576, "depth": 0, "present": true, "zero": true, "data": false"#;
    let data =
        r#""start": 6291456, "length": 262144, "depth": 0, "present": true, "zero": false, "data": true"#;
    assert!(map.contains(hole) && map.contains(data), "{map}");

    let converted = dir.path().join("converted.qcow2");
    let converted = converted.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", uri, converted]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", uri, converted]);
    drop(server);

    // It was all flushed: the volume opened anew is the same.
    drop(volume);
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    let server = nbd::Server::builder().export("vol", volume.disk()).bind(dir.path().join("s")).unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", uri, converted]);
    // And back into it, over what is there.
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", raw, uri]);
    same(raw, uri);
    drop(server);
}

#[test]
fn fio_verifies() {
    if !have(&["fio"]) {
        return;
    }
    if !run("fio", &["--enghelp"]).contains("nbd") {
        skip("this fio has no NBD engine");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let (store, _, volume) = volume(dir.path(), &vec![0xaa; 16 * MIB]);
    let fio = |disk: storage_block::Disk, more: &[&str]| {
        let server = nbd::Server::builder().export("x", disk).bind(socket.as_path()).unwrap();
        let uri = format!("--uri={}", server.address().uri("x"));
        let args =
            ["--name=v", "--ioengine=nbd", &uri, "--rw=randwrite", "--bsrange=512-128k", "--iodepth=16"];
        let verify = [
            "--size=16M",
            "--blockalign=512",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ];
        let said = run("fio", &[&args[..], &verify, more].concat());
        assert!(said.contains("err= 0"), "{said}");
        said
    };
    fio(volume.disk(), &["--fsync=64"]);
    // And what was written is there when the volume has been closed, and in a snapshot of it.
    let again = |disk| {
        let said = fio(disk, &["--verify_only"]);
        assert!(said.contains("READ:"), "nothing was read: {said}");
    };
    volume.disk().flush().unwrap();
    drop(volume);
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    again(volume.disk());
    again(volume.snapshot(&store).unwrap().0.disk());
}

/// Our client and their tools see the same.
#[test]
fn tools_and_our_client_meet() {
    if !have(&["qemu-io", "qemu-nbd"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    RawFile::create(&raw, 4 << 20).unwrap();
    let socket = dir.path().join("q");
    let command = ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "--discard=unmap", raw.to_str().unwrap()];
    let mut daemon = tools::Daemon::start(&socket, &command);
    let disk = nbd::Client::connect(socket.as_path(), "").unwrap().into_disk();
    disk.write_at(&[7; 10_000], 1_000_001).unwrap();
    disk.write_zeroes(1_002_000, 3000).unwrap();
    disk.flush().unwrap();
    let uri = nbd::Address::from(socket.as_path()).uri("");
    let reads =
        ["read -P 7 1000001 1999", "read -P 0 1002000 3000", "read -P 7 1005000 5001", "write -P 9 0 512"];
    let reads: Vec<&str> = reads.iter().flat_map(|command| ["-c", command]).collect();
    let said = run("qemu-io", &[&["-f", "raw", &uri], &reads[..]].concat());
    assert!(!said.contains("failed"), "{said}");
    let mut found = [0; 512];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == [9; 512]);
    // It dies, and nobody waits for it.
    daemon.kill();
    assert!(disk.read_at(&mut found, 0).is_err());
    assert!(disk.flush().is_err());
}

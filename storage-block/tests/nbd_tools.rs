//! The server with the tools of others: libnbd's, QEMU's and fio, on volumes and snapshots.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::path::Path;

use storage_block::{MemoryDisk, RawFile, Snapshot, Store, Volume, nbd};

mod tools;
use tools::{have, image, run, skip};

#[test]
fn libnbd_tools() {
    if !have(&["nbdinfo", "nbdcopy"]) {
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
    if !have(&["qemu-img", "qemu-io"]) {
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
    if !have(&["fio"]) {
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

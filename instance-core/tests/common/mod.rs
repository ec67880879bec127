//! What the tests of bad input share: a region compared with itself before and after.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod cable;
pub(crate) mod failing;
pub(crate) mod slow;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{DirectBoot, Error, ErrorKind, ImageSource, Instance, LaunchSpec, Region, Result};
use storage_block::{Disk, MemoryDisk, RawFile};

pub(crate) type TestRegion = Region<FakeHypervisor>;

pub(crate) fn open(dir: &Path) -> TestRegion {
    try_open(dir).unwrap_or_else(|e| panic!("{}", told(&e)))
}

pub(crate) fn try_open(dir: &Path) -> Result<TestRegion> {
    Region::open(dir, FakeHypervisor::new())
}

/// Registers a disk of these bytes, with a kernel beside it and a second disk that outlives the
/// instance.
pub(crate) fn register(region: &TestRegion, name: &str, disk: &Disk) -> Result<Ami<X86_64>> {
    let source = ImageSource::new(disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    let data = BlockDeviceMapping::blank("/dev/sdf", 1).delete_on_termination(false);
    region.register_image(Ami::<X86_64>::builder(name).block_device(data), source)
}

/// A disk of `mib` MiB that no store holds as anything less.
pub(crate) fn disk(mib: usize, seed: u64) -> Disk {
    let mut bytes = vec![0; mib << 20];
    let mut state = seed;
    for word in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&state.to_le_bytes());
    }
    MemoryDisk::from_vec(bytes).unwrap().into_disk()
}

pub(crate) fn launch(region: &TestRegion, ami: &Ami<X86_64>) -> Result<Instance> {
    region.launch(ami, LaunchSpec::new("t2.nano".parse().unwrap()))
}

/// A region with an image.
pub(crate) fn world() -> (tempfile::TempDir, TestRegion, Ami<X86_64>) {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    (dir, region, ami)
}

/// How long anything that is waited for may take, also on a busy host.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// When it is over.
pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Tells the guest a line, and gives what it answers after `prefix`.
pub(crate) fn ask(instance: &Instance, line: &str, prefix: &str) -> String {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(prefix, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
    String::from_utf8(reader.wait_for("\n", soon()).unwrap()).unwrap().trim().to_owned()
}

/// An error with all its causes.
pub(crate) fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Checks an error: its kind, its code, and what it says.
pub(crate) fn check(error: &Error, kind: ErrorKind, code: &str, says: &[&str]) {
    let text = told(error);
    assert_eq!((error.kind(), error.code()), (kind, code), "{text}");
    for part in says {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

/// The same of a call, for the rest of which its error speaks.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, code: &str) {
    check(&result.unwrap_err(), kind, code, &[]);
}

/// All that there is of a region: the digest of each file but that of the state store, and what the
/// state store holds.
pub(crate) fn everything(region: &TestRegion, dir: &Path) -> BTreeMap<String, String> {
    let mut found = files(dir);
    for image in region.images().unwrap() {
        found.insert(image.ami().id().to_string(), format!("{image:?}"));
    }
    for instance in region.instances() {
        found.insert(instance.id().to_string(), format!("{:?}", instance.describe()));
    }
    found
}

/// The files and empty directories below `dir`, by their names, with the digests of their bytes.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        let entries: Vec<PathBuf> = std::fs::read_dir(&next).unwrap().map(|e| e.unwrap().path()).collect();
        for path in entries {
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            if path.is_dir() {
                found.insert(name, String::new());
                open.push(path);
            } else if !["region.db", "region.journal", "ballast"].contains(&&*name) {
                found.insert(name, content(&path));
            }
        }
    }
    found
}

/// The length of a file and the digest of what in it is no hole.
fn content(path: &Path) -> String {
    let len = std::fs::metadata(path).unwrap().len();
    format!("{len} {}", Digest::of(&bytes(path)))
}

/// What in a file is no hole, with where it is.
pub(crate) fn bytes(path: &Path) -> Vec<u8> {
    if std::fs::metadata(path).unwrap().len() % 4096 != 0 {
        return std::fs::read(path).unwrap();
    }
    let disk = RawFile::open(path, true).unwrap().into_disk();
    let (mut bytes, mut at) = (Vec::new(), 0);
    while let Some(data) = disk.next_data(at).unwrap() {
        let mut part = vec![0; (data.end - data.start) as usize];
        disk.read_at(&mut part, data.start).unwrap();
        bytes.extend(data.start.to_le_bytes());
        bytes.extend(part);
        at = data.end;
    }
    bytes
}

/// Says, where a test cannot be done, why; where everything has to be there, that is a failure.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}, and CI needs it");
    eprintln!("SKIPPED: {why}");
}

/// An ext4 file system of 8 MiB with these files.
pub(crate) fn ext4(files: &[(&str, &[u8])]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    for (name, bytes) in files {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let mib = 8 + files.iter().map(|(_, bytes)| bytes.len() >> 20).sum::<usize>();
    let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, &image])
        .arg(format!("{mib}M"))
        .env("PATH", path)
        .output();
    match made {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => {
            skip(&format!("mke2fs cannot be run: {e}"));
            return None;
        }
    }
    Some(std::fs::read(&image).unwrap())
}

//! A region on the fake machine, with an image of one disk.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::Path;
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{DirectBoot, ImageSource, Instance, LaunchSpec, Region, Result};
use storage_block::{Disk, MemoryDisk};

pub(crate) type TestRegion = Region<FakeHypervisor>;

pub(crate) fn open(dir: &Path) -> TestRegion {
    Region::open(dir, FakeHypervisor::new()).unwrap()
}

pub(crate) fn disk() -> Disk {
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    disk.write_at(b"class", 0).unwrap();
    disk
}

pub(crate) fn try_register(region: &TestRegion, name: &str) -> Result<Ami<X86_64>> {
    let disk = disk();
    let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    region.register_image(Ami::<X86_64>::builder(name), source)
}

pub(crate) fn register(region: &TestRegion) -> Ami<X86_64> {
    try_register(region, "base").unwrap()
}

pub(crate) fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// How long anything that is waited for may take, also on a busy host.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// When it is over.
pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Tells the guest something and waits for the answer.
pub(crate) fn ask(instance: &Instance, line: &str, answer: &str) {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
}

/// Every file below a directory, but for those that are there for ever.
pub(crate) fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path.display().to_string()),
        }
    }
    found.sort();
    found
}

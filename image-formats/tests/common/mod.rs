//! What the tests share: a disk with all kinds of content, and QEMU's tool.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use image_formats::Progress;
use storage_block::{Disk, MemoryDisk, RawFile};

pub(crate) const KIB: usize = 1 << 10;
pub(crate) const MIB: usize = 1 << 20;

/// Whether `qemu-img` is there; a test that cannot run says so, and fails under CI.
pub(crate) fn have_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        let why = "qemu-img is not installed; nothing is compared with it";
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("SKIPPED: {why}");
    }
    found
}

/// A file system of a fixed size, unmounted at the end.
pub(crate) struct Small(pub(crate) tempfile::TempDir);

impl Small {
    pub(crate) fn mount(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let option = format!("size={bytes}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir.path()).status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(Self(dir));
        }
        let why = "a small file system cannot be mounted; full disks are not tested";
        assert!(std::env::var_os("CI").is_none(), "{why}, and CI needs it");
        eprintln!("SKIPPED: {why}");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).join("");
    assert!(output.status.success(), "qemu-img {args:?} failed: {text}");
    text
}

/// A disk with text, noise, holes and lone bytes, the last of them at its end.
pub(crate) fn content(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut seed = 7u32;
    let mut noise = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    let text = b"a page of a book that nobody reads twice, and ".iter().cycle();
    for (at, part) in bytes.chunks_mut(48 * KIB).enumerate() {
        match at % 7 {
            0 | 4 => part.iter_mut().zip(text.clone()).for_each(|(byte, letter)| *byte = *letter),
            1 => part.iter_mut().for_each(|byte| *byte = noise()),
            2 => part.iter_mut().step_by(9).for_each(|byte| *byte = noise()),
            3 => part[part.len() / 2] = at as u8 | 1,
            _ => {}
        }
    }
    // A hole that is one in whatever clusters.
    if size > 8 * MIB {
        bytes[2 * MIB..6 * MIB].fill(0);
    }
    if let Some(last) = bytes.last_mut() {
        *last = 0xa5;
    }
    bytes
}

pub(crate) fn disk(bytes: &[u8]) -> Disk {
    MemoryDisk::from_vec(bytes.to_vec()).unwrap().into_disk()
}

/// A raw file with these bytes, sparse.
pub(crate) fn raw_file(path: &Path, bytes: &[u8]) {
    let raw = RawFile::create(path, bytes.len() as u64).unwrap().into_disk();
    for (part, at) in bytes.chunks(4 * KIB).zip((0..).step_by(4 * KIB)) {
        if part.iter().any(|byte| *byte != 0) {
            raw.write_at(part, at).unwrap();
        }
    }
}

/// Checks what the contract of a backend says of one that can only be read; `what` it is of is said where it is not so.
pub(crate) fn check(disk: &Disk, expected: &[u8], what: &str) {
    eprintln!("the disk of {what}");
    storage_block::testing::read_only(disk, expected);
}

/// How much of the disk is not known to be a hole.
pub(crate) fn data(disk: &Disk) -> u64 {
    let (mut at, mut found) = (0, 0);
    while let Some(range) = disk.next_data(at).unwrap() {
        found += range.end - range.start;
        at = range.end;
    }
    found
}

pub(crate) fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

//! Images made with the tools that make real ones.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "this is test code, outside of a test function")]

use std::io::{Cursor, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use gpt::disk::LogicalBlockSize;
use gpt::partition_types::Type;
use storage_block::{Disk, MemoryDisk};

pub(crate) const MIB: usize = 1 << 20;

/// Whether a tool is there. A machine that tests for others must have it.
pub(crate) fn have(tool: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').chain(["/sbin", "/usr/sbin"]).any(|dir| Path::new(dir).join(tool).exists());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{tool} is not installed, and CI needs it");
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Runs a tool of e2fsprogs and returns what it prints.
pub(crate) fn e2fs(tool: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(tool).args(arguments).env("PATH", path).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    // e2fsck says 1 when it has changed something.
    assert!(output.status.code() <= Some(1), "{tool} {arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Passes bytes through a command.
pub(crate) fn filter(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

/// A file: its path and content. A content of `-> target` makes a symbolic link.
pub(crate) type Files<'a> = &'a [(&'a str, &'a [u8])];

/// An ext4 file system of `size` bytes that holds `files`.
pub(crate) fn ext4(files: Files<'_>, size: usize, options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    for (path, content) in files {
        let path = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix(b"-> ") {
            Some(target) => std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), path).unwrap(),
            None => std::fs::write(path, content).unwrap(),
        }
    }
    let image = directory.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(size as u64).unwrap();
    let (root, image) = (root.to_str().unwrap(), image.to_str().unwrap());
    let seed = [
        "-U",
        "01234567-89ab-cdef-0123-456789abcdef",
        "-E",
        "hash_seed=01234567-89ab-cdef-0123-456789abcdef",
    ];
    let arguments = [&["-q", "-t", "ext4", "-d", root], &seed[..], options, &[image]].concat();
    e2fs("mke2fs", &arguments);
    std::fs::read(image).unwrap()
}

/// A partition: its type and its bytes.
pub(crate) type Partition<'a> = (Type, &'a [u8]);

/// A disk with a GUID partition table that holds these partitions, and their ids.
pub(crate) fn gpt(partitions: &[Partition<'_>]) -> (Vec<u8>, Vec<String>) {
    let size = 2 * MIB + partitions.iter().map(|(_, bytes)| bytes.len() + MIB).sum::<usize>();
    let mut device = Cursor::new(vec![0; size]);
    gpt::mbr::ProtectiveMBR::with_lb_size((size / 512 - 1) as u32).overwrite_lba0(&mut device).unwrap();
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(device, None)
        .unwrap();
    let mut places = Vec::new();
    for (kind, bytes) in partitions {
        let number = table.add_partition("test", bytes.len() as u64, kind.clone(), 0, Some(2048)).unwrap();
        let partition = &table.partitions()[&number];
        places.push((partition.first_lba as usize * 512, partition.part_guid.to_string()));
    }
    let mut disk = table.write().unwrap().into_inner();
    let mut ids = Vec::new();
    for ((start, id), (_, bytes)) in places.into_iter().zip(partitions) {
        disk[start..start + bytes.len()].copy_from_slice(bytes);
        ids.push(id);
    }
    (disk, ids)
}

pub(crate) fn disk(mut bytes: Vec<u8>) -> Disk {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    MemoryDisk::from_vec(bytes).unwrap().into_disk()
}

/// An ELF header for a machine, and some bytes that differ with `salt`.
pub(crate) fn elf(machine: u16, salt: u8) -> Vec<u8> {
    let class = if machine == 3 { 1 } else { 2 };
    let mut bytes = vec![0; 64];
    bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1, 1, 0]);
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    let mut x = u32::from(salt) + 1;
    bytes.extend((0..200_000).map(|i| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if i % 7 == 0 { (x >> 24) as u8 } else { b'a' }
    }));
    bytes
}

/// An ARM64 `Image`.
pub(crate) fn arm64_image() -> Vec<u8> {
    let mut bytes = elf(183, 1);
    bytes[..4].copy_from_slice(b"MZ\0\0");
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

/// A bzImage around a payload.
pub(crate) fn bzimage(payload: &[u8], version: u16, is_64_bit: bool) -> Vec<u8> {
    let mut bytes = vec![0; 3 * 512];
    bytes[0x1f1] = 2;
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&version.to_le_bytes());
    bytes[0x236] = u8::from(is_64_bit);
    bytes[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
    bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend([0x90; 100]);
    bytes.extend(payload);
    bytes.extend([0; 20]);
    bytes
}

/// `content` as the kernel's build packs it, with the size it appends.
pub(crate) fn pack(command: &[&str], content: &[u8]) -> Vec<u8> {
    let mut packed = filter(command, content);
    if command[0] != "gzip" {
        packed.extend((content.len() as u32).to_le_bytes());
    }
    packed
}

/// A kernel for x86_64, told apart by `salt`.
pub(crate) fn kernel(salt: u8) -> Vec<u8> {
    bzimage(&pack(&["gzip", "-n"], &elf(62, salt)), 0x20f, true)
}

/// A small generator for tests that repeat.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

//! Disks that lie. Each must be answered, with an entry or an error, in bounded time and memory.
#![allow(clippy::unwrap_used, reason = "this is test code, outside of a test function")]

mod common;

use std::time::{Duration, Instant};

use boot_image::{BootEntry, ErrorKind};
use common::{Files, MIB, Random, disk, e2fs, elf, ext4, gpt, have};
use gpt::partition_types as types;
use storage_block::Disk;

const GRUB: &[u8] = b"menuentry x { linux /boot/vmlinuz-6 ro; initrd /boot/initrd.img-6 }";
const ENTRY: &[u8] = b"title x\nlinux /boot/vmlinuz-6\ninitrd /boot/initrd.img-6\noptions ro\n";

/// No answer takes this long, even on a busy machine in a debug build.
const LONG: Duration = Duration::from_secs(60);

fn files(kernel: &[u8]) -> Vec<(&str, &[u8])> {
    vec![
        ("boot/vmlinuz-6", kernel),
        ("boot/initrd.img-6", b"initrd"),
        ("boot/grub/grub.cfg", GRUB),
        ("boot/loader/entries/x.conf", ENTRY),
        ("vmlinuz", b"-> boot/vmlinuz-6"),
    ]
}

/// A small image: with metadata checksums, it says less wrong; without, more is believed.
fn image(options: &[&str]) -> Vec<u8> {
    let kernel = elf(62, 1);
    ext4(&files(&kernel[..5000]), 2 * MIB, &[&["-b", "1024", "-N", "64"], options].concat())
}

fn answered(disk: &Disk, what: impl Fn() -> String) {
    let start = Instant::now();
    if let Err(e) = BootEntry::find(disk) {
        assert!(!e.to_string().is_empty());
    }
    assert!(start.elapsed() < LONG, "{} took {:?}", what(), start.elapsed());
}

#[test]
fn truncated_anywhere() {
    if !have("mke2fs") {
        return;
    }
    let (bytes, _) = gpt(&[(types::LINUX_FS, &image(&[]))]);
    for len in (0..bytes.len()).step_by(512 * 37).chain((0..64 * 512).step_by(512)) {
        answered(&disk(bytes[..len].to_vec()), || format!("cut at {len}"));
        let mut zeroed = bytes.clone();
        zeroed[len..].fill(0);
        answered(&disk(zeroed), || format!("zeroed from {len}"));
    }
}

#[test]
fn flipped_anywhere() {
    if !have("mke2fs") {
        return;
    }
    let mut random = Random(0x5eed_0002);
    for options in [&["-O", "^metadata_csum"][..], &["-O", "^metadata_csum,^extent,^64bit"], &[]] {
        let (bytes, _) = gpt(&[(types::LINUX_FS, &image(options))]);
        // What is zero is mostly free space; the flips are where something is.
        let used: Vec<usize> = (0..bytes.len()).filter(|i| bytes[*i] != 0).collect();
        let metadata: Vec<usize> =
            used.iter().copied().filter(|i| (1_049_600..1_049_600 + 100 * 1024).contains(i)).collect();
        let disk = disk(bytes.clone());
        for round in 0..1500 {
            let mut changed = Vec::new();
            for _ in 0..=random.below(6) {
                let places = if random.below(4) == 0 { &used } else { &metadata };
                let at = places[random.below(places.len())] + random.below(4);
                let byte = match random.below(3) {
                    0 => bytes[at] ^ 1 << random.below(8),
                    1 => 0xff,
                    _ => random.below(256) as u8,
                };
                disk.write_at(&[byte], at as u64).unwrap();
                changed.push(at);
            }
            answered(&disk, || format!("{options:?} {round}: {changed:?}"));
            for at in changed {
                disk.write_at(&bytes[at..=at], at as u64).unwrap();
            }
        }
    }
}

#[test]
fn every_field_of_the_superblock_at_its_extremes() {
    if !have("mke2fs") {
        return;
    }
    for options in [&["-O", "^metadata_csum"][..], &["-O", "^metadata_csum,^64bit"]] {
        let bytes = image(options);
        let disk = disk(bytes.clone());
        for field in (1024..1024 + 0x300).step_by(4) {
            for value in [
                0,
                1,
                6,
                7,
                21,
                31,
                0x7fff_ffff,
                0x8000_0000,
                u32::MAX,
                0x0004_0004,
                0xffff_0000,
                0x0000_ffff,
            ] {
                disk.write_at(&u32::to_le_bytes(value), field).unwrap();
                answered(&disk, || format!("{value:#x} at {:#x}", field - 1024));
            }
            disk.write_at(&bytes[field as usize..field as usize + 4], field).unwrap();
        }
    }
}

#[test]
fn partition_tables_that_lie() {
    if !have("mke2fs") {
        return;
    }
    let (bytes, _) = gpt(&[(types::LINUX_FS, &image(&[]))]);
    // An offset in the header or in the first entry, what is written there, and the answer.
    for (in_entry, offset, value, kind) in [
        (false, 84, &u32::to_le_bytes(129)[..], Some(ErrorKind::Unsupported)),
        (false, 84, &[0; 4], Some(ErrorKind::Unsupported)),
        (false, 80, &u32::MAX.to_le_bytes(), Some(ErrorKind::Unsupported)),
        (false, 80, &[0; 4], Some(ErrorKind::NoPartition)),
        (false, 72, &u64::MAX.to_le_bytes(), Some(ErrorKind::Corrupt)),
        (false, 72, &(u64::MAX / 512).to_le_bytes(), Some(ErrorKind::Corrupt)),
        (true, 32, &u64::MAX.to_le_bytes(), Some(ErrorKind::NoPartition)),
        (true, 40, &[0; 8], Some(ErrorKind::NoPartition)),
        (true, 40, &u64::MAX.to_le_bytes(), Some(ErrorKind::NoPartition)),
        (true, 40, &(1u64 << 50).to_le_bytes(), None),
        (true, 40, &2060u64.to_le_bytes(), Some(ErrorKind::Corrupt)),
        (true, 32, &(1u64 << 40).to_le_bytes(), Some(ErrorKind::NoPartition)),
    ] {
        let mut bytes = bytes.clone();
        let at = offset + if in_entry { 1024 } else { 512 };
        bytes[at..at + value.len()].copy_from_slice(value);
        believe_table(&mut bytes);
        let found = BootEntry::find(&disk(bytes)).map(|_| ()).map_err(|e| e.kind());
        assert_eq!(found, kind.map_or(Ok(()), Err), "{value:x?} at {offset}, in an entry: {in_entry}");
    }
}

/// Right checksums, so that what lies behind them is believed; no backup to fall back to.
fn believe_table(bytes: &mut [u8]) {
    let count = u32::from_le_bytes(bytes[592..596].try_into().unwrap()).min(128) as usize;
    let table = crc32(&bytes[1024..1024 + count * 128]);
    bytes[600..604].copy_from_slice(&table.to_le_bytes());
    bytes[528..532].fill(0);
    let header = crc32(&bytes[512..604]);
    bytes[528..532].copy_from_slice(&header.to_le_bytes());
    let end = bytes.len();
    bytes[end - 512..].fill(0);
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// An ext4 file system in which single fields are changed.
struct Ext4 {
    bytes: Vec<u8>,
    file: tempfile::NamedTempFile,
}

impl Ext4 {
    fn new(files: Files<'_>, options: &[&str]) -> Self {
        let bytes = ext4(files, 8 * MIB, &[&["-O", "^metadata_csum"], options].concat());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        Self { bytes, file }
    }

    fn debugfs(&self, request: &str) -> String {
        e2fs("debugfs", &["-R", request, self.file.path().to_str().unwrap()])
    }

    fn block_size(&self) -> usize {
        1024 << self.bytes[1024 + 0x18]
    }

    /// Where the inode of a path lies.
    fn inode(&self, path: &str) -> usize {
        // "Inode 12 is part of block group 0\n\tlocated at block 35, offset 0x0b00"
        let text = self.debugfs(&format!("imap {path}"));
        let (_, at) = text.split_once("located at block ").unwrap();
        let (block, offset) = at.trim().split_once(", offset 0x").unwrap();
        block.parse::<usize>().unwrap() * self.block_size()
            + usize::from_str_radix(offset.trim(), 16).unwrap()
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn set_size(&mut self, inode: usize, size: u64) {
        self.set(inode + 4, &(size as u32).to_le_bytes());
        self.set(inode + 0x6c, &((size >> 32) as u32).to_le_bytes());
    }

    /// Writes an extent node: a header, and children or extents that are all the same.
    fn set_extents(&mut self, at: usize, depth: u16, entries: u16, entry: [u8; 12]) {
        let header: Vec<u8> =
            [0xf30a, entries, entries, depth, 0, 0].iter().flat_map(|x: &u16| x.to_le_bytes()).collect();
        self.set(at, &header);
        for i in 1..=usize::from(entries) {
            self.set(at + i * 12, &entry);
        }
    }

    fn check(&self, what: &str, kind: ErrorKind, text: &str) {
        let start = Instant::now();
        let error =
            BootEntry::find(&disk(self.bytes.clone())).map(|found| found.kernel_path).expect_err(what);
        assert!(start.elapsed() < LONG, "{what} took {:?}", start.elapsed());
        assert_eq!(error.kind(), kind, "{what}: {error}: {error:?}");
        assert!(format!("{error} {error:?}").contains(text), "{what}: {error}: {error:?}");
    }
}

fn child(block: usize) -> [u8; 12] {
    let mut entry = [0; 12];
    entry[4..8].copy_from_slice(&(block as u32).to_le_bytes());
    entry
}

#[test]
fn sizes_that_lie() {
    if !have("mke2fs") {
        return;
    }
    let kernel = elf(62, 1);
    let files: Files<'_> = &[("boot/vmlinuz-6", &kernel), ("boot/vmlinuz", b"-> vmlinuz-6")];
    for size in [u64::MAX, 1 << 44, 1 << 43, 1 << 40, 1 << 30] {
        let mut fs = Ext4::new(files, &["-b", "4096"]);
        fs.set_size(fs.inode("/boot/vmlinuz-6"), size);
        // The reader itself refuses a file of 2^32 blocks and more.
        let kind = if size >= 1 << 44 { ErrorKind::Corrupt } else { ErrorKind::TooLarge };
        fs.check("a file", kind, "vmlinuz-6");

        let mut fs = Ext4::new(files, &["-b", "4096"]);
        fs.set_size(fs.inode("/boot"), size);
        fs.check("a directory", kind, "/boot");

        let mut fs = Ext4::new(files, &["-b", "4096"]);
        fs.set_size(fs.inode("/boot/vmlinuz"), size);
        fs.check("a link", ErrorKind::Corrupt, "/boot/vmlinuz");
    }
}

#[test]
fn links_in_a_circle() {
    if !have("mke2fs") {
        return;
    }
    for (a, b) in [("-> b", "-> vmlinuz"), ("-> /vmlinuz", "-> x"), ("-> vmlinuz/../vmlinuz/x", "-> x")] {
        let fs = Ext4::new(&[("vmlinuz", a.as_bytes()), ("b", b.as_bytes())], &[]);
        fs.check(a, ErrorKind::Corrupt, "one too many");
    }
}

#[test]
fn extent_trees_that_branch() {
    if !have("mke2fs") {
        return;
    }
    let kernel = elf(62, 1);
    let fs = Ext4::new(&[("boot/vmlinuz-6", &kernel)], &["-b", "4096"]);
    let inode = fs.inode("/boot/vmlinuz-6");
    let last = fs.bytes.len() / 4096 - 1;
    // Each node's 340 children are the same node, one level below: 4 * 340^depth visits.
    for depth in 1..=5u16 {
        let mut fs = Ext4 { bytes: fs.bytes.clone(), file: tempfile::NamedTempFile::new().unwrap() };
        fs.set_extents(inode + 0x28, depth, 4, child(last));
        for level in 1..=depth {
            let block = last + 1 - usize::from(level);
            // The leaves' extents have no blocks, so that there is always a next one.
            fs.set_extents(
                block * 4096,
                depth - level,
                340,
                if level == depth { [0; 12] } else { child(block - 1) },
            );
        }
        let start = Instant::now();
        let error = BootEntry::find(&disk(fs.bytes)).unwrap_err();
        assert!(start.elapsed() < LONG, "depth {depth} took {:?}", start.elapsed());
        let deep = format!("{error:?}").contains("an extent tree is too deep");
        assert_eq!(deep, depth > 2, "depth {depth}: {error}: {error:?}");
    }
}

/// A directory with a block of names behind many leaves that have none, all of which are gone through for each
/// name that is looked up.
#[test]
fn leaves_with_nothing_in_them() {
    if !have("mke2fs") {
        return;
    }
    let kernel = elf(62, 1);
    let fs = Ext4::new(&[("boot/vmlinuz-6", &kernel)], &["-b", "4096"]);
    let inode = fs.inode("/boot");
    let names = fs.debugfs("blocks /boot").split_whitespace().next().unwrap().parse().unwrap();
    let last = fs.bytes.len() / 4096 - 1;
    let mut one_block = [0; 12];
    one_block[4] = 1;
    one_block[8..].copy_from_slice(&u32::to_le_bytes(names));
    for in_leaf in [340, 0, 1] {
        let mut fs = Ext4 { bytes: fs.bytes.clone(), file: tempfile::NamedTempFile::new().unwrap() };
        // The root's last child leads to the names, the others to what has none.
        fs.set_extents(inode + 0x28, 2, 4, child(last));
        fs.set(inode + 0x28 + 48, &child(last - 2));
        fs.set_extents(last * 4096, 1, 340, child(last - 1));
        fs.set_extents((last - 2) * 4096, 1, 1, child(last - 3));
        fs.set_extents((last - 3) * 4096, 0, 1, one_block);
        let extent = if in_leaf == 1 { one_block } else { [0; 12] };
        fs.set_extents((last - 1) * 4096, 0, in_leaf, extent);
        fs.set((last - 1) * 4096 + 4, &340u16.to_le_bytes());
        if in_leaf == 1 {
            answered(&disk(fs.bytes), || "one block in each leaf".to_owned());
        } else {
            fs.check(&format!("{in_leaf} extents"), ErrorKind::Unsupported, "a leaf with nothing in it");
        }
    }
}

#[test]
fn hash_trees_that_lie() {
    if !have("mke2fs") || !have("e2fsck") {
        return;
    }
    let kernel = elf(62, 1);
    let names: Vec<String> = (0..600).map(|i| format!("boot/file-with-a-long-name-{i}")).collect();
    let mut files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
    files.push(("boot/vmlinuz-6", &kernel));
    // With metadata checksums: those of hash trees are where the reader trusts the count.
    let bytes = ext4(&files, 8 * MIB, &["-b", "1024", "-N", "1024"]);
    let mut fs = Ext4 { bytes, file: tempfile::NamedTempFile::new().unwrap() };
    std::fs::write(fs.file.path(), &fs.bytes).unwrap();
    e2fs("e2fsck", &["-fyD", fs.file.path().to_str().unwrap()]);
    fs.bytes = std::fs::read(fs.file.path()).unwrap();
    assert!(fs.debugfs("htree_dump /boot").contains("Root node dump"), "/boot has no hash tree");
    let first = fs.debugfs("blocks /boot").split_whitespace().next().unwrap().parse::<usize>().unwrap();
    assert!(BootEntry::find(&disk(fs.bytes.clone())).unwrap().kernel == kernel);

    let root = first * 1024;
    let good = fs.bytes.clone();
    // The root's hash version, depth, limit, count and first child.
    for (offset, value) in [
        (0x1c, &[9][..]),
        (0x1e, &[255]),
        (0x20, &[0xff; 2]),
        (0x22, &[0xff; 2]),
        (0x22, &[0; 2]),
        (0x22, &125u16.to_le_bytes()),
        (0x24, &[0xff; 4]),
        (0x20, &[0xff; 992]),
        (0, &[0; 1024]),
        (0, &[0xff; 1024]),
    ] {
        fs.bytes.clone_from(&good);
        fs.set(root + offset, value);
        answered(&disk(fs.bytes.clone()), || format!("{value:x?} at {offset:#x}"));
    }
}

#[test]
fn journals_that_lie() {
    if !have("mke2fs") {
        return;
    }
    let kernel = elf(62, 1);
    let fs = Ext4::new(&[("boot/vmlinuz-6", &kernel)], &["-b", "4096"]);
    let journal = fs.inode("<8>");
    let needs_recovery = |fs: &mut Ext4| {
        let features = fs.bytes[1024 + 0x60];
        fs.set(1024 + 0x60, &[features | 4]);
    };
    let mut large = Ext4 { bytes: fs.bytes.clone(), file: tempfile::NamedTempFile::new().unwrap() };
    needs_recovery(&mut large);
    large.set_size(journal, 1 << 43);
    large.check("a journal of 8 TiB", ErrorKind::TooLarge, "journal");

    for inode in [0, u32::MAX] {
        let mut nowhere = Ext4 { bytes: fs.bytes.clone(), file: tempfile::NamedTempFile::new().unwrap() };
        needs_recovery(&mut nowhere);
        nowhere.set(1024 + 0xe0, &inode.to_le_bytes());
        nowhere.check("a journal that is nowhere", ErrorKind::Corrupt, "");
    }
}

/// Links that lead to one another by the longest ways.
fn long_links() -> Vec<(String, Vec<u8>)> {
    const LINKS: usize = 38;
    let link = |n| {
        let end = if n + 1 == LINKS { "vmlinuz-6".to_owned() } else { format!("link{}", n + 1) };
        let way = "d/../".repeat((4000 - end.len()) / 5);
        (format!("boot/link{n}"), format!("-> {way}{end}").into_bytes())
    };
    (0..LINKS).map(link).collect()
}

/// An ext4 file system with a kernel, `boot/d`, and these files.
fn slow(more: &[(String, Vec<u8>)], megabytes: usize) -> Vec<u8> {
    let kernel = elf(62, 1);
    let mut files: Vec<(&str, &[u8])> = vec![("boot/vmlinuz-6", &kernel[..5000]), ("boot/d/x", b"x")];
    files.extend(more.iter().map(|(path, content)| (path.as_str(), content.as_slice())));
    ext4(&files, megabytes * MIB, &["-b", "4096", "-N", "8192", "-O", "^dir_index"])
}

/// Refused as too much, soon, and with these words.
fn too_much(disk: &[u8], what: &str, says: &str) {
    let start = Instant::now();
    let refused = BootEntry::find(&common::disk(disk.to_vec())).expect_err(what);
    let took = start.elapsed();
    assert_eq!(refused.kind(), ErrorKind::TooLarge, "{what}: {refused}");
    assert!(refused.to_string().contains(says), "{what}: {refused}");
    println!("{what}: {took:?}");
    assert!(took < LONG / 2, "{what} took {took:?}");
}

const TOO_MUCH_WORK: &str = "too many or too large";

/// Configurations that name the same slow path many times, in a line, in many lines and in many files.
#[test]
fn paths_that_only_cost_time() {
    if !have("mke2fs") {
        return;
    }
    let names = |count: usize, before: &str| format!("{before}/boot/link0").repeat(count);
    let loader = |count, before| format!("linux /boot/vmlinuz-6\ninitrd {}\n", names(count, before));
    let grub = |count| format!("menuentry x {{ linux /boot/vmlinuz-6\ninitrd {}\n}}", names(count, " "));
    let (entry, config) = ("boot/loader/entries/x.conf", "boot/grub/grub.cfg");
    for (path, text, says) in [
        (entry, loader(5000, " "), "more than 64"),
        (entry, loader(2000, "\ninitrd "), "more than 64"),
        (config, grub(5000), "more than 64"),
        (entry, loader(64, " "), TOO_MUCH_WORK),
        (config, grub(64), TOO_MUCH_WORK),
    ] {
        let mut files = long_links();
        files.push((path.to_owned(), text.into_bytes()));
        let (disk, _) = gpt(&[(types::LINUX_FS, &slow(&files, 16))]);
        too_much(&disk, &format!("{path} of {} bytes", files.last().unwrap().1.len()), says);
    }
    // Each of them names the path once and then a file that is not there.
    let mut files = long_links();
    let text = b"linux /boot/link0\ninitrd /gone";
    files.extend((0..256).map(|n| (format!("boot/loader/entries/{n}.conf"), text.to_vec())));
    too_much(&gpt(&[(types::LINUX_FS, &slow(&files, 16))]).0, "256 entries", TOO_MUCH_WORK);
}

/// A directory that is gone through for each name on a path through it.
#[test]
fn directories_that_only_cost_time() {
    if !have("mke2fs") {
        return;
    }
    // What the links lead through lies behind all of these.
    let mut files: Vec<(String, Vec<u8>)> =
        (0..3800).map(|n| (format!("boot/{n:0>250}"), Vec::new())).collect();
    files.extend(long_links());
    let text = b"linux /boot/link0\ninitrd /gone".to_vec();
    files.push(("boot/loader/entries/x.conf".to_owned(), text));
    too_much(&gpt(&[(types::LINUX_FS, &slow(&files, 32))]).0, "a directory of 1 MiB", TOO_MUCH_WORK);
}

/// Partitions that all are the same file system, whose configurations name no kernel.
#[test]
fn partitions_that_only_cost_time() {
    if !have("mke2fs") {
        return;
    }
    let text = format!("title x\n{}", "options a\n".repeat(6000)).into_bytes();
    let files: Vec<(String, Vec<u8>)> =
        (0..200).map(|n| (format!("boot/loader/entries/{n}.conf"), text.clone())).collect();
    let (mut disk, _) = gpt(&[(types::LINUX_FS, &slow(&files, 32))]);
    let entry: Vec<u8> = disk[1024..1024 + 128].to_vec();
    for n in 1..128 {
        disk[1024 + n * 128..][..128].copy_from_slice(&entry);
        disk[1024 + n * 128 + 16] = n as u8;
    }
    believe_table(&mut disk);
    too_much(&disk, "128 partitions", TOO_MUCH_WORK);
}

/// Not hostile at all: a file system that was mounted a moment ago, and has written nothing yet.
#[test]
fn a_journal_that_holds_nothing_is_no_obstacle() {
    if !have("mke2fs") {
        return;
    }
    let kernel = elf(62, 1);
    for options in [&["-b", "4096"][..], &["-b", "1024", "-O", "^extent,^64bit"]] {
        let mut bytes = ext4(&files(&kernel), 24 * MIB, options);
        assert_ne!(bytes[1024 + 0x5c] & 4, 0, "it has a journal");
        bytes[1024 + 0x60] |= 4;
        if bytes[1024 + 0x65] & 4 != 0 {
            // The checksum of a superblock that was changed.
            let sum = !crc32c::crc32c(&bytes[1024..1024 + 0x3fc]);
            bytes[1024 + 0x3fc..2048].copy_from_slice(&sum.to_le_bytes());
        }
        let found = BootEntry::find(&disk(gpt(&[(types::LINUX_FS, &bytes)]).0));
        assert_eq!(found.unwrap().initrd.as_deref(), Some(&b"initrd"[..]), "{options:?}");
    }
}

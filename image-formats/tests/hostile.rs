//! Images that nobody should trust are refused, each for what is wrong with it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;

use common::{KIB, MIB, content, disk, go_on};
use image_formats::{Compression, ErrorKind, ExportOptions, Format, OpenOptions, export, open};
use storage_block::Disk;

type Patch<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));

/// Exports a disk of 256 KiB, without a hole.
fn image(options: &ExportOptions) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let bytes: Vec<u8> = content(256 * KIB).iter().map(|byte| byte | 1).collect();
    export(&disk(&bytes), &path, options, &mut go_on).unwrap();
    std::fs::read(path).unwrap()
}

/// Opens an image and reads everything in it.
fn read(path: &Path, format: Format) -> Result<(), ErrorKind> {
    let disk = open(path, format).map_err(|e| e.kind())?;
    read_all(&disk)
}

fn read_all(disk: &Disk) -> Result<(), ErrorKind> {
    let mut at = 0;
    let unreadable = |e: storage_block::Error| {
        assert_eq!(e.kind(), storage_block::ErrorKind::Corrupt, "{e}");
        ErrorKind::Corrupt
    };
    while let Some(found) = disk.next_data(at).map_err(unreadable)? {
        let mut buf = vec![0; (found.end - found.start).min(16 << 20) as usize];
        disk.read_at(&mut buf, found.start).map_err(unreadable)?;
        at = found.end;
    }
    Ok(())
}

fn check(image: &[u8], format: Format, expected: ErrorKind, patches: &[Patch<'_>]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, image).unwrap();
    assert_eq!(read(&path, format), Ok(()), "unpatched, it is good");
    for (what, patch) in patches {
        let mut patched = image.to_vec();
        patch(&mut patched);
        assert!(patched != image, "{what}: nothing was patched");
        std::fs::write(&path, &patched).unwrap();
        assert_eq!(read(&path, format), Err(expected), "{what}");
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

const CLUSTER: usize = 64 * KIB;

fn plain() -> ExportOptions {
    ExportOptions::new(Format::Qcow2)
}

#[test]
fn qcow2_headers() {
    let image = image(&plain());
    // A header extension, right after the header.
    let extension = |kind: u32, name: &'static [u8]| {
        move |b: &mut Vec<u8>| {
            put(b, 112, &kind.to_be_bytes());
            put(b, 116, &(name.len() as u32).to_be_bytes());
            put(b, 120, name);
        }
    };
    let backing = |b: &mut Vec<u8>| {
        put(b, 8, &0x200u64.to_be_bytes());
        put(b, 16, &11u32.to_be_bytes());
        put(b, 0x200, b"/etc/shadow");
    };
    let data_file = |b: &mut Vec<u8>| {
        b[79] = 4;
        extension(0x4441_5441, b"/etc/shadow")(b);
    };
    check(
        &image,
        Format::Qcow2,
        ErrorKind::OtherFile,
        &[
            ("a backing file", &backing),
            ("a backing file without a name", &|b| b[15] = 1),
            ("a data file", &data_file),
            ("a data file without a name", &|b| b[79] = 4),
            ("the name of a data file without the feature", &extension(0x4441_5441, b"/etc/shadow")),
        ],
    );
    check(
        &image,
        Format::Qcow2,
        ErrorKind::Encrypted,
        &[
            ("AES", &|b| b[35] = 1),
            ("LUKS", &|b| b[35] = 2),
            ("a header for encryption", &extension(0x0537_be77, &[0; 16])),
        ],
    );
    check(
        &image,
        Format::Qcow2,
        ErrorKind::Unsupported,
        &[
            ("extended L2 entries", &|b| b[79] = 16),
            ("a feature of the future", &|b| b[72] = 1),
            ("another compression", &|b| (b[79], b[104]) = (8, 2)),
            ("a snapshot", &|b| b[63] = 1),
            ("four billion snapshots, beyond the end", &|b| put(b, 60, &[0xff; 12])),
            ("version 4", &|b| b[7] = 4),
            ("no bytes", &|b| put(b, 24, &[0; 8])),
        ],
    );
    check(
        &image,
        Format::Qcow2,
        ErrorKind::Corrupt,
        &[
            ("another magic number", &|b| b[0] = 0),
            ("marked as corrupt", &|b| b[79] = 2),
            ("a contradiction about compression", &|b| b[79] = 8),
            ("another one", &|b| b[104] = 1),
            ("clusters of 256 bytes", &|b| b[23] = 8),
            ("clusters of 4 MiB", &|b| b[23] = 22),
            ("clusters of 2^64 bytes", &|b| b[23] = 64),
            ("a short header", &|b| b[103] = 72),
            ("a header of an odd length", &|b| b[103] = 113),
            ("a header longer than its cluster", &|b| put(b, 100, &0x1_0008u32.to_be_bytes())),
            ("an extension of 4 GiB", &extension_of(u32::MAX)),
            ("refcounts of 128 bits", &|b| b[99] = 7),
            ("no L1 table", &|b| b[39] = 0),
            ("an L1 table at the header", &|b| put(b, 40, &[0; 8])),
            ("an L1 table that is not aligned", &|b| b[47] = 8),
            ("an L1 table beyond the end", &|b| b[40] = 0x10),
            ("an L1 table at the end of the world", &|b| put(b, 40, &(u64::MAX << 16).to_be_bytes())),
            ("a refcount table beyond the end", &|b| b[48] = 0x7f),
            ("cut in its header", &|b| b.truncate(71)),
            ("cut in what version 3 has", &|b| b.truncate(90)),
            ("cut in its L1 table", &|b| b.truncate(CLUSTER)),
            ("cut in its clusters", &|b| b.truncate(3 * CLUSTER)),
        ],
    );
    check(
        &image,
        Format::Qcow2,
        ErrorKind::TooLarge,
        &[
            ("a disk of 2^63 bytes", &|b| b[24] = 0x80),
            ("a refcount table of 256 TiB", &|b| put(b, 56, &[0xff; 4])),
        ],
    );
}

fn extension_of(len: u32) -> impl Fn(&mut Vec<u8>) {
    move |b| {
        put(b, 112, &1u32.to_be_bytes());
        put(b, 116, &len.to_be_bytes());
    }
}

/// The tables of a disk of any size are those of a file, or the disk is refused.
#[test]
fn qcow2_disks_that_are_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut bytes = image(&plain().cluster_size(512));
    put(&mut bytes, 24, &(1u64 << 60).to_be_bytes());
    put(&mut bytes, 36, &[0xff; 4]);
    std::fs::write(&path, &bytes).unwrap();
    // The file may be as large as it likes.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
    let kind = |size| OpenOptions::new().max_size(size).open(&path, Format::Qcow2).err().map(|e| e.kind());
    assert_eq!(kind(u64::MAX), Some(ErrorKind::TooLarge));
    assert_eq!(kind(1 << 40), Some(ErrorKind::TooLarge));
}

#[test]
fn qcow2_tables() {
    let image = image(&plain());
    let l1 = CLUSTER;
    let l2 = (be64(&image, l1) & !(1 << 63)) as usize;
    let [l1_offset, l2_offset, refcounts] = [l1 as u64, l2 as u64, be64(&image, 48)];
    let end = image.len() as u64;
    let set_l1 = |entry: u64| move |b: &mut Vec<u8>| put(b, l1, &entry.to_be_bytes());
    let set_l2 = |entry: u64| move |b: &mut Vec<u8>| put(b, l2 + 8, &entry.to_be_bytes());
    check(
        &image,
        Format::Qcow2,
        ErrorKind::Corrupt,
        &[
            ("an L2 table that is the L1 table", &set_l1(l1_offset)),
            ("an L2 table that is the refcount table", &set_l1(refcounts)),
            ("an L2 table that is not aligned", &set_l1(l2_offset + 512)),
            ("an L2 table in the header", &set_l1(512)),
            ("an L2 table at the end", &set_l1(end)),
            ("an L2 table at the end of the world", &set_l1(0x00ff_ffff_ffff_0000)),
            ("an L1 entry with bits that mean nothing", &set_l1(l2_offset | 1)),
            ("a cluster that is its L2 table", &set_l2(l2_offset)),
            ("a cluster that is the L1 table", &set_l2(l1_offset)),
            ("a cluster that is the refcount table", &set_l2(refcounts)),
            ("a cluster in the header", &set_l2(512)),
            ("a cluster that is not aligned", &set_l2(2 * l1_offset + 512)),
            ("a cluster at the end", &set_l2(end)),
            ("a cluster at the end of the world", &set_l2(0x00ff_ffff_ffff_0000)),
            ("an L2 entry with bits that mean nothing", &set_l2((2 * l1_offset) | 2)),
            ("a packed cluster in the header", &set_l2(1 << 62)),
            ("a packed cluster that is the L1 table", &set_l2(1 << 62 | l1_offset)),
            (
                "a packed cluster that reaches into its L2 table",
                &set_l2(1 << 62 | 1 << 54 | (l2_offset - 512)),
            ),
            ("a packed cluster at the end", &set_l2(1 << 62 | end)),
            ("a packed cluster that is longer than any", &set_l2((0x7fff << 47) | (2 * l1_offset))),
            ("a packed cluster that is none", &set_l2(1 << 62 | (2 * l1_offset + CLUSTER as u64))),
        ],
    );
    let many = image_of_many_tables();
    check(
        &many,
        Format::Qcow2,
        ErrorKind::Corrupt,
        &[("two L1 entries for one L2 table", &|b| {
            let first = b[512..520].to_vec();
            put(b, 520, &first);
        })],
    );
}

fn image_of_many_tables() -> Vec<u8> {
    image(&plain().cluster_size(512))
}

#[test]
fn qcow2_clusters_that_do_not_unpack() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        let image = image(&plain().compression(compression));
        let first = 2 * CLUSTER;
        check(
            &image,
            Format::Qcow2,
            ErrorKind::Corrupt,
            &[
                ("noise", &|b| b[first..first + 64].fill(0xb7)),
                ("zeroes", &|b| b[first..first + 4096].fill(0)),
                ("a window of 3.75 TiB, or noise", &|b| put(b, first, b"\x28\xb5\x2f\xfd\0\xff\x01\0\0")),
            ],
        );
        // Any one bit: an error or other bytes, and nothing worse.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for bit in (0..8 * 600).step_by(7) {
            let mut patched = image.clone();
            patched[first + bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &patched).unwrap();
            let _ = read(&path, Format::Qcow2);
        }
    }
}

#[test]
fn vmdk_headers() {
    for compression in [Compression::None, Compression::Zlib] {
        let image = image(&ExportOptions::new(Format::Vmdk).compression(compression));
        check(
            &image,
            Format::Vmdk,
            ErrorKind::Unsupported,
            &[
                ("version 4", &|b| b[4] = 4),
                ("a feature of the future", &|b| b[11] = 1),
                ("another compression", &|b| (b[10], b[77]) = (3, 2)),
                ("grain tables of another length", &|b| b[44] = 1),
                ("an extent of ESX", &|b| put(b, 0, b"COWD")),
                ("no descriptor", &|b| put(b, 28, &[0; 8])),
            ],
        );
        check(
            &image,
            Format::Vmdk,
            ErrorKind::Corrupt,
            &[
                ("another magic number", &|b| b[0] = 0),
                ("sent as text", &|b| b[75] = b'\n'),
                ("grains of no sector", &|b| b[20] = 0),
                ("grains of 129 sectors", &|b| b[20] = 129),
                ("grains of 2^62 sectors", &|b| (b[20], b[27]) = (0, 0x40)),
                ("a disk of 2^64 sectors", &|b| put(b, 12, &[0xff; 8])),
                ("a descriptor beyond the end", &|b| b[34] = 1),
                ("a descriptor at the end of the world", &|b| put(b, 28, &[0xff; 8])),
                ("a descriptor that is none", &|b| b[512] = b'!'),
                ("cut in its header", &|b| b.truncate(511)),
                ("cut in its descriptor", &|b| b.truncate(1024)),
                ("cut after its descriptor", &|b| b.truncate(21 * 512)),
            ],
        );
        check(
            &image,
            Format::Vmdk,
            ErrorKind::TooLarge,
            &[
                ("a disk of 2^62 bytes", &|b| b[18] = 0x20),
                ("a descriptor of 2 TiB", &|b| put(b, 36, &[0xff; 4])),
            ],
        );
        let text = |from: &'static str, to: &'static str| {
            move |b: &mut Vec<u8>| {
                let at = b.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
                put(b, at, to.as_bytes());
            }
        };
        check(
            &image,
            Format::Vmdk,
            ErrorKind::OtherFile,
            &[
                ("a parent", &text("parentCID=ffffffff", "parentCID=12345678")),
                (
                    "the name of a parent",
                    &text("ddb.virtualHWVersion = \"4\"", "parentFileNameHint=\"/a\"  "),
                ),
                ("a second extent", &text("# The Disk Data Base", "RW 1 FLAT \"/etc/sha\"")),
            ],
        );
        check(
            &image,
            Format::Vmdk,
            ErrorKind::Encrypted,
            &[("a key", &text("ddb.virtualHWVersion = \"4\"", "encryption.keySafe = \"vm\""))],
        );
        check(
            &image,
            Format::Vmdk,
            ErrorKind::Corrupt,
            &[
                ("a disk of another size", &text("RW 512", "RW 511")),
                ("an extent of another kind", &text("RW 512 SPARSE", "RW 512 FLAT  ")),
            ],
        );
    }
}

#[test]
fn vmdk_tables() {
    let image_of = |compression| image(&ExportOptions::new(Format::Vmdk).compression(compression));
    let sparse = image_of(Compression::None);
    let directory = le32(&sparse, 56) as usize * 512;
    let table = le32(&sparse, directory) as usize * 512;
    let end = (sparse.len() / 512) as u32;
    let set = |at: usize, entry: u32| move |b: &mut Vec<u8>| put(b, at, &entry.to_le_bytes());
    check(
        &sparse,
        Format::Vmdk,
        ErrorKind::Corrupt,
        &[
            ("a directory in the header", &set(56, 0)),
            ("a directory beyond the end", &set(56, end)),
            ("a directory at the end of the world", &|b| put(b, 56, &(u64::MAX - 1).to_le_bytes())),
            ("a grain table that is the directory", &set(directory, (directory / 512) as u32)),
            ("a grain table that reaches into the directory", &set(directory, (directory / 512) as u32 - 3)),
            ("a grain table beyond the end", &set(directory, end - 3)),
            ("a grain table at the end of the world", &set(directory, u32::MAX)),
            ("a grain that is its table", &set(table + 4, (table / 512) as u32)),
            ("a grain that is the end of its table", &set(table + 4, (table / 512) as u32 + 3)),
            ("a grain that is the directory", &set(table + 4, (directory / 512) as u32)),
            ("a grain at the end", &set(table + 4, end)),
            ("a grain at the end of the world", &set(table + 4, u32::MAX)),
            ("no directory but in a footer", &|b| put(b, 56, &[0xff; 8])),
        ],
    );
    let stream = image_of(Compression::Zlib);
    let footer = stream.len() - 1024;
    let directory = le32(&stream, footer + 56) as usize * 512;
    let table = le32(&stream, directory) as usize * 512;
    let [first, second] = [table, table + 4].map(|at| le32(&stream, at));
    let grain = second as usize * 512;
    check(
        &stream,
        Format::Vmdk,
        ErrorKind::Corrupt,
        &[
            ("a footer that is none", &set(footer, 0)),
            ("a footer without its marker", &set(footer - 512 + 12, 7)),
            ("no end", &set(footer + 512 + 8, 7)),
            ("a footer that names a footer", &|b| put(b, footer + 56, &[0xff; 8])),
            ("a grain that is another one", &set(table + 4, first)),
            ("a grain of 4 GiB", &set(grain + 8, u32::MAX)),
            ("a grain that reaches beyond the end", &set(table + 4, (footer / 512) as u32)),
            ("a grain of nothing", &set(grain + 8, 0)),
            ("a grain that does not unpack", &set(grain + 12, 0xffff_ffff)),
            ("cut at its end", &|b| b.truncate(footer)),
        ],
    );
    check(
        &stream,
        Format::Vmdk,
        ErrorKind::TooLarge,
        &[("a footer with another disk", &|b| b[footer + 18] = 0x20)],
    );
}

/// A descriptor says which files are opened, and may not say much.
#[test]
fn vmdk_extents_in_other_files() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(dir.path().join("secret"), vec![7; MIB]).unwrap();
    std::fs::write(inside.join("flat"), vec![7; MIB]).unwrap();
    std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
    std::os::unix::fs::symlink("flat", inside.join("link-beside")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(inside.join("pipe")).status().unwrap().success());
    std::fs::create_dir(inside.join("directory")).unwrap();
    let absolute = dir.path().join("secret").to_str().unwrap().to_owned();
    let path = inside.join("disk.vmdk");
    let sparse = image(&ExportOptions::new(Format::Vmdk).compression(Compression::None));
    std::fs::write(inside.join("sparse"), sparse).unwrap();
    let kind = |extent: &str, allowed: bool| {
        let text = format!("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n{extent}\n");
        std::fs::write(&path, text).unwrap();
        let opened = OpenOptions::new().extents_beside(allowed).open(&path, Format::Vmdk);
        opened.map_err(|e| e.kind()).map(|disk| read_all(&disk).unwrap())
    };
    for (extent, expected) in [
        ("RW 2048 FLAT \"flat\" 0", Ok(())),
        ("RW 2047 FLAT \"flat\" 1", Ok(())),
        ("RW 512 SPARSE \"sparse\"", Ok(())),
        ("RW 8 ZERO\nRW 2048 FLAT \"flat\"\nRW 512 SPARSE \"sparse\"", Ok(())),
        (&format!("RW 2048 FLAT \"{absolute}\" 0"), Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"/etc/shadow\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"../secret\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"directory/../../secret\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"..\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"link\" 0", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"link-beside\" 0", Err(ErrorKind::OtherFile)),
        ("RW 512 SPARSE \"../inside/sparse\"", Err(ErrorKind::OtherFile)),
        ("RW 2048 FLAT \"pipe\" 0", Err(ErrorKind::Unsupported)),
        ("RW 2048 FLAT \"directory\" 0", Err(ErrorKind::Unsupported)),
        ("RW 2048 FLAT \"nothing\" 0", Err(ErrorKind::NotFound)),
        ("RW 2049 FLAT \"flat\" 0", Err(ErrorKind::Corrupt)),
        ("RW 2048 FLAT \"flat\" 1", Err(ErrorKind::Corrupt)),
        ("RW 2048 FLAT \"flat\" 18446744073709551615", Err(ErrorKind::Corrupt)),
        ("RW 511 SPARSE \"sparse\"", Err(ErrorKind::Corrupt)),
        ("RW 2048 SPARSE \"flat\"", Err(ErrorKind::Corrupt)),
        ("RW 2048 SPARSE \"disk.vmdk\"", Err(ErrorKind::Corrupt)),
        ("RW 137438953473 ZERO", Err(ErrorKind::TooLarge)),
    ] {
        assert_eq!(kind(extent, true), expected, "{extent}");
        let alone = if expected == Err(ErrorKind::TooLarge) { expected } else { Err(ErrorKind::OtherFile) };
        assert_eq!(kind(extent, false), alone, "{extent}, not allowed");
    }
    assert_eq!(kind("RW 8 ZERO", false), Ok(()), "which needs no other file");
}

#[test]
fn raw_images_are_whole_sectors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [7; 1000]).unwrap();
    assert_eq!(open(&path, Format::Raw).err().map(|e| e.kind()), Some(ErrorKind::Unsupported));
    std::fs::write(&path, [7; 1024]).unwrap();
    assert_eq!(read(&path, Format::Raw), Ok(()));
    let small = OpenOptions::new().max_size(512).open(&path, Format::Raw);
    assert_eq!(small.err().map(|e| e.kind()), Some(ErrorKind::TooLarge));
}

//! Kernel files in, what a hypervisor loads out.

mod common;

use std::path::PathBuf;

use ami_core::Architecture::{Arm64, X86, X86_64};
use boot_image::{ErrorKind, unpack_kernel};
use common::{Random, arm64_image, bzimage, elf, have, pack};

#[test]
fn unpacks_what_the_kernels_build_packs() {
    // The commands of the kernel's scripts/Makefile.lib.
    let packers: [&[&str]; 10] = [
        &["gzip", "-n", "-f", "-9"],
        &["bzip2", "-9"],
        &["xz", "--format=lzma", "-9"],
        &["lzop", "-9"],
        &["lzop", "-1", "--crc32"],
        &["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"],
        &["xz", "--check=crc32", "--lzma2=dict=1MiB"],
        &["lz4", "-l", "-9", "-"],
        &["zstd", "-22", "--ultra", "-q"],
        &["zstd", "-3", "-q"],
    ];
    for command in packers {
        if !have(command[0]) {
            continue;
        }
        for (machine, is_64_bit, architecture) in [(62, true, X86_64), (3, false, X86)] {
            let content = elf(machine, 7);
            for version in [0x208, 0x20c, 0x20f] {
                let file = bzimage(&pack(command, &content), version, is_64_bit);
                let kernel = unpack_kernel(&file).unwrap_or_else(|e| panic!("{command:?}: {e}: {e:?}"));
                assert_eq!(kernel.architecture, architecture, "{command:?}");
                assert!(*kernel.image == content, "{command:?} {version:#x}");
            }
        }
    }
}

#[test]
fn passes_what_needs_no_unpacking() {
    for (file, architecture) in
        [(elf(62, 0), X86_64), (elf(3, 0), X86), (elf(183, 0), Arm64), (arm64_image(), Arm64)]
    {
        let kernel = unpack_kernel(&file).unwrap();
        assert_eq!(kernel.architecture, architecture);
        assert!(matches!(kernel.image, std::borrow::Cow::Borrowed(image) if image == file));
    }
}

#[test]
fn unpacks_arm64_kernels() {
    let image = arm64_image();
    let gzip = common::filter(&["gzip", "-n"], &image);
    let mut zboot = b"MZ\0\0zimg\x40\0\0\0".to_vec();
    zboot.extend((gzip.len() as u32).to_le_bytes());
    zboot.resize(0x40, 0);
    zboot.extend(&gzip);
    for file in [gzip, zboot] {
        let kernel = unpack_kernel(&file).unwrap();
        assert_eq!(kernel.architecture, Arm64);
        assert!(*kernel.image == image);
    }
}

#[test]
fn says_what_is_wrong() {
    let content = elf(62, 1);
    let gzip = pack(&["gzip", "-n"], &content);
    let good = bzimage(&gzip, 0x20f, true);
    let with = |offset: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        file
    };
    let payload = 3 * 512 + 100;
    let size = payload + gzip.len() - 4;
    use ErrorKind::*;
    for (what, file, kind, text) in [
        ("text", b"hello".to_vec(), Unsupported, "no Linux kernel"),
        ("nothing", Vec::new(), Unsupported, "no Linux kernel"),
        ("an old protocol", with(0x206, &[7, 2]), Unsupported, "boot protocol 2.07"),
        ("a payload outside", with(0x24c, &u32::MAX.to_le_bytes()), Corrupt, "outside of the file"),
        ("a payload far outside", with(0x248, &u32::MAX.to_le_bytes()), Corrupt, "outside of the file"),
        ("a short payload", with(0x24c, &[3, 0, 0, 0]), Corrupt, "cut short"),
        ("an empty payload", with(0x24c, &[0; 4]), Unsupported, "no known compression"),
        ("a wrong size", with(size, &100u32.to_le_bytes()), Corrupt, "unpacks to 100 bytes"),
        ("a huge size", with(size, &u32::MAX.to_le_bytes()), TooLarge, "512 MiB"),
        ("damage", with(payload + 500, &[0xff; 300]), Corrupt, "cannot be unpacked"),
        ("lzma", with(payload, b"\x5d\0\0"), Corrupt, "lzma data cannot be unpacked"),
        ("bzip2", with(payload, b"BZh9"), Corrupt, "bzip2 data cannot be unpacked"),
        ("lzo", with(payload, b"\x89LZO\0\r\n\x1a\n"), Corrupt, "LZO data cannot be unpacked"),
        ("no compression", with(payload, b"plain"), Unsupported, "no known compression"),
        (
            "32-bit in a 64-bit file",
            bzimage(&pack(&["gzip"], &elf(3, 1)), 0x20f, true),
            Corrupt,
            "x86_64, and",
        ),
        (
            "ARM in a bzImage",
            bzimage(&pack(&["gzip"], &elf(183, 1)), 0x20f, true),
            Corrupt,
            "no ELF file for x86",
        ),
        (
            "text in a bzImage",
            bzimage(&pack(&["gzip"], b"hello"), 0x20f, true),
            Corrupt,
            "no ELF file for x86",
        ),
        ("RISC-V", elf(243, 0), WrongArchitecture, "machine 243"),
        (
            "x32",
            {
                let mut e = elf(62, 0);
                e[4] = 1;
                e
            },
            WrongArchitecture,
            "class 1",
        ),
        ("a cut ELF file", elf(62, 0)[..19].to_vec(), Corrupt, "cut short"),
    ] {
        let error = unpack_kernel(&file).expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
}

#[test]
fn refuses_bombs() {
    // gzip: 64 MiB of zeroes that say that they are 1000 bytes.
    let bomb = common::filter(&["gzip", "-n", "-1"], &vec![0; 64 << 20]);
    let mut said_less = bomb.clone();
    let at = said_less.len() - 4;
    said_less[at..].copy_from_slice(&1000u32.to_le_bytes());
    assert_eq!(unpack_kernel(&bzimage(&said_less, 0x20f, true)).unwrap_err().kind(), ErrorKind::Corrupt);

    // Zstandard: a frame whose window is 2^41 bytes, and blocks that repeat one byte 128 KiB times.
    let mut zstd = b"\x28\xb5\x2f\xfd\x00\xf8".to_vec();
    for _ in 0..100_000 {
        zstd.extend([0x02, 0x00, 0x10, 0xaa]);
    }
    zstd.extend(1000u32.to_le_bytes());
    assert_eq!(unpack_kernel(&bzimage(&zstd, 0x20f, true)).unwrap_err().kind(), ErrorKind::TooLarge);
    // The same with a window of 1 KiB: the size that it says bounds what is unpacked.
    zstd[5] = 0;
    assert_eq!(unpack_kernel(&bzimage(&zstd, 0x20f, true)).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn survives_damage() {
    let content = elf(62, 3);
    let mut random = Random(0x5eed_0001);
    let packers: [&[&str]; 7] = [
        &["gzip"],
        &["bzip2"],
        &["xz", "--format=lzma", "-1"],
        &["lzop"],
        &["xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB"],
        &["lz4", "-l", "-"],
        &["zstd", "-q"],
    ];
    for command in packers {
        if !have(command[0]) {
            continue;
        }
        let good = bzimage(&pack(command, &content), 0x20f, true);
        for len in (0..good.len()).step_by(997).chain(0x1f0..0x270) {
            assert!(unpack_kernel(&good[..len]).is_err(), "{command:?} cut at {len}");
        }
        for _ in 0..600 {
            let mut file = good.clone();
            for _ in 0..=random.below(3) {
                // Half of the flips in the setup header and at the start of the payload.
                let at =
                    if random.below(2) == 0 { 0x1f0 + random.below(0x600) } else { random.below(file.len()) };
                file[at % good.len()] ^= 1 << random.below(8);
            }
            if let Ok(kernel) = unpack_kernel(&file) {
                assert_eq!(kernel.image.len(), content.len(), "{command:?}");
            }
        }
    }
}

/// The kernel that `BOOT_IMAGE_TEST_KERNEL` names, else the guest's, else one that is installed here.
fn real_kernel() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("BOOT_IMAGE_TEST_KERNEL") {
        return Some(named.into());
    }
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    let guest = std::env::var_os("AMI_GUEST_DIR").map_or_else(|| workspace.into(), PathBuf::from);
    let installed = std::fs::read_dir("/boot").into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let installed = installed.filter(|path| path.to_string_lossy().contains("/vmlinuz-"));
    std::iter::once(guest.join("amd64/vmlinuz")).chain(installed).find(|path| path.exists())
}

/// Debian's own kernel, against what the kernel's own tools make of it.
#[test]
fn unpacks_a_real_kernel() {
    let Some(path) = real_kernel() else {
        let why = "there is no kernel: run `cargo xtask guest`, or name one in BOOT_IMAGE_TEST_KERNEL";
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("SKIPPED: {why}");
        return;
    };
    let file = std::fs::read(&path).unwrap();
    let start = std::time::Instant::now();
    let kernel = unpack_kernel(&file).unwrap();
    println!("{}: {} bytes in {:?}", path.display(), kernel.image.len(), start.elapsed());
    if kernel.architecture != X86_64 || file.starts_with(b"\x7fELF") {
        return;
    }
    let at = |magic: &[u8]| file.windows(magic.len()).position(|w| w == magic);
    let oracle: Option<(usize, &[&str])> = at(b"\x02\x21\x4c\x18")
        .map(|at| (at, &["lz4", "-dcq", "-"] as &[&str]))
        .or_else(|| at(b"\xfd7zXZ\0").map(|at| (at, &["xz", "-dcq", "--single-stream"] as &[&str])))
        .filter(|(_, command)| have(command[0]));
    let Some((at, command)) = oracle else {
        eprintln!("SKIPPED: no tool unpacks {} to compare it with", path.display());
        return;
    };
    let length = u32::from_le_bytes(file[0x24c..0x250].try_into().unwrap()) as usize;
    let expected = common::filter(command, &file[at..at + length - 4]);
    assert!(*kernel.image == expected, "differs from what {command:?} unpacks");
    // XEN_ELFNOTE_PHYS32_ENTRY, the note of a kernel that can be entered as PVH.
    let note = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
    let short = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0";
    assert!(kernel.image.windows(16).any(|w| w == note || w == short), "no PVH note");
}

//! Disks made with the tools that make real ones, and what they boot.

mod common;

use ami_core::Architecture;
use boot_image::{BootEntry, BootSource, Error, ErrorKind};
use common::{Files, MIB, Partition, arm64_image, disk, ext4, gpt, have, kernel};
use gpt::partition_types as types;

const GRUB: &[u8] = b"set default=0\nmenuentry 'Debian' {\nset root='hd0,gpt1'\n\
    linux /boot/vmlinuz-6.1.0-48 root=PARTUUID=x ro  quiet\ninitrd /boot/initrd.img-6.1.0-48\n}\n";

/// What a root file system with these files boots.
fn find(files: Files<'_>) -> Result<BootEntry, Error> {
    let (bytes, _) = gpt(&[(types::LINUX_FS, &ext4(files, 16 * MIB, &[]))]);
    BootEntry::find(&disk(bytes))
}

#[test]
fn boots_a_loader_entry_first() {
    if !have("mke2fs") {
        return;
    }
    let entry = find(&[
        ("boot/vmlinuz-6.1.0-48", &kernel(48)),
        ("boot/vmlinuz-6.1.0-49", &kernel(49)),
        ("boot/initrd.img-6.1.0-48", b"48"),
        ("boot/microcode", b"12345"),
        ("boot/initrd-49", b"initrd"),
        ("boot/grub/grub.cfg", GRUB),
        ("boot/loader/entries/debian-6.1.0-9.conf", b"title old\nlinux /boot/vmlinuz-6.1.0-48\n"),
        (
            "boot/loader/entries/debian-6.1.0-49.conf",
            b"title Debian\nversion 6.1.0-49\nlinux /vmlinuz-6.1.0-49\ninitrd /microcode\ninitrd /initrd-49\n\
              options root=LABEL=root\noptions $extra ro\n",
        ),
        ("boot/loader/entries/debian-6.1.0-50.conf", b"title gone\nlinux /vmlinuz-6.1.0-50\n"),
        ("boot/grub/grubenv", b"# GRUB Environment Block\nextra=console=tty0\n######"),
    ])
    .unwrap();
    assert!(entry.kernel == kernel(49));
    // The second initial RAM disk starts at a multiple of four bytes.
    assert_eq!(entry.initrd.as_deref(), Some(&b"12345\0\0\0initrd"[..]));
    assert_eq!(entry.command_line, "root=LABEL=root console=tty0 ro");
    assert_eq!(entry.architecture, Architecture::X86_64);
    assert_eq!(entry.title.as_deref(), Some("Debian"));
    assert_eq!(entry.version.as_deref(), Some("6.1.0-49"));
    assert_eq!(entry.kernel_path, "/boot/vmlinuz-6.1.0-49");
    assert_eq!(entry.initrd_paths, ["/boot/microcode", "/boot/initrd-49"]);
    assert_eq!(entry.partition, Some(1));
    assert_eq!(entry.source, BootSource::LoaderEntry("/boot/loader/entries/debian-6.1.0-49.conf".to_owned()));
    assert_eq!(entry.unpack_kernel().unwrap().image, common::elf(62, 49));
}

#[test]
fn boots_grubs_default_before_the_newest_file() {
    if !have("mke2fs") {
        return;
    }
    let entry = find(&[
        ("boot/vmlinuz-6.1.0-48", &kernel(48)),
        ("boot/vmlinuz-6.1.0-49", &kernel(49)),
        ("boot/initrd.img-6.1.0-48", b"initrd 48"),
        ("boot/grub/grub.cfg", GRUB),
    ])
    .unwrap();
    assert!(entry.kernel == kernel(48));
    assert_eq!(entry.initrd.as_deref(), Some(&b"initrd 48"[..]));
    assert_eq!(entry.command_line, "root=PARTUUID=x ro quiet");
    assert_eq!(entry.title.as_deref(), Some("Debian"));
    assert_eq!(entry.version.as_deref(), Some("6.1.0-48"));
    assert_eq!(entry.source, BootSource::Grub("/boot/grub/grub.cfg".to_owned()));
}

#[test]
fn boots_kernel_files() {
    if !have("mke2fs") {
        return;
    }
    let (k9, k10, image) = (kernel(9), kernel(10), arm64_image());
    // The files, the kernel and initrd that are booted, and the end of the command line.
    let cases: [(Files<'_>, &str, Option<&str>, &str); 6] = [
        (
            &[
                ("boot/vmlinuz-6.1.0-9", &k9),
                ("boot/vmlinuz-6.1.0-10", &k10),
                ("boot/vmlinuz-7.old", &k9),
                ("boot/initrd.img-6.1.0-10", b"i"),
            ],
            "/boot/vmlinuz-6.1.0-10",
            Some("/boot/initrd.img-6.1.0-10"),
            " ro console=ttyS0",
        ),
        (
            &[
                ("vmlinuz", b"-> boot/vmlinuz-6.1.0-9"),
                ("boot/vmlinuz-6.1.0-9", &k9),
                ("boot/vmlinuz-6.1.0-10", &k10),
            ],
            "/boot/vmlinuz-6.1.0-9",
            None,
            " ro console=ttyS0",
        ),
        (
            &[
                ("boot/vmlinuz", b"-> /lib/../lib/k/./vmlinuz-5"),
                ("lib/k/vmlinuz-5", &k9),
                ("lib/k/initramfs-5.img", b"i"),
                ("boot/vmlinuz-6", &k10),
            ],
            "/lib/k/vmlinuz-5",
            Some("/lib/k/initramfs-5.img"),
            " ro console=ttyS0",
        ),
        (&[("boot/vmlinuz-6", &image)], "/boot/vmlinuz-6", None, " ro"),
        // Links that lead nowhere, outside and in circles are none.
        (
            &[
                ("vmlinuz", b"-> boot/gone"),
                ("boot/vmlinuz", b"-> ../../../../etc/passwd"),
                ("boot/vmlinuz-6", &k9),
            ],
            "/boot/vmlinuz-6",
            None,
            " ro console=ttyS0",
        ),
        (
            &[("boot", b"-> usr/boot"), ("usr/boot/vmlinuz-6", &k9)],
            "/usr/boot/vmlinuz-6",
            None,
            " ro console=ttyS0",
        ),
    ];
    for (files, kernel_path, initrd, options) in cases {
        let (bytes, ids) = gpt(&[(types::LINUX_FS, &ext4(files, 16 * MIB, &[]))]);
        let entry = BootEntry::find(&disk(bytes)).unwrap();
        assert_eq!(entry.kernel_path, kernel_path);
        assert_eq!(entry.initrd_paths.first().map(String::as_str), initrd);
        assert_eq!(entry.command_line, format!("root=PARTUUID={}{options}", ids[0]), "{kernel_path}");
        assert_eq!(entry.source, BootSource::KernelFile);
    }
}

#[test]
fn finds_the_partition() {
    if !have("mke2fs") {
        return;
    }
    let k = kernel(1);
    let root = ext4(&[("etc/fstab", b"")], 8 * MIB, &[]);
    let boot = ext4(&[("vmlinuz-6", &k)], 8 * MIB, &[]);
    let with_grub = ext4(
        &[("vmlinuz-6", &k), ("grub/grub.cfg", b"menuentry x { linux /vmlinuz-6 root=/dev/vda2 }")],
        8 * MIB,
        &[],
    );
    let full = ext4(&[("etc/fstab", b""), ("boot/vmlinuz-6", &k)], 8 * MIB, &[]);
    let fat = [&[0; 82], &b"FAT32   "[..], &[0; 1 << 20]].concat();
    let mut damaged = full.clone();
    damaged[1024 + 0x20] ^= 1;

    // The partitions, the one that holds the kernel, and the one that is the root.
    let cases: [(&[Partition<'_>], u32, usize); 6] = [
        (&[(types::EFI, &fat), (types::LINUX_FS, &full)], 2, 1),
        (&[(types::LINUX_FS, &root), (types::FREEDESK_BOOT, &boot)], 2, 0),
        (&[(types::FREEDESK_BOOT, &boot), (types::LINUX_ROOT_X64, &root)], 1, 1),
        (&[(types::LINUX_FS, &damaged), (types::LINUX_FS, &full)], 2, 1),
        (&[(types::LINUX_FS, &full), (types::LINUX_ROOT_X64, &full)], 2, 1),
        (&[(types::LINUX_SWAP, &[0; MIB]), (types::EFI, &full)], 2, 1),
    ];
    for (i, (partitions, number, root)) in cases.into_iter().enumerate() {
        let (bytes, ids) = gpt(partitions);
        let entry = BootEntry::find(&disk(bytes)).unwrap_or_else(|e| panic!("{i}: {e}: {e:?}"));
        assert_eq!(entry.partition, Some(number), "{i}");
        assert_eq!(entry.command_line, format!("root=PARTUUID={} ro console=ttyS0", ids[root]), "{i}");
    }
    let (bytes, _) = gpt(&[(types::LINUX_FS, &full), (types::LINUX_FS, &with_grub)]);
    let entry = BootEntry::find(&disk(bytes)).unwrap();
    assert_eq!((entry.partition, entry.command_line.as_str()), (Some(2), "root=/dev/vda2"));
}

#[test]
fn reads_disks_without_partitions() {
    if !have("mke2fs") {
        return;
    }
    let k = kernel(1);
    for (files, options) in [
        (&[("boot/vmlinuz-6", &k[..])][..], "root=/dev/vda ro console=ttyS0"),
        (
            &[("boot/vmlinuz-6", &k[..]), ("boot/initrd.img-6", b"i")][..],
            "root=UUID=01234567-89ab-cdef-0123-456789abcdef ro console=ttyS0",
        ),
    ] {
        let entry = BootEntry::find(&disk(ext4(files, 16 * MIB, &[]))).unwrap();
        assert_eq!(entry.partition, None);
        assert_eq!(entry.command_line, options);
    }
}

#[test]
fn reads_every_kind_of_ext4() {
    if !have("mke2fs") {
        return;
    }
    let k = kernel(1);
    for options in [
        &["-b", "1024"][..],
        &["-b", "4096"],
        &["-b", "1024", "-O", "^extent,^64bit"],
        &["-O", "^metadata_csum"],
        &["-O", "^has_journal,^extent,^64bit,^metadata_csum,^flex_bg"],
        &["-I", "128", "-O", "^metadata_csum"],
        &["-O", "metadata_csum,metadata_csum_seed"],
    ] {
        let bytes = ext4(&[("boot/vmlinuz-6", &k)], 16 * MIB, options);
        let entry = BootEntry::find(&disk(bytes)).unwrap_or_else(|e| panic!("{options:?}: {e}: {e:?}"));
        assert!(entry.kernel == k, "{options:?}");
    }
    let error = BootEntry::find(&disk(ext4(&[("boot/vmlinuz-6", &k)], 16 * MIB, &["-O", "inline_data"])))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn falls_back_to_the_backup_table() {
    if !have("mke2fs") {
        return;
    }
    let k = kernel(1);
    let (bytes, _) = gpt(&[(types::LINUX_FS, &ext4(&[("boot/vmlinuz-6", &k)], 8 * MIB, &[]))]);
    // The primary header's signature and checksum, and an entry of the primary table.
    for at in [512, 512 + 60, 1024 + 32] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x55;
        assert!(BootEntry::find(&disk(damaged.clone())).unwrap().kernel == k, "{at}");
        let backup = damaged.len() - 512;
        damaged[backup] ^= 1;
        let error = BootEntry::find(&disk(damaged)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}: {error}");
    }
}

#[test]
fn says_what_is_missing() {
    if !have("mke2fs") {
        return;
    }
    let empty = ext4(&[("etc/fstab", b"")], 8 * MIB, &[]);
    let xfs = [&b"XFSB"[..], &[0; MIB]].concat();
    let mut mbr = vec![0; MIB];
    mbr[450] = 0x83;
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    let no_table = {
        let mut mbr = mbr.clone();
        mbr[450] = 0xee;
        mbr
    };
    let grub_only = ext4(&[("boot/grub/grub.cfg", GRUB)], 8 * MIB, &[]);
    let conditional = ext4(
        &[("boot/grub/grub.cfg", b"menuentry x { if y; then linux /z; fi }"), ("boot/vmlinuz-1", &kernel(1))],
        8 * MIB,
        &[],
    );
    let no_kernel = ext4(&[("boot/vmlinuz-1", b"hello")], 8 * MIB, &[]);
    let huge = ext4(
        &[("boot/vmlinuz-1", &kernel(1)), ("boot/loader/entries/a.conf", &[b'#'; 100_000])],
        8 * MIB,
        &[],
    );
    use ErrorKind::*;
    for (bytes, kind, text) in [
        (vec![], NoPartition, "cannot be read"),
        (vec![0; 512], NoFileSystem, "no partition table and no ext4"),
        (vec![0; MIB], NoFileSystem, "no partition table and no ext4"),
        (mbr, Unsupported, "MBR partition table"),
        (no_table, Corrupt, "GUID partition table is damaged"),
        (xfs.clone(), Unsupported, "the disk holds an XFS file system"),
        (gpt(&[]).0, NoPartition, "empty"),
        (gpt(&[(types::LINUX_FS, &[0; MIB])]).0, NoFileSystem, "no partition of the disk"),
        (gpt(&[(types::LINUX_FS, &xfs)]).0, Unsupported, "partition 1 holds an XFS file system"),
        (empty.clone(), NoKernel, "install a kernel package"),
        (gpt(&[(types::LINUX_FS, &empty), (types::LINUX_FS, &xfs)]).0, NoKernel, "partition 2 holds an XFS"),
        (grub_only, NoKernel, "names /boot/vmlinuz-6.1.0-48, which does not exist"),
        (conditional, Unsupported, "under a condition"),
        (no_kernel, Unsupported, "/boot/vmlinuz-1: the file is no Linux kernel"),
        (huge, TooLarge, "/boot/loader/entries/a.conf is 100000 bytes long"),
    ] {
        let error = BootEntry::find(&disk(bytes)).expect_err(text);
        assert_eq!(error.kind(), kind, "{text}: {error}");
        assert!(error.to_string().contains(text), "{text}: {error}");
    }
}

/// A Debian cloud kernel is 14 MB, and finding it is not to take a second.
#[test]
fn reads_large_files_quickly() {
    if !have("mke2fs") {
        return;
    }
    let mut large = kernel(1);
    large.resize(14 * MIB, 0x5a);
    let (bytes, _) = gpt(&[(
        types::LINUX_FS,
        &ext4(&[("boot/vmlinuz-6", &large), ("boot/initrd.img-6", &large)], 64 * MIB, &[]),
    )]);
    let disk = disk(bytes);
    let start = std::time::Instant::now();
    let entry = BootEntry::find(&disk).unwrap();
    println!("28 MiB in {:?}", start.elapsed());
    assert!(entry.kernel == large && entry.initrd.as_deref() == Some(&large[..]));
}

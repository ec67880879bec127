//! Disks and kernels that no image can be made of: each is refused with the reason and with what to
//! do, and nothing is left.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{Ami, AmiBuilder, Arm64, Boot, BootMode, X86_64};
use common::{check, disk, everything, ext4, open, register};
use instance_core::testing::tiny_elf;
use instance_core::{DirectBoot, Error, ErrorKind, ImageSource, LaunchSpec, Result};
use storage_block::{BlockBackend, Disk, MemoryDisk};

const UNBOOTABLE: &str = "ImportFailed.UnsupportedDisk";

/// The kernel of another machine, by its ELF number.
fn kernel_for(machine: u16) -> Vec<u8> {
    let mut kernel = tiny_elf();
    kernel[18..20].copy_from_slice(&machine.to_le_bytes());
    kernel
}

fn memory(bytes: Vec<u8>) -> Disk {
    MemoryDisk::from_vec(bytes).unwrap().into_disk()
}

/// A protective MBR and a header that is none.
fn bad_gpt() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    bytes[450] = 0xee;
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[512..520].copy_from_slice(b"EFI PART");
    bytes
}

#[test]
fn a_disk_that_does_not_boot_is_refused() {
    let kernel = tiny_elf();
    let Some(good) = ext4(&[("boot/vmlinuz-6", &kernel)]) else { return };
    let torn = |range: std::ops::Range<usize>| {
        let mut bytes = good.clone();
        bytes[range].fill(0xa5);
        bytes
    };
    let with_kernel = |kernel: &[u8]| ext4(&[("boot/vmlinuz-6", kernel)]).unwrap();
    let mut mbr = vec![0; 1 << 20];
    mbr[450] = 0x83;
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);

    let no_kernel = "install a kernel package";
    let table: &[(&str, Vec<u8>, &[&str])] = &[
        ("all zeroes", vec![0; 1 << 20], &["no ext4 file system", "a kernel in /boot"]),
        ("nothing at all", Vec::new(), &["partition table cannot be read"]),
        (
            "a damaged partition table",
            bad_gpt(),
            &["GUID partition table is damaged", "make the image again"],
        ),
        ("a table of the PC BIOS", mbr, &["MBR partition table", "only GUID partition tables"]),
        ("a torn superblock", torn(1100..1400), &["superblock is wrong", "make the image again"]),
        ("torn inodes", torn(4096..1 << 20), &["make the image again"]),
        ("no kernel", ext4(&[("etc/hostname", b"x")]).unwrap(), &[no_kernel]),
        ("a kernel cut short", with_kernel(b"\x7fELF"), &["/boot/vmlinuz-6", "cut short"]),
        ("a kernel that is a script", with_kernel(b"#!/bin/sh\n"), &["/boot/vmlinuz-6", "no Linux kernel"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    register(&region, "there", &disk(1, 1)).unwrap();
    let before = everything(&region, dir.path());
    for (what, bytes, says) in table {
        let bytes = bytes.clone();
        let source = memory(bytes);
        let refused = region.register_image(Ami::<X86_64>::builder("bad"), ImageSource::new(&source));
        check(&refused.expect_err(what), ErrorKind::NotBootable, UNBOOTABLE, says);
        assert_eq!(everything(&region, dir.path()), before, "{what}");
    }
    // The same disk whole is taken, so what was refused is the damage.
    region.register_image(Ami::<X86_64>::builder("bad"), ImageSource::new(&memory(good))).unwrap();
}

#[test]
fn a_kernel_of_another_architecture_is_refused() {
    fn refused<A: ami_core::Arch>(builder: AmiBuilder<A>, source: ImageSource<'_>, says: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let region = open(dir.path());
        let before = everything(&region, dir.path());
        let error = region.register_image(builder, source).unwrap_err();
        check(&error, ErrorKind::ArchitectureMismatch, "InvalidParameterValue", says);
        assert_eq!(everything(&region, dir.path()), before);
    }
    let root = disk(1, 1);
    let beside = |machine| ImageSource::new(&root).boot(DirectBoot::new(kernel_for(machine), None, ""));
    let (x86, arm) = (Ami::<X86_64>::builder("wrong"), Ami::<Arm64>::builder("wrong"));
    refused(x86.clone(), beside(183), &["is for x86_64", "kernel is for arm64", "register it as arm64"]);
    refused(arm, beside(62), &["is for arm64", "kernel is for x86_64", "register it as x86_64"]);
    refused(x86.clone(), beside(243), &["machine 243", "i386, x86_64 or arm64"]);
    let Some(riscv) = ext4(&[("boot/vmlinuz-6", &kernel_for(243))]) else { return };
    refused(
        x86,
        ImageSource::new(&memory(riscv)),
        &["/boot/vmlinuz-6", "machine 243", "i386, x86_64 or arm64"],
    );
}

#[test]
fn a_parameter_that_no_image_can_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let before = everything(&region, dir.path());
    let root = disk(1, 1);
    let try_with = |builder: AmiBuilder<X86_64>, device, kernel: &[u8], line: &str| -> Result<_> {
        let boot = DirectBoot::new(kernel.to_vec(), None, line);
        region.register_image(builder, ImageSource::new(&root).root_device(device).boot(boot))
    };
    let builder = || Ami::<X86_64>::builder("bad");
    let device = |name| try_with(builder(), name, &tiny_elf(), "").unwrap_err();
    let long = "x".repeat(5000);
    let table: Vec<(Error, ErrorKind, &str, &str)> = vec![
        (
            device("/dev/floppy"),
            ErrorKind::InvalidBlockDeviceMapping,
            "InvalidBlockDeviceMapping",
            "is no device name",
        ),
        (device(""), ErrorKind::MissingParameter, "MissingParameter", "no root device name"),
        (
            try_with(Ami::<X86_64>::builder("n"), "/dev/xvda", &tiny_elf(), "").unwrap_err(),
            ErrorKind::MalformedImageName,
            "InvalidAMIName.Malformed",
            "name",
        ),
        (
            try_with(builder(), "/dev/xvda", &tiny_elf(), &long).unwrap_err(),
            ErrorKind::InvalidParameter,
            "InvalidParameterValue",
            "at most 2048",
        ),
        (
            try_with(builder(), "/dev/xvda", b"no kernel", "").unwrap_err(),
            ErrorKind::NotBootable,
            UNBOOTABLE,
            "neither a bzImage, an ELF file nor an ARM64 Image",
        ),
    ];
    for (error, kind, code, says) in table {
        check(&error, kind, code, &[says]);
    }
    assert_eq!(everything(&region, dir.path()), before);
}

/// A disk with a bad sector, which the copy meets half way.
#[derive(Debug)]
struct Failing(Disk);

impl BlockBackend for Failing {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
        if offset >= 3 << 20 {
            let bad = std::io::Error::other("a bad sector");
            return Err(storage_block::Error::io(bad, format!("cannot read at {offset}")));
        }
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage_block::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn flush(&self) -> storage_block::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> storage_block::Result<()> {
        self.0.write_zeroes(offset, len)
    }
}

#[test]
fn a_disk_that_fails_half_way_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let before = everything(&region, dir.path());
    let failing = Disk::new(Failing(disk(5, 1))).unwrap();
    let error = register(&region, "bad", &failing).unwrap_err();
    check(&error, ErrorKind::Internal, "InternalError", &["cannot copy the disk", "a bad sector"]);
    assert_eq!(everything(&region, dir.path()), before);
}

#[test]
fn an_image_boots_through_the_firmware_that_its_builder_says() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let uefi = || Ami::<X86_64>::builder("uefi").boot(Boot::root_volume().mode(BootMode::Uefi));
    // A kernel beside the disk passes none.
    let root = disk(1, 7);
    let direct = ImageSource::new(&root).boot(DirectBoot::new(tiny_elf(), None, ""));
    let refused = region.register_image(uefi(), direct).unwrap_err();
    let combination = "InvalidParameterCombination";
    check(&refused, ErrorKind::InvalidParameterCombination, combination, &["passes no firmware"]);
    let Some(bytes) = ext4(&[("boot/vmlinuz-6", &tiny_elf())]) else { return };
    let bootable = MemoryDisk::from_vec(bytes).unwrap().into_disk();
    let ami = region.register_image(uefi(), ImageSource::new(&bootable)).unwrap();
    assert_eq!(ami.manifest().boot().boot_mode(), Some(BootMode::Uefi));
    let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    let child = server.create_image("child").unwrap().ami;
    assert_eq!(child.manifest().boot(), ami.manifest().boot());
}

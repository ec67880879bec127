//! The kernels of distributions, as their packages put them on root disks: found, unpacked and of the right kind.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::path::{Path, PathBuf};

use ami_core::Architecture;
use boot_image::{BootEntry, BootSource};
use storage_block::RawFile;

/// Where `cargo xtask guest --others` makes the guests.
fn guests() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from)
}

#[test]
fn the_kernels_of_distributions_are_found_and_unpacked() {
    let links = BootSource::KernelFile;
    let named = BootSource::LoaderEntry(String::new());
    for (guest, architecture, source) in [
        ("amd64", Architecture::X86_64, named),
        ("full", Architecture::X86_64, links.clone()),
        ("debian-13", Architecture::X86_64, links.clone()),
        ("debian-13-full", Architecture::X86_64, links.clone()),
        ("i386", Architecture::X86, links),
    ] {
        let disk = guests().join(guest).join("disk.raw");
        if !disk.exists() {
            assert!(std::env::var_os("CI").is_none(), "there is no {}, and CI needs it", disk.display());
            eprintln!("SKIPPED: there is no {} (`cargo xtask guest --others` makes it)", disk.display());
            continue;
        }
        check(&disk, architecture, &source);
    }
}

fn check(disk: &Path, architecture: Architecture, source: &BootSource) {
    let entry = BootEntry::find(&RawFile::open(disk, true).unwrap().into_disk()).unwrap();
    let what = disk.display();
    assert_eq!(entry.architecture, architecture, "{what}");
    assert_eq!(std::mem::discriminant(&entry.source), std::mem::discriminant(source), "{what}");
    let version = entry.kernel_path.strip_prefix("/boot/vmlinuz-").unwrap();
    assert_eq!(entry.initrd_paths, [format!("/boot/initrd.img-{version}")], "{what}");
    assert!(entry.kernel == std::fs::read(disk.with_file_name("vmlinuz")).unwrap(), "{what}: another kernel");
    let kernel = entry.unpack_kernel().unwrap();
    // An ELF file of 32 or 64 bits, which says in text which version it is.
    let class = if architecture == Architecture::X86 { 1 } else { 2 };
    assert_eq!(kernel.image[..5], [0x7f, b'E', b'L', b'F', class], "{what}");
    let banner = format!("Linux version {version} ");
    let says = kernel.image.windows(banner.len()).any(|bytes| bytes == banner.as_bytes());
    assert!(says, "{what} holds no {banner:?}");
}

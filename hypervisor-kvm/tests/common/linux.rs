//! Guests with a stock Linux.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use boot_image::{BootEntry, BootSource};
use instance_core::machine::{Boot, BootFile};
use storage_block::RawFile;

/// Where `cargo xtask guest` makes the guests.
pub(crate) fn directory() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from)
}

/// A conformance guest as its root disk has it: the files that the distribution's packages put there.
#[allow(dead_code, reason = "of those who boot Linux, one boots disks")]
pub(crate) fn boot_of_disk(guest: &str) -> Boot {
    let dir = directory().join(guest);
    let disk = RawFile::open(dir.join("disk.raw"), true).unwrap().into_disk();
    let entry = BootEntry::find(&disk).unwrap();
    assert_eq!(entry.source, BootSource::KernelFile);
    assert!(entry.kernel == std::fs::read(dir.join("vmlinuz")).unwrap(), "it is another kernel");
    let kernel = in_file(&entry.unpack_kernel().unwrap().image);
    let initrd = in_file(entry.initrd.as_deref().unwrap());
    Boot::new(kernel, Some(initrd), format!("{} quiet panic=-1", entry.command_line))
}

fn in_file(bytes: &[u8]) -> BootFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    BootFile::new(file).unwrap()
}

/// A conformance guest, with or without the note that names its PVH entry.
pub(crate) fn boot(guest: &str, pvh: bool) -> Boot {
    let dir = directory().join(guest);
    let packed = std::fs::read(dir.join("vmlinuz")).expect("`cargo xtask guest` makes the guest");
    let mut image = boot_image::unpack_kernel(&packed).unwrap().image.into_owned();
    if !pvh {
        // Type 18 (XEN_ELFNOTE_PHYS32_ENTRY) and the note's name.
        let note = [&18u32.to_le_bytes()[..], b"Xen\0"].concat();
        let at = image.windows(note.len()).position(|bytes| bytes == note).unwrap();
        image[at] = 99;
    }
    let initrd = BootFile::new(File::open(dir.join("conformance.img")).unwrap()).unwrap();
    Boot::new(in_file(&image), Some(initrd), "console=ttyS0 quiet panic=-1")
}

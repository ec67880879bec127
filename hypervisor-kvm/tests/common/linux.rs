//! Guests with a stock Linux.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use instance_core::machine::{Boot, BootFile};

/// Where `cargo xtask guest` makes the guests.
pub(crate) fn directory() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from)
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
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&image).unwrap();
    let initrd = BootFile::new(File::open(dir.join("conformance.img")).unwrap()).unwrap();
    Boot::new(BootFile::new(kernel).unwrap(), Some(initrd), "console=ttyS0 quiet panic=-1")
}

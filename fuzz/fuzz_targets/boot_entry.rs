//! A disk of these bytes: with a partition table, or as a file system.
#![no_main]

use boot_image::BootEntry;
use libfuzzer_sys::fuzz_target;
use storage_block::MemoryDisk;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    if let Ok(disk) = MemoryDisk::from_vec(bytes) {
        let _ = BootEntry::find(&disk.into_disk());
    }
});

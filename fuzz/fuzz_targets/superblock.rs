//! An ext4 superblock, and what is read to look at its journal.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| boot_image::fuzzing::superblock(bytes));

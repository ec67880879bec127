//! A disk: with a partition table, or as a file system.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| boot_image::fuzzing::boot_entry(bytes));

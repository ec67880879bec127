//! Entries of the Boot Loader Specification.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| boot_image::fuzzing::loader_entries(bytes));

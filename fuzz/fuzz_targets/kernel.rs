//! A kernel file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| boot_image::fuzzing::kernel(bytes));

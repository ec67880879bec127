//! A qcow2 image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| image_formats::fuzzing::qcow2_image(bytes));

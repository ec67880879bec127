//! An image of any format.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| image_formats::fuzzing::image_format(bytes));

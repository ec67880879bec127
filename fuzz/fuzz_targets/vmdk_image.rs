//! A VMDK image: a descriptor, or an extent with one in it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| image_formats::fuzzing::vmdk_image(bytes));

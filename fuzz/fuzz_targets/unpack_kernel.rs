//! A kernel file of these bytes.
#![no_main]

use boot_image::unpack_kernel;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(kernel) = unpack_kernel(bytes) {
        assert!(!kernel.image.is_empty());
    }
});

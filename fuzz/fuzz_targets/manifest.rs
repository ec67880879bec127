//! A manifest and an image, from outside.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| ami_core::fuzzing::manifest(bytes));

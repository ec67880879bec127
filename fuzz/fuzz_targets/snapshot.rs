//! A snapshot's root and a leaf.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::snapshot(bytes));

//! The index of a pack.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::pack_index(bytes));

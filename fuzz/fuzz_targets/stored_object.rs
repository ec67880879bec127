//! What is stored as an object: compressed, encrypted, or what differs from another.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::stored_object(bytes));

//! The log of a volume.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::volume_log(bytes));

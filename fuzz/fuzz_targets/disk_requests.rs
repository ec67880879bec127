//! Requests to a disk, of any kind, place and shape.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::disk_requests(bytes));

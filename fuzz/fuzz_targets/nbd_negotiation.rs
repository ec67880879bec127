//! Options of an NBD client.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| storage_block::fuzzing::nbd_negotiation(bytes));

//! A guest's segments of TCP.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::segments(bytes));

//! A guest's requests to the metadata service.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::metadata(bytes));

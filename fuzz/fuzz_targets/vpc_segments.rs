//! A guest's questions to the DHCP server.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::segments(bytes));

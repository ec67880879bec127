//! A guest's questions to the resolver over TCP.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::dns_stream(bytes));

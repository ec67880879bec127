//! Packets that a firewall with a memory lets pass or not, beside a plain model.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::firewall(bytes));

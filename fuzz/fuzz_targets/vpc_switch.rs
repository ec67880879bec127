//! A guest's frames.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| network_vpc::fuzzing::switch(bytes));

//! What an agent in a guest says.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| instance_core::fuzzing::guest_agent(bytes));

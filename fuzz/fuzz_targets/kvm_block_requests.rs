//! Requests of a good driver that a disk's limits hold up.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::block_requests(bytes));

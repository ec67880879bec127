//! The state of a saved machine, which may be anybody's.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::saved_machine(bytes));

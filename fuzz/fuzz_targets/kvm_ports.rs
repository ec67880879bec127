//! A guest's accesses to the serial port and the power management registers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::ports(bytes));

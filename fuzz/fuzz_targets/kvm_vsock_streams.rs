//! A guest's packets on streams, and a program at the host.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::vsock_streams(bytes));

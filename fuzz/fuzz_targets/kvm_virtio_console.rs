//! A guest's driver of a virtio console.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_console(bytes));

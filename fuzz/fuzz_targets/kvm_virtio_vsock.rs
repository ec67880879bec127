//! A guest's driver of a socket device, and a program at the host.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_vsock(bytes));

//! The least that a program asks of KVM to have a guest run its first instructions.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

/// Where the bare-metal guest lies as well.
const CODE: u64 = 1 << 20;
/// What the bare-metal guest begins with: `mov dx, 0x3f8; mov al, '\n'; out dx, al`.
pub(crate) const FIRST_INSTRUCTIONS: [u8; 7] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'\n', 0xee];

/// A guest that was made so. The processor and the virtual machine go before the memory that they were given.
pub(crate) struct Bare {
    _vcpu: VcpuFd,
    _vm: VmFd,
    _kvm: Kvm,
    _memory: GuestMemoryMmap,
}

/// How long it takes from nothing to the guest's first write to a port, with so much memory.
pub(crate) fn first_instruction(memory_bytes: u64) -> anyhow::Result<Duration> {
    Ok(make(memory_bytes)?.0)
}

/// The same, with what was made.
pub(crate) fn make(memory_bytes: u64) -> anyhow::Result<(Duration, Bare)> {
    let begun = Instant::now();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), memory_bytes as usize)])?;
    memory.write_slice(&FIRST_INSTRUCTIONS, GuestAddress(CODE))?;
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: memory_bytes,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: the memory outlives the virtual machine and its processor: here, since it is declared before them, and in
    // what is returned.
    #[allow(unsafe_code, reason = "the guest's memory is given to KVM")]
    unsafe {
        vm.set_user_memory_region(region)?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    // Flat 32-bit protected mode.
    let data = kvm_segment {
        limit: !0,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        selector: 16,
        ..Default::default()
    };
    sregs.cs = kvm_segment { type_: 0xb, selector: 8, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => break,
            Ok(other) => bail!("KVM ended the guest's first instructions with {other:?}"),
            Err(error) if std::io::Error::from(error).kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("KVM did not run the guest"),
        }
    }
    Ok((begun.elapsed(), Bare { _vcpu: vcpu, _vm: vm, _kvm: kvm, _memory: memory }))
}

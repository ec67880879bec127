//! KVM's virtual machine: the guest's memory, and what a PC has on its board.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;

use crate::error::{HostContext, Result};
use crate::memory::{self, Memory};
use crate::{Kvm, layout};

/// Interrupt controllers, timer, and the pages that KVM needs on Intel processors.
fn set_up_platform(vm: &VmFd) -> Result<()> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .host("KVM did not take its identity map's place")?;
    vm.set_tss_address(layout::KVM_TSS).host("KVM did not take its task state segment's place")?;
    vm.create_irq_chip().host("KVM did not make interrupt controllers")?;
    // With port 0x61, by which Linux measures time.
    let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(timer).host("KVM did not make a timer")
}

/// A virtual machine with this memory.
pub(crate) fn make_vm(kvm: &Kvm, memory: &Memory) -> Result<VmFd> {
    let vm = kvm.device().create_vm().host("KVM did not make a virtual machine")?;
    // SAFETY: both go to one `Shared`, which keeps the memory for as long as the virtual machine and its
    // processors; until then, whoever calls does.
    #[allow(unsafe_code, reason = "the guest's memory is given to KVM")]
    unsafe {
        memory::register(&vm, memory)?;
    }
    set_up_platform(&vm)?;
    Ok(vm)
}

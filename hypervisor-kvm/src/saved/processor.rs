//! A processor as it is saved.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::msrs;
use crate::error::{HostContext, Result, saved};
use crate::{cpu, cpu_model};

/// `EFER`, and AMD's nested virtualisation in it: KVM looks whether CPUID has that only where the guest sets it.
const MSR_EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;

/// All that KVM tells of a processor that stands still between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Processor {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl Processor {
    /// The processor as it is now; `registers` are the MSRs that are [to be saved](msrs::to_save).
    pub(crate) fn save(vcpu: &VcpuFd, registers: &[u32]) -> Result<Self> {
        const CONTEXT: &str = "KVM did not tell a processor's state";
        // First: it has the processor take up what other processors have sent to it.
        let mp_state = vcpu.get_mp_state().host(CONTEXT)?;
        let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).host(CONTEXT)?;
        let nothing = kvm_cpuid_entry2::default();
        Ok(Self {
            // Some KVMs tell as many as they were asked for, of which the last are nothing.
            cpuid: cpuid.as_slice().iter().filter(|leaf| **leaf != nothing).copied().collect(),
            mp_state,
            regs: vcpu.get_regs().host(CONTEXT)?,
            sregs: vcpu.get_sregs().host(CONTEXT)?,
            xsave: vcpu.get_xsave().host(CONTEXT)?,
            xcrs: vcpu.get_xcrs().host(CONTEXT)?,
            debugregs: vcpu.get_debug_regs().host(CONTEXT)?,
            lapic: vcpu.get_lapic().host(CONTEXT)?,
            msrs: msrs::get(vcpu, registers)?,
            events: vcpu.get_vcpu_events().host(CONTEXT)?,
        })
    }

    /// Refuses what a new machine's processor, whose leaves of CPUID are `own`, could not have become by its guest's doing.
    /// KVM would take it, since who sets a processor's state may do more than its guest.
    pub(crate) fn check(&self, own: &[kvm_cpuid_entry2], with_signature: bool) -> Result<()> {
        cpu_model::check(&self.cpuid, own, with_signature)?;
        let in_msr =
            self.msrs.iter().filter(|msr| msr.index == MSR_EFER).fold(0, |efer, msr| efer | msr.data);
        if (self.sregs.efer | in_msr) & EFER_SVME != 0 {
            return Err(saved(
                "the saved machine's processors have nested virtualisation (EFER.SVME), here none has",
            ));
        }
        Ok(())
    }

    /// Refuses MSRs that no processor of this host's machines has, of which `registers` are [to be saved](msrs::to_save).
    pub(crate) fn check_msrs(&self, registers: &[u32]) -> Result<()> {
        msrs::check(&self.msrs, registers)
    }

    /// Makes a new processor this one.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let refused = "KVM did not take the state of a saved processor";
        let set = |done: Result<(), kvm_ioctls::Error>| done.map_err(|e| saved(refused).with_source(e));
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|e| saved(refused).with_source(e))?;
        set(vcpu.set_cpuid2(&cpuid))?;
        set(vcpu.set_mp_state(self.mp_state))?;
        set(vcpu.set_sregs(&self.sregs))?;
        set(vcpu.set_regs(&self.regs))?;
        set(vcpu.set_xcrs(&self.xcrs))?;
        // SAFETY: KVM reads more than this structure only where this process has asked for processor features
        // whose state is larger, which it has not.
        #[allow(unsafe_code, reason = "KVM reads as many bytes as its features need")]
        set(unsafe { vcpu.set_xsave(&self.xsave) })?;
        set(vcpu.set_debug_regs(&self.debugregs))?;
        set(vcpu.set_lapic(&self.lapic))?;
        if !self.msrs.iter().any(|msr| msr.index == msrs::MTRR_DEF_TYPE) {
            // Of one that was saved without the types of memory, they are as firmware leaves them.
            cpu::set_msrs(vcpu)?;
        }
        msrs::set(vcpu, &self.msrs)?;
        set(vcpu.set_vcpu_events(&self.events))
    }

    /// Where it goes on.
    #[cfg(test)]
    pub(crate) fn instruction_pointer(&self) -> u64 {
        self.regs.rip
    }

    /// For what nobody saves.
    #[cfg(test)]
    pub(crate) fn change(&mut self) -> (&mut Vec<kvm_cpuid_entry2>, &mut kvm_sregs, &mut Vec<kvm_msr_entry>) {
        (&mut self.cpuid, &mut self.sregs, &mut self.msrs)
    }
}

//! A processor as it is saved.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpu_model;
use crate::error::{HostContext, Result, saved};

/// `IA32_TSC_DEADLINE`: when the local APIC's timer ends. It is lost where it is written before the APIC is told
/// that it works so, and before the time stamp counter that it is compared with.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
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
    /// The processor as it is now; `msrs` are those that KVM may be asked for.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self> {
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
            msrs: get_msrs(vcpu, msrs)?,
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
        set_msrs(vcpu, &self.msrs)?;
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

/// Those of the registers that this processor has, in the order in which they have to be set.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let (last, first): (Vec<u32>, _) = indices.iter().partition(|index| **index == MSR_TSC_DEADLINE);
    let entries: Vec<_> =
        first.into_iter().chain(last).map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let (mut rest, mut known) = (&entries[..], Vec::new());
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(rest).host("there are more MSRs than KVM takes")?;
        let told = vcpu.get_msrs(&mut msrs).host("KVM did not tell a processor's MSRs")?;
        known.extend_from_slice(&msrs.as_slice()[..told]);
        // KVM stops at the first that it does not have.
        rest = rest.get(told + 1..).unwrap_or_default();
    }
    Ok(known)
}

fn set_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let refused = |what: String| saved(format!("KVM did not take {what} of a saved processor"));
    let mut rest = msrs;
    while !rest.is_empty() {
        let entries = Msrs::from_entries(rest).map_err(|e| refused("the MSRs".to_owned()).with_source(e))?;
        let taken = vcpu.set_msrs(&entries).map_err(|e| refused("the MSRs".to_owned()).with_source(e))?;
        let Some(stopped_at) = rest.get(taken) else { return Ok(()) };
        // Some can be read and not written. It does no harm where it has the value.
        let mut own = Msrs::from_entries(&[*stopped_at]).host("no memory for an MSR")?;
        let told = vcpu.get_msrs(&mut own).host("KVM did not tell an MSR")?;
        if told != 1 || own.as_slice()[0].data != stopped_at.data {
            return Err(refused(format!("MSR {:#x}", stopped_at.index)));
        }
        rest = &rest[taken + 1..];
    }
    Ok(())
}

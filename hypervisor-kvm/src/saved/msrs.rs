//! The model-specific registers of a processor, as they are saved (numbers of Intel's manual, volume 4, table 2-2).

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{HostContext, Result, saved};

/// `IA32_TSC_DEADLINE`: when the local APIC's timer ends. It is lost where it is written before the APIC is told
/// that it works so, and before the time stamp counter that it is compared with.
const TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_MTRR_DEF_TYPE`: whether the processor goes by the types of memory that the others give.
pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
/// The types of memory: by range, and of the first MiB.
const MTRRS: [(u32, u32); 5] = [(0x200, 16), (0x250, 1), (0x258, 2), (0x268, 8), (MTRR_DEF_TYPE, 1)];
/// What a bank of machine checks has that a guest sets: its switches, an address and more of an error.
const CHECK_BANK: u32 = 0x400;
const CHECK_BANKS: u32 = 32;
const CHECK_SETTABLE: [u32; 3] = [0, 2, 3];

/// Those that tell a guest of its processor and that no guest sets. A restored machine's are those of its host, as a new one's
/// are: the microcode's revision, what the platform is, which flaws the processor does not have, what counts its events, and
/// what of its virtualisation it would give on.
const HOSTS: [(u32, u32); 5] = [(0x8b, 1), (0xce, 1), (0x10a, 1), (0x345, 1), (0x480, 0x14)];

/// The registers to be saved, of those that KVM lists. It has the types of memory and the machine checks, and does not list
/// them.
pub(crate) fn to_save(listed: &[u32]) -> Arc<[u32]> {
    let types = MTRRS.iter().flat_map(|(first, count)| *first..first + count);
    let banks = (0..CHECK_BANKS).map(|bank| CHECK_BANK + 4 * bank);
    let checks = banks.flat_map(|bank| CHECK_SETTABLE.map(|settable| bank + settable));
    let mut all: Vec<u32> = listed.iter().copied().filter(|index| !is_hosts(*index)).collect();
    all.extend(types.chain(checks));
    // The deadline last.
    all.sort_by_key(|index| (*index == TSC_DEADLINE, *index));
    all.dedup();
    all.into()
}

/// Whether it is not the guest's.
fn is_hosts(index: u32) -> bool {
    HOSTS.iter().any(|(first, count)| (*first..first + count).contains(&index))
}

/// Refuses registers that are not [among those](to_save) of this host's machines. KVM would take more from who sets a
/// processor's state than from its guest.
pub(super) fn check(msrs: &[kvm_msr_entry], known: &[u32]) -> Result<()> {
    match msrs.iter().find(|msr| !known.contains(&msr.index) && !is_hosts(msr.index)) {
        Some(msr) => {
            Err(saved(format!("the saved machine's processors have MSR {:#x}, here none has", msr.index)))
        }
        None => Ok(()),
    }
}

/// Those of the registers that this processor has, in their order.
pub(super) fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let entries: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let (mut rest, mut known) = (&entries[..], Vec::new());
    while !rest.is_empty() {
        let mut msrs = of(first(rest))?;
        let told = vcpu.get_msrs(&mut msrs).host("KVM did not tell a processor's MSRs")?;
        known.extend_from_slice(&msrs.as_slice()[..told]);
        // KVM stops at the first that it does not have.
        let next = if told < first(rest).len() { told + 1 } else { told };
        rest = &rest[next..];
    }
    Ok(known)
}

/// Sets them in their order, but for those that are the host's.
pub(super) fn set(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let msrs: Vec<_> = msrs.iter().filter(|msr| !is_hosts(msr.index)).copied().collect();
    let mut rest = &msrs[..];
    while !rest.is_empty() {
        let taken = vcpu.set_msrs(&of(first(rest))?).map_err(|e| refused("the MSRs").with_source(e))?;
        rest = &rest[taken..];
        let Some((stopped_at, behind)) = rest.split_first().filter(|_| taken < KVM_MAX_MSR_ENTRIES) else {
            continue;
        };
        // Some can be read and not written. It does no harm where it has the value.
        let mut own = of(&[*stopped_at])?;
        let told = vcpu.get_msrs(&mut own).host("KVM did not tell an MSR")?;
        if told != 1 || own.as_slice()[0].data != stopped_at.data {
            return Err(refused(&format!("MSR {:#x}", stopped_at.index)));
        }
        rest = behind;
    }
    Ok(())
}

/// As many as KVM takes at a time.
fn first(msrs: &[kvm_msr_entry]) -> &[kvm_msr_entry] {
    &msrs[..msrs.len().min(KVM_MAX_MSR_ENTRIES)]
}

fn of(msrs: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(msrs).host("no memory for a processor's MSRs")
}

fn refused(what: &str) -> instance_core::machine::MachineError {
    saved(format!("KVM did not take {what} of a saved processor"))
}

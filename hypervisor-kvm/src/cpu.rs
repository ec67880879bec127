//! The state in which a processor starts.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::cpuid::{self, Topology};
use crate::error::{HostContext, Result};
use crate::kernel::Entry;
use crate::layout;
use crate::memory::Memory;

/// CR0: protected mode, a coprocessor of today's kind, paging.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// CR4: page tables with 64-bit entries.
const CR4_PAE: u64 = 1 << 5;
/// EFER: 64-bit mode enabled, and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// `IA32_MISC_ENABLE`: fast string operations, as firmware leaves it.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;
/// `IA32_MTRR_DEF_TYPE`: enabled, memory is write-back unless said otherwise.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local APIC registers: the two interrupt pins, and how they deliver.
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LAPIC_DELIVER_NMI: u32 = 0b100 << 8;
const LAPIC_DELIVER_EXTINT: u32 = 0b111 << 8;

/// Makes `vcpu` the processor with this number. The first one starts at `entry`; the others
/// wait for it to start them.
pub(crate) fn set_up(
    vcpu: &VcpuFd,
    number: u32,
    topology: Topology,
    model: &CpuId,
    entry: Entry,
    memory: &Memory,
) -> Result<()> {
    let cpuid = cpuid::of_processor(model, number, topology)?;
    vcpu.set_cpuid2(&cpuid).host("KVM did not take the processor's CPUID")?;
    set_interrupt_pins(vcpu)?;
    set_msrs(vcpu)?;
    if number == 0 {
        write_tables(memory, entry)?;
        start_at(vcpu, entry)?;
    }
    Ok(())
}

/// Has a processor start at `entry`, in its mode.
pub(crate) fn start_at(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let sregs = vcpu.get_sregs().host("KVM did not tell a processor's registers")?;
    vcpu.set_sregs(&system_registers(sregs, entry)).host("KVM did not take a processor's mode")?;
    vcpu.set_regs(&registers(entry)).host("KVM did not take a processor's registers")
}

/// The pins as firmware leaves them: the 8259's interrupts on the first, NMIs on the second.
fn set_interrupt_pins(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().host("KVM did not tell a local APIC's state")?;
    for (register, delivery) in
        [(LAPIC_LVT_LINT0, LAPIC_DELIVER_EXTINT), (LAPIC_LVT_LINT1, LAPIC_DELIVER_NMI)]
    {
        for (to, from) in lapic.regs[register..].iter_mut().zip(delivery.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&lapic).host("KVM did not take a local APIC's state")
}

/// Sets bits of MSRs, as firmware does.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    for (index, bits) in [(MSR_MISC_ENABLE, FAST_STRINGS), (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)] {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).host("no memory for an MSR")?;
        // A processor without the register is none the worse for it.
        if vcpu.get_msrs(&mut msrs).host("KVM did not tell an MSR")? == 1 {
            msrs.as_mut_slice()[0].data |= bits;
            vcpu.set_msrs(&msrs).host("KVM did not take an MSR")?;
        }
    }
    Ok(())
}

/// A descriptor table and, for 64-bit code, page tables that map the first four GiB to themselves.
fn write_tables(memory: &Memory, entry: Entry) -> Result<()> {
    let put = |address: u64, value: u64| {
        memory.write_obj(value, GuestAddress(address)).host("no memory for a processor's tables")
    };
    for (n, segment) in [(CODE, code_segment(entry)), (DATA, data_segment()), (TASK, task_segment())] {
        put(layout::GDT + u64::from(n), descriptor(&segment))?;
    }
    if let Entry::Linux64(_) = entry {
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE: u64 = 1 << 7;
        const TABLE: u64 = 0x1000;
        const GIBS: u64 = 4;
        let [top, middle, bottom] = [0, TABLE, 2 * TABLE].map(|at| layout::PAGE_TABLES + at);
        put(top, middle | PRESENT_WRITABLE)?;
        for gib in 0..GIBS {
            put(middle + 8 * gib, (bottom + TABLE * gib) | PRESENT_WRITABLE)?;
        }
        for n in 0..GIBS * 512 {
            put(bottom + 8 * n, n << 21 | LARGE | PRESENT_WRITABLE)?;
        }
    }
    Ok(())
}

/// Selectors, where Linux's 64-bit protocol has them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

fn code_segment(entry: Entry) -> kvm_segment {
    let long = matches!(entry, Entry::Linux64(_));
    kvm_segment { type_: 0xb, selector: CODE, l: long.into(), db: (!long).into(), ..data_segment() }
}

/// All four GiB, read and written.
fn data_segment() -> kvm_segment {
    kvm_segment { limit: !0, type_: 0x3, selector: DATA, present: 1, s: 1, db: 1, g: 1, ..Default::default() }
}

/// A busy task state segment, which processors want.
fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: 0xb, selector: TASK, present: 1, ..Default::default() }
}

/// A segment as an entry of a descriptor table (Intel SDM volume 3A, 3.4.5). Ours have base zero.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    limit & 0xffff
        | (limit >> 16 & 0xf) << 48
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

fn system_registers(reset: kvm_sregs, entry: Entry) -> kvm_sregs {
    let data = data_segment();
    let mut sregs = kvm_sregs {
        cs: code_segment(entry),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_segment(),
        cr0: CR0_PE | CR0_ET,
        ..reset
    };
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, TASK + 7);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    if let Entry::Linux64(_) = entry {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    sregs
}

fn registers(entry: Entry) -> kvm_regs {
    let stack = layout::BOOT_STACK;
    let start = kvm_regs { rflags: RFLAGS_RESERVED, rsp: stack, rbp: stack, ..Default::default() };
    match entry {
        Entry::Pvh(address) => kvm_regs { rip: address.into(), rbx: layout::PVH_START_INFO, ..start },
        Entry::Linux64(address) => kvm_regs { rip: address, rsi: layout::ZERO_PAGE, ..start },
        // The protocol wants zeroes in the other registers.
        Entry::Linux32(address) => kvm_regs { rip: address.into(), rsi: layout::ZERO_PAGE, rbp: 0, ..start },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        for (segment, expect) in [
            (code_segment(Entry::Linux64(0)), 0x00af_9b00_0000_ffff),
            (code_segment(Entry::Pvh(0)), 0x00cf_9b00_0000_ffff),
            (code_segment(Entry::Linux32(0)), 0x00cf_9b00_0000_ffff),
            (data_segment(), 0x00cf_9300_0000_ffff),
            (task_segment(), 0x0000_8b00_0000_0067),
        ] {
            assert_eq!(descriptor(&segment), expect, "{segment:?}");
        }
    }
}

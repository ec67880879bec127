//! What a processor tells of itself by CPUID (Intel SDM volume 2A; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{HostContext, Result};

/// Leaf 1, ECX: nested virtualisation and performance counters of Intel, the APIC's TSC deadline timer,
/// a hypervisor. EDX: several processors in the package.
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SEVERAL: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: nested virtualisation and performance counters of AMD.
const SVM: u32 = 1 << 2;
const PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
/// Leaves that describe nested virtualisation and performance counters.
const WITHHELD: [u32; 3] = [0xa, 0x8000_000a, 0x8000_0022];
/// Leaves that describe the extended topology.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// What KVM supports, for the processor with this number of so many, which are the cores of one
/// package.
///
/// Nested virtualisation and performance counters are left out: much of KVM that a guest could attack,
/// and few guests need them.
pub(crate) fn of_processor(supported: &CpuId, number: u32, count: u32) -> Result<CpuId> {
    // How many bits of an APIC id tell the cores of a package apart.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !TOPOLOGY.contains(&entry.function));
    let last = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count.min(255) << 16 | number << 24;
                entry.ecx = entry.ecx & !(VMX | PDCM) | TSC_DEADLINE | HYPERVISOR;
                entry.edx = if count > 1 { entry.edx | SEVERAL } else { entry.edx & !SEVERAL };
            }
            // Caches: the first two levels are a core's own, the third is the package's.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
                if entry.function == 0x4 {
                    entry.eax |= (((1 << core_bits) - 1) & 0x3f) << 26;
                }
            }
            0x8000_0001 => entry.ecx &= !(SVM | PERFORMANCE_COUNTERS),
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (count - 1) & 0xff,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (number, number, 0),
            leaf if WITHHELD.contains(&leaf) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    if last >= 0xb {
        entries.extend(topology(number, count, core_bits));
    }
    CpuId::from_entries(&entries).host("there are more CPUID leaves than KVM takes")
}

/// Leaf 0xb: one thread a core, then the cores of the package, then no more. KVM tells of the first only,
/// and not even that.
fn topology(number: u32, count: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    [(0, 0, 1, THREAD), (1, core_bits, count, CORE), (2, 0, 0, 0)].map(|(index, shift, processors, kind)| {
        kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: index | kind << 8,
            edx: number,
            ..Default::default()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ecx, ..Default::default() }
    }

    /// What a KVM says: of leaf 0xb one subleaf of zeroes.
    fn supported() -> CpuId {
        CpuId::from_entries(&[
            leaf(0, 0, 0x20, 0),
            leaf(1, 0, 0, VMX),
            leaf(4, 0, 1 << 5 | 1 | 1 << 14, 0),
            leaf(4, 1, 3 << 5 | 3, 0),
            leaf(0xa, 0, 5, 5),
            leaf(0xb, 0, 0, 0),
            leaf(0x1f, 0, 0, 0),
            leaf(0x8000_0001, 0, 0, SVM),
            leaf(0x8000_0008, 0, 48, 0),
            leaf(0x8000_000a, 0, 1, 0),
            leaf(0x8000_001d, 0, 1 << 5 | 1 | 1 << 14, 0),
            leaf(0x8000_001e, 0, 0, 0),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index));
        let entry = *found.next().unwrap_or_else(|| panic!("there is no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} is there twice");
        entry
    }

    #[test]
    fn processors_are_cores_of_one_package() {
        for (count, core_bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
            for number in 0..count {
                let cpuid = of_processor(&supported(), number, count).unwrap();
                let one = find(&cpuid, 1, 0);
                assert_eq!(one.ebx, count << 16 | number << 24);
                assert_eq!(one.edx & SEVERAL != 0, count > 1);
                let levels = [0, 1, 2].map(|index| find(&cpuid, 0xb, index));
                let told = levels.map(|level| (level.eax, level.ebx, level.ecx));
                assert_eq!(told, [(0, 1, 0x100), (core_bits, count, 0x201), (0, 0, 2)]);
                assert!(levels.iter().all(|l| l.edx == number && l.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
                assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, core_bits << 12 | (count - 1));
                let sharing = |leaf: u32, index| (find(&cpuid, leaf, index).eax >> 14 & 0xfff) + 1;
                assert_eq!([sharing(4, 0), sharing(0x8000_001d, 0)], [1, 1], "a core's own cache");
                assert_eq!(sharing(4, 1), 1 << core_bits, "the package's cache");
            }
        }
    }

    /// Machines of one image see the same processors, whichever of the host's said what it can.
    #[test]
    fn which_of_the_hosts_processors_was_asked_makes_no_difference() {
        let of = |asked: u32| {
            let mut supported = supported();
            for entry in supported.as_mut_slice() {
                match entry.function {
                    // Its number, and how many there are beside it.
                    0x1 => entry.ebx |= asked << 24 | 32 << 16,
                    0xb | 0x1f => (entry.ebx, entry.edx) = (32, asked),
                    0x8000_0008 => entry.ecx |= 5 << 12 | 31,
                    0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (asked, asked / 2, asked / 16),
                    _ => {}
                }
            }
            of_processor(&supported, 1, 4).unwrap()
        };
        assert_eq!(of(0).as_slice(), of(17).as_slice());
    }

    #[test]
    fn what_few_need_is_left_out() {
        let cpuid = of_processor(&supported(), 0, 1).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 0);
        for leaf in [0xa, 0x8000_000a] {
            assert_eq!(find(&cpuid, leaf, 0).eax, 0, "{leaf:#x}");
        }
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
    }
}

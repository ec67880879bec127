//! What a processor tells of itself by CPUID (Intel SDM volume 2A; AMD APM volume 3, appendix E).

use std::num::NonZeroU32;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{HostContext, Result, unsupported};

/// Leaf 1, ECX: the APIC's TSC deadline timer, a hypervisor. EDX: several processors in the package.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SEVERAL: u32 = 1 << 28;
/// AMD's leaf of a processor's thread and core.
pub(crate) const THREADS: u32 = 0x8000_001e;

/// How many processors a machine has, which are threads of the cores of one package.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    count: u32,
    threads_per_core: u32,
}

impl Topology {
    /// So many processors, which are whole cores.
    pub(crate) fn new(count: NonZeroU32, threads_per_core: NonZeroU32) -> Result<Self> {
        // So that the threads of all cores have APIC ids without a gap, which are their numbers.
        if !threads_per_core.is_power_of_two() {
            return Err(unsupported(format!(
                "kvm makes no cores of {threads_per_core} threads, but of 1, 2, 4, ..."
            )));
        }
        Ok(Self { count: count.get(), threads_per_core: threads_per_core.get() })
    }

    /// How many.
    pub(crate) fn count(self) -> u32 {
        self.count
    }

    /// How many bits of an APIC id tell the threads of a core apart.
    fn thread_bits(self) -> u32 {
        self.threads_per_core.trailing_zeros()
    }

    /// How many bits above them tell the cores of a package apart.
    fn core_bits(self) -> u32 {
        (self.count / self.threads_per_core).next_power_of_two().trailing_zeros()
    }

    /// How many bits tell its processors apart.
    fn package_bits(self) -> u32 {
        self.thread_bits() + self.core_bits()
    }
}

/// The [model](crate::cpu_model), for the processor with this number, which is its APIC id.
pub(crate) fn of_processor(model: &CpuId, number: u32, topology: Topology) -> Result<CpuId> {
    let Topology { count, threads_per_core } = topology;
    let (thread_bits, package_bits) = (topology.thread_bits(), topology.package_bits());
    let mut entries = model.as_slice().to_vec();
    let last = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count.min(255) << 16 | number << 24;
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx = if count > 1 { entry.edx | SEVERAL } else { entry.edx & !SEVERAL };
            }
            // Caches: the first two levels are a core's, the third is the package's.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let bits = if entry.eax >> 5 & 7 >= 3 { package_bits } else { thread_bits };
                entry.eax = entry.eax & 0x3fff | ((1 << bits) - 1) << 14;
                if entry.function == 0x4 {
                    entry.eax |= (((1 << topology.core_bits()) - 1) & 0x3f) << 26;
                }
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | package_bits << 12 | (count - 1) & 0xff,
            THREADS => {
                let core = number >> thread_bits;
                (entry.eax, entry.ebx, entry.ecx) = (number, core | (threads_per_core - 1) << 8, 0);
            }
            _ => {}
        }
    }
    if last >= 0xb {
        entries.extend(extended(number, topology));
    }
    CpuId::from_entries(&entries).host("there are more CPUID leaves than KVM takes")
}

/// Leaf 0xb: the threads of a core, then all of the package, then no more.
fn extended(number: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let threads = (0, topology.thread_bits(), topology.threads_per_core, THREAD);
    let cores = (1, topology.package_bits(), topology.count, CORE);
    [threads, cores, (2, 0, 0, 0)].map(|(index, shift, processors, kind)| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: number,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use instance_core::machine::MachineErrorKind;

    use super::*;

    fn leaf(function: u32, index: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ecx, ..Default::default() }
    }

    fn model() -> CpuId {
        CpuId::from_entries(&[
            leaf(0, 0, 0x20, 0),
            leaf(1, 0, 0, 0),
            leaf(4, 0, 1 << 5 | 1 | 1 << 14, 0),
            leaf(4, 1, 3 << 5 | 3, 0),
            leaf(0x8000_0008, 0, 48, 0),
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

    fn topology(count: u32, threads_per_core: u32) -> Result<Topology> {
        Topology::new(count.try_into().unwrap(), threads_per_core.try_into().unwrap())
    }

    #[test]
    fn processors_are_threads_of_the_cores_of_one_package() {
        for (count, threads, thread_bits, package_bits) in [
            (1, 1, 0, 0),
            (2, 1, 0, 1),
            (2, 2, 1, 1),
            (3, 1, 0, 2),
            (4, 1, 0, 2),
            (4, 2, 1, 2),
            (6, 2, 1, 3),
            (8, 4, 2, 3),
            (64, 1, 0, 6),
            (64, 2, 1, 6),
        ] {
            for number in 0..count {
                let cpuid = of_processor(&model(), number, topology(count, threads).unwrap()).unwrap();
                let one = find(&cpuid, 1, 0);
                assert_eq!(one.ebx, count << 16 | number << 24);
                assert_eq!(one.edx & SEVERAL != 0, count > 1);
                let levels = [0, 1, 2].map(|index| find(&cpuid, 0xb, index));
                let told = levels.map(|level| (level.eax, level.ebx, level.ecx));
                assert_eq!(told, [(thread_bits, threads, 0x100), (package_bits, count, 0x201), (0, 0, 2)]);
                assert!(levels.iter().all(|l| l.edx == number && l.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
                assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, package_bits << 12 | (count - 1));
                let own = find(&cpuid, 0x8000_001e, 0);
                assert_eq!(
                    (own.eax, own.ebx & 0xff, own.ebx >> 8, own.ecx),
                    (number, number / threads, threads - 1, 0)
                );
                let sharing = |leaf: u32, index| (find(&cpuid, leaf, index).eax >> 14 & 0xfff) + 1;
                assert_eq!([sharing(4, 0), sharing(0x8000_001d, 0)], [threads; 2], "a core's cache");
                assert_eq!(sharing(4, 1), 1 << package_bits, "the package's cache");
                let cores = [0, 1].map(|index| (find(&cpuid, 4, index).eax >> 26) + 1);
                assert_eq!(cores, [1 << (package_bits - thread_bits); 2], "{count} of {threads}");
            }
        }
        assert_eq!(topology(6, 3).unwrap_err().kind(), MachineErrorKind::Unsupported);
    }
}

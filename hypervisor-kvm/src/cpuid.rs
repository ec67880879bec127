//! What a processor tells of itself by CPUID (Intel SDM volume 2A; AMD APM volume 3, appendix E).

use std::num::NonZeroU32;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{HostContext, Result, unsupported};

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
/// And that there are AMD's leaves of caches and threads.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Leaves that describe nested virtualisation and performance counters.
const WITHHELD: [u32; 3] = [0xa, 0x8000_000a, 0x8000_0022];
/// Leaves that describe the extended topology.
const TOPOLOGY: [u32; 3] = [0xb, 0x1f, 0x8000_0026];

/// AMD's leaf of a processor's thread and core.
const THREADS: u32 = 0x8000_001e;
/// Leaf 0, EBX: `Auth` and `Hygo`, with which the names of AMD and of Hygon begin.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

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

/// What KVM supports, for the processor with this number, which is its APIC id.
///
/// Nested virtualisation and performance counters are left out: much of KVM that a guest could attack,
/// and few guests need them.
pub(crate) fn of_processor(supported: &CpuId, number: u32, topology: Topology) -> Result<CpuId> {
    let Topology { count, threads_per_core } = topology;
    let (thread_bits, package_bits) = (topology.thread_bits(), topology.package_bits());
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !TOPOLOGY.contains(&entry.function));
    let is_amd = entries.iter().any(|entry| entry.function == 0 && AMD.contains(&entry.ebx));
    if is_amd {
        add_leaf_of_threads(&mut entries);
    }
    let last = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count.min(255) << 16 | number << 24;
                entry.ecx = entry.ecx & !(VMX | PDCM) | TSC_DEADLINE | HYPERVISOR;
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
            0x8000_0000 if is_amd => entry.eax = entry.eax.max(THREADS),
            0x8000_0001 => {
                entry.ecx &= !(SVM | PERFORMANCE_COUNTERS);
                entry.ecx |= if is_amd { TOPOLOGY_EXTENSIONS } else { 0 };
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | package_bits << 12 | (count - 1) & 0xff,
            THREADS => {
                let core = number >> thread_bits;
                (entry.eax, entry.ebx, entry.ecx) = (number, core | (threads_per_core - 1) << 8, 0);
            }
            leaf if WITHHELD.contains(&leaf) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    if last >= 0xb {
        entries.extend(extended(number, topology));
    }
    CpuId::from_entries(&entries).host("there are more CPUID leaves than KVM takes")
}

/// Linux looks for threads of AMD's in this leaf alone, which emulated ones lack.
fn add_leaf_of_threads(entries: &mut Vec<kvm_cpuid_entry2>) {
    if entries.iter().all(|entry| entry.function != THREADS) {
        entries.push(kvm_cpuid_entry2 { function: THREADS, ..Default::default() });
    }
}

/// Leaf 0xb: the threads of a core, then all of the package, then no more. KVM tells of the first only,
/// and not even that.
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
                let cpuid = of_processor(&supported(), number, topology(count, threads).unwrap()).unwrap();
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

    #[test]
    fn processors_of_amds_tell_of_their_threads_even_where_the_hosts_do_not() {
        let named = |name: &[u8; 4]| {
            let own = kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*name), ..leaf(0, 0, 0xd, 0) };
            let entries = [own, leaf(0x8000_0000, 0, 0x8000_000a, 0), leaf(0x8000_0001, 0, 0, 0)];
            let supported = CpuId::from_entries(&entries).unwrap();
            of_processor(&supported, 5, topology(8, 2).unwrap()).unwrap()
        };
        let amd = named(b"Auth");
        assert_eq!(find(&amd, 0x8000_0000, 0).eax, 0x8000_001e);
        assert_eq!(find(&amd, 0x8000_0001, 0).ecx, TOPOLOGY_EXTENSIONS);
        let own = find(&amd, 0x8000_001e, 0);
        assert_eq!((own.eax, own.ebx), (5, 2 | 1 << 8));
        let intel = named(b"Genu");
        assert_eq!(find(&intel, 0x8000_0000, 0).eax, 0x8000_000a);
        assert_eq!(find(&intel, 0x8000_0001, 0).ecx, 0);
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
            of_processor(&supported, 1, topology(4, 1).unwrap()).unwrap()
        };
        assert_eq!(of(0).as_slice(), of(17).as_slice());
    }

    #[test]
    fn what_few_need_is_left_out() {
        let cpuid = of_processor(&supported(), 0, topology(1, 1).unwrap()).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 0);
        for leaf in [0xa, 0x8000_000a] {
            assert_eq!(find(&cpuid, leaf, 0).eax, 0, "{leaf:#x}");
        }
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
    }
}

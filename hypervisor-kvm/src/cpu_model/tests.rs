use super::*;

pub(super) fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// A processor that has everything there could be, of Intel's or of AMD's.
pub(super) fn everything(vendor: [u8; 4]) -> Vec<kvm_cpuid_entry2> {
    let mut entries = vec![leaf(0, 0, [0x24, u32::from_le_bytes(vendor), 1, 2])];
    entries.extend((1..=0x24).filter(|n| ![0x7, 0xd].contains(n)).map(|n| leaf(n, 0, [!0; 4])));
    entries.extend([0, 1, 2].map(|index| leaf(0x7, index, [!0; 4])));
    entries.extend([leaf(0xd, 0, [!0; 4]), leaf(0xd, 1, [!0; 4])]);
    entries.extend(
        [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)]
            .map(|(state, size, offset)| leaf(0xd, state, [size, offset, 0, 0])),
    );
    entries.push(leaf(0xd, 18, [8192, 2816, 2, 0]));
    entries.push(leaf(0x4000_0001, 0, [!0; 4]));
    entries.extend((0..=0x26).map(|n| leaf(0x8000_0000 + n, 0, [!0; 4])));
    entries
}

pub(super) fn model(entries: &[kvm_cpuid_entry2], level: CpuLevel) -> Vec<kvm_cpuid_entry2> {
    of_level(&CpuId::from_entries(entries).unwrap(), level).unwrap().as_slice().to_vec()
}

/// What a leaf says, or zeroes, as KVM says of one that is not there.
fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
    let mut found = entries.iter().filter(|e| (e.function, e.index) == (function, index)).map(registers);
    let first = found.next().unwrap_or_default();
    assert!(found.next().is_none(), "leaf {function:#x}.{index} is there twice");
    first
}

pub(super) const LEVELS: [CpuLevel; 4] = [CpuLevel::V1, CpuLevel::V2, CpuLevel::V3, CpuLevel::V4];

#[test]
fn the_level_is_the_highest_of_which_nothing_lacks() {
    for (lacks, register, bit, level) in [
        ((0x7, 1), Eax, 4, CpuLevel::V4),
        ((0x7, 0), Ebx, 31, CpuLevel::V3),
        ((0xd, 0), Eax, 6, CpuLevel::V3),
        ((0x7, 0), Ebx, 5, CpuLevel::V2),
        ((0xd, 0), Eax, 2, CpuLevel::V2),
        ((0x1, 0), Ecx, 13, CpuLevel::V1),
    ] {
        let mut host = everything(*b"Genu");
        let entry = host.iter_mut().find(|e| (e.function, e.index) == lacks).unwrap();
        let [eax, ebx, ecx, edx] = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
        *[eax, ebx, ecx, edx][register as usize] &= !(1 << bit);
        let host = CpuId::from_entries(&host).unwrap();
        assert_eq!(CpuLevel::highest(&host), level, "without bit {bit} of {register:?} of {lacks:x?}");
        assert!(LEVELS.iter().all(|other| other.is_supported(&host) == (*other <= level)));
    }
}

#[test]
fn hosts_that_have_more_than_the_level_make_no_difference() {
    for vendor in [*b"Genu", *b"Auth"] {
        for level in LEVELS {
            let all = everything(vendor);
            let expect = model(&all, level);
            // A host that has just what the level has: what is masked stays as it is.
            let exact = model(&expect, level);
            for (function, index) in all.iter().map(|entry| (entry.function, entry.index)) {
                let of = |entries: &[kvm_cpuid_entry2]| find(entries, function, index);
                assert_eq!(of(&exact), of(&expect), "{level}: {function:#x}.{index}");
            }
        }
    }
}

#[test]
fn what_no_guest_needs_is_left_out() {
    for vendor in [*b"Genu", *b"Auth"] {
        for level in LEVELS {
            let own = model(&everything(vendor), level);
            // Nested virtualisation, performance counters, transactions, SGX, traces, AMX, encrypted memory.
            assert_eq!(find(&own, 1, 0)[2] & (1 << 5 | 1 << 15), 0);
            assert_eq!(find(&own, 0x8000_0001, 0)[2] & (1 << 2 | 1 << 23 | 1 << 24 | 1 << 28), 0);
            assert_eq!(find(&own, 7, 0)[1] & (1 << 2 | 1 << 4 | 1 << 11), 0);
            for function in
                [0x5, 0xa, 0xb, 0x12, 0x14, 0x15, 0x16, 0x1d, 0x1f, 0x8000_000a, 0x8000_001f, 0x8000_0026]
            {
                assert_eq!(find(&own, function, 0), [0; 4], "{level}: {function:#x}");
            }
            assert_eq!((find(&own, 7, 0)[0], find(&own, 7, 1)), (2, [0; 4]), "{level}");
            // What protects the guest is as the host has it.
            assert_eq!(find(&own, 7, 0)[3] & 0xac00_0400, 0xac00_0400, "{level}");
            let mut host = everything(vendor);
            // Zen 3 and Skylake, whose flaws are not those of the first processors of their level.
            let signature = if vendor == *b"Auth" { 0x00a2_0f10 } else { 0x0005_06e3 };
            host.iter_mut().find(|e| e.function == 1).unwrap().eax = signature;
            assert_eq!(find(&model(&host, level), 1, 0)[0], signature, "{level}");
            assert_eq!(find(&own, 0x4000_0001, 0), [!0; 4]);
        }
    }
}

#[test]
fn saved_states_are_those_of_the_level() {
    for (level, states, size) in [(CpuLevel::V2, 0, 0), (CpuLevel::V3, 0x7, 832), (CpuLevel::V4, 0x2e7, 2696)]
    {
        let own = model(&everything(*b"Genu"), level);
        let [eax, _, ecx, edx] = find(&own, 0xd, 0);
        assert_eq!((eax, ecx, edx), (states, size, 0), "{level}");
        for state in 2..32 {
            assert_eq!(find(&own, 0xd, state) != [0; 4], states >> state & 1 != 0, "{level}: {state}");
        }
    }
}

#[test]
fn processors_have_a_name_and_caches_of_ours() {
    for (vendor, caches) in [(*b"Genu", 0x4), (*b"Auth", 0x8000_001d)] {
        let own = model(&everything(vendor), CpuLevel::V3);
        let words = [2, 3, 4].map(|n| find(&own, 0x8000_0000 + n, 0));
        let text: Vec<u8> = words.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(text.trim_ascii_end(), [&b"AMI x86-64-v3 Processor"[..], &[0; 25]].concat());
        let sizes = [0, 1, 2, 3].map(|index| {
            let [_, ebx, ecx, _] = find(&own, caches, index);
            ((ebx >> 22) + 1) * ((ebx & 0xfff) + 1) * (ecx + 1) / 1024
        });
        assert_eq!(sizes, [32, 32, 1 << 10, 32 << 10]);
        assert_eq!(find(&own, caches, 4), [0; 4]);
    }
}

/// Linux looks for threads in a leaf that emulated processors lack.
#[test]
fn processors_of_amds_have_a_leaf_of_threads() {
    for (vendor, has) in [(*b"Genu", false), (*b"Auth", true)] {
        let mut host = everything(vendor);
        host.retain(|entry| entry.function <= 0x8000_000a);
        let own = model(&host, CpuLevel::V3);
        assert_eq!(find(&own, 0x8000_0001, 0)[2] >> 22 & 1 != 0, has);
        assert_eq!(own.iter().any(|entry| entry.function == THREADS), has);
        assert_eq!(find(&own, 0x8000_0000, 0)[0] >= THREADS, has);
    }
}

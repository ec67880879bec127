//! What processors a machine has, whatever the host's: the features of a level, under a name of ours.

mod within;

use std::fmt;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use self::Register::{Eax, Ebx, Ecx, Edx};
use self::Whose::{All, Amd, Intel, Level};
pub(crate) use self::within::check;
use crate::cpuid::THREADS;
use crate::error::{HostContext, Result};

/// The features of a guest's processors: a level of the x86-64 psABI ("Micro-Architecture Levels"), and beside it what the
/// oldest processors of that level have, of Intel's (Nehalem, Haswell, Skylake-SP) or of AMD's (Bulldozer, Zen, Zen 4).
///
/// Guests of a level see equal features, caches and threads on all hosts of that level and vendor, but for what a host lacks of its
/// level, and for what the host's KVM offers by itself. What a guest protects itself by is as its host has it: speculation control,
/// and family, model and stepping, from which kernels conclude which flaws there are. So equal images see equal processors on
/// equal hosts, and programs find the same instructions on all of the level.
///
/// ```
/// use hypervisor_kvm::{CpuLevel, Kvm};
/// use instance_core::machine::MachineErrorKind;
///
/// assert_eq!(CpuLevel::V3.to_string(), "x86-64-v3");
/// if let Ok(kvm) = Kvm::open() {
///     println!("guests may be built for {}", kvm.cpu_level());
///     match kvm.with_cpu_level(CpuLevel::V4) {
///         Ok(kvm) => assert_eq!(kvm.cpu_level(), CpuLevel::V4),
///         Err(e) => assert_eq!(e.kind(), MachineErrorKind::Unsupported),
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum CpuLevel {
    /// `x86-64`: what every processor with 64 bits has.
    V1,
    /// `x86-64-v2`: to SSE4.2.
    V2,
    /// `x86-64-v3`: AVX2.
    V3,
    /// `x86-64-v4`: AVX-512.
    V4,
}

impl CpuLevel {
    /// The highest of which a processor has everything.
    pub(crate) fn highest(supported: &CpuId) -> Self {
        [Self::V4, Self::V3, Self::V2]
            .into_iter()
            .find(|level| level.is_supported(supported))
            .unwrap_or(Self::V1)
    }

    /// Whether a processor has everything that belongs to the level.
    pub(crate) fn is_supported(self, supported: &CpuId) -> bool {
        let mut needed = FEATURES.iter().filter(|row| row.0 <= self && row.1 == Level);
        needed.all(|(_, _, (function, index, register), bits)| {
            let entry = supported.as_slice().iter().find(|e| (e.function, e.index) == (*function, *index));
            entry.is_some_and(|entry| registers(entry)[*register as usize] & bits == *bits)
        })
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V1 => "x86-64",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// Leaf 0, EBX: `Auth` and `Hygo`, with which the names of AMD and of Hygon begin.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

fn is_amd(cpuid: &[kvm_cpuid_entry2]) -> bool {
    cpuid.iter().any(|entry| entry.function == 0 && AMD.contains(&entry.ebx))
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Whose processors have features of a level.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Whose {
    /// All do, for the level is made of them.
    Level,
    All,
    Intel,
    Amd,
}

/// Leaf, subleaf and register.
type Place = (u32, u32, Register);

/// From which level on, whose, where, which bits. What is not in it no guest sees: nested virtualisation and performance
/// counters are much of KVM that a guest could attack, and transactions (TSX) hosts take away by microcode.
const FEATURES: &[(CpuLevel, Whose, Place, u32)] = &[
    // All of the first processors with 64 bits: MMX, SSE, SSE2 among it; not debug store, thermal monitors and the like.
    (CpuLevel::V1, All, (0x1, 0, Edx), 0x0f8b_fbff),
    // SYSCALL, NX, 64 bits. AMD: FFXSR, MMX extensions, and those of leaf 1 once more.
    (CpuLevel::V1, All, (0x8000_0001, 0, Edx), 1 << 11 | 1 << 20 | 1 << 29),
    (CpuLevel::V1, Amd, (0x8000_0001, 0, Edx), 0x0183_f3ff | 1 << 22 | 1 << 25),
    // AMD: CR8 in 32-bit mode.
    (CpuLevel::V1, Amd, (0x8000_0001, 0, Ecx), 1 << 4),
    // KVM has these on any host: x2APIC, a timer that does not stop, TSC_ADJUST.
    (CpuLevel::V1, All, (0x1, 0, Ecx), 1 << 21),
    (CpuLevel::V1, All, (0x6, 0, Eax), 1 << 2),
    (CpuLevel::V1, All, (0x7, 0, Ebx), 1 << 1),
    // A time stamp counter of one speed.
    (CpuLevel::V1, All, (0x8000_0007, 0, Edx), 1 << 8),
    // Speculation control: what a guest lacks of this it is attacked by, so that it sees what its host has.
    // MD_CLEAR, IBRS, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
    (CpuLevel::V1, All, (0x7, 0, Edx), 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31),
    // PSFD, IPRED, RRSBA, DDPD, BHI, MCDT_NO.
    (CpuLevel::V1, All, (0x7, 2, Edx), 0x3f),
    // IBPB, IBRS, STIBP and how they are best used, SSBD, PSFD, BTC_NO, IBPB_RET.
    (
        CpuLevel::V1,
        All,
        (0x8000_0008, 0, Ebx),
        0x7 << 24 | 0x7 << 16 | 0x7 << 28 | 1 << 12 | 1 << 14 | 1 << 15,
    ),
    // LFENCE, VERW, null selectors, automatic IBRS, SBPB, IBPB_BRTYPE, SRSO; TSA.
    (CpuLevel::V1, Amd, (0x8000_0021, 0, Eax), 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 0xf << 27),
    (CpuLevel::V1, Amd, (0x8000_0021, 0, Ecx), 1 << 1 | 1 << 2),
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF.
    (CpuLevel::V2, Level, (0x1, 0, Ecx), 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23),
    (CpuLevel::V2, Level, (0x8000_0001, 0, Ecx), 1),
    // RDTSCP.
    (CpuLevel::V2, All, (0x8000_0001, 0, Edx), 1 << 27),
    // FMA, MOVBE, XSAVE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT.
    (CpuLevel::V3, Level, (0x1, 0, Ecx), 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29),
    (CpuLevel::V3, Level, (0x7, 0, Ebx), 1 << 3 | 1 << 5 | 1 << 8),
    (CpuLevel::V3, Level, (0x8000_0001, 0, Ecx), 1 << 5),
    // PCLMULQDQ, AES, RDRAND; FSGSBASE, SMEP; pages of 1 GiB.
    (CpuLevel::V3, All, (0x1, 0, Ecx), 1 << 1 | 1 << 25 | 1 << 30),
    (CpuLevel::V3, All, (0x7, 0, Ebx), 1 << 0 | 1 << 7),
    (CpuLevel::V3, All, (0x8000_0001, 0, Edx), 1 << 26),
    // States of x87, SSE and AVX; XSAVEOPT.
    (CpuLevel::V3, Level, (0xd, 0, Eax), 0x7),
    (CpuLevel::V3, All, (0xd, 1, Eax), 1),
    // Haswell: PCID; ERMS, INVPCID.
    (CpuLevel::V3, Intel, (0x1, 0, Ecx), 1 << 17),
    (CpuLevel::V3, Intel, (0x7, 0, Ebx), 1 << 9 | 1 << 10),
    // Zen: RDSEED, ADX, SMAP, CLFLUSHOPT, SHA; XSAVEC, XGETBV of 1, XSAVES; SSE4a, misaligned SSE, PREFETCHW; CLZERO, XSAVEERPTR.
    (CpuLevel::V3, Amd, (0x7, 0, Ebx), 0x7 << 18 | 1 << 23 | 1 << 29),
    (CpuLevel::V3, Amd, (0xd, 1, Eax), 0xf),
    (CpuLevel::V3, Amd, (0x8000_0001, 0, Ecx), 0x7 << 6),
    (CpuLevel::V3, Amd, (0x8000_0008, 0, Ebx), 1 << 0 | 1 << 2),
    // AVX512F, DQ, CD, BW, VL, and their states.
    (CpuLevel::V4, Level, (0x7, 0, Ebx), 0x3 << 16 | 1 << 28 | 0x3 << 30),
    (CpuLevel::V4, Level, (0xd, 0, Eax), 0xe0),
    // PCID; ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB; PKU and its state; XSAVEC, XGETBV of 1, XSAVES; PREFETCHW.
    (CpuLevel::V4, All, (0x1, 0, Ecx), 1 << 17),
    (CpuLevel::V4, All, (0x7, 0, Ebx), 0x3 << 9 | 0x7 << 18 | 0x3 << 23),
    (CpuLevel::V4, All, (0x7, 0, Ecx), 1 << 3),
    (CpuLevel::V4, All, (0xd, 0, Eax), 1 << 9),
    (CpuLevel::V4, All, (0xd, 1, Eax), 0xf),
    (CpuLevel::V4, All, (0x8000_0001, 0, Ecx), 1 << 8),
    // Zen 4: AVX512_IFMA; VBMI, UMIP, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, RDPID; FSRM.
    (CpuLevel::V4, Amd, (0x7, 0, Ebx), 1 << 21),
    (CpuLevel::V4, Amd, (0x7, 0, Ecx), 0x3 << 1 | 0x7f << 6 | 1 << 14 | 1 << 22),
    (CpuLevel::V4, Amd, (0x7, 0, Edx), 1 << 4),
];

/// Leaf 0x8000_0001, ECX: AMD's leaves of caches and threads are there. Linux looks for threads of AMD's there alone, also on
/// hosts that lack them, as emulated ones do.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Type, level, ways, sets, in lines of 64 bytes: 32 KiB of data, 32 KiB of code, 1 MiB, and 32 MiB.
const CACHES: [(u32, u32, u32, u32); 4] =
    [(1, 1, 8, 64), (2, 1, 8, 64), (3, 2, 16, 1024), (3, 3, 16, 32_768)];
/// More bits of a physical address no guest is told of: Haswell's servers have as many.
const ADDRESS_BITS: u32 = 46;
/// The area of XSAVE without extended states: x87, SSE, its header.
const XSAVE_AREA: u32 = 576;

/// Processors of this level, of what KVM supports.
pub(crate) fn of_level(supported: &CpuId, level: CpuLevel) -> Result<CpuId> {
    let is_amd = is_amd(supported.as_slice());
    let states = allowed(level, is_amd, 0xd, 0)[0];
    let mut entries = Vec::new();
    for entry in supported.as_slice() {
        let mut own = masked(entry, allowed(level, is_amd, entry.function, entry.index));
        match entry.function {
            0 => own = kvm_cpuid_entry2 { eax: entry.eax.min(0xd), ..*entry },
            // Family, model and stepping, by which a guest chooses how to protect itself: Zen 3 needs another way of returning
            // than Zen, and Skylake does not return safely at all. A line of the cache has 8 times 8 bytes.
            0x1 => (own.eax, own.ebx) = (entry.eax, 8 << 8),
            // Whoever asks what caches there are finds them by the leaf of caches.
            0x2 if !is_amd => own.eax = 0xff01,
            // Subleaves to the one of speculation control.
            0x7 if entry.index == 0 => own.eax = 2,
            0xd if entry.index == 0 && states != 0 => {
                (own.ebx, own.ecx) = (XSAVE_AREA, xsave_area(supported, states))
            }
            0xd if entry.index > 1 && entry.index < 32 && states >> entry.index & 1 != 0 => own = *entry,
            // KVM's own.
            0x4000_0000..=0x4000_ffff => own = *entry,
            0x8000_0000 => own.eax = if is_amd { 0x8000_0021 } else { 0x8000_0008 },
            0x8000_0001 if is_amd => own.ecx |= TOPOLOGY_EXTENSIONS,
            0x8000_0002..=0x8000_0004 => own = name(level, entry.function),
            0x8000_0005 if is_amd => {
                let cache = 32 << 24 | 8 << 16 | 1 << 8 | 64;
                (own.eax, own.ebx, own.ecx, own.edx) = (0x01ff_01ff, 0x01ff_01ff, cache, cache);
            }
            0x8000_0006 => {
                own.ecx = 1024 << 16 | 8 << 12 | 1 << 8 | 64;
                if is_amd {
                    (own.ebx, own.edx) = (0x4200_4200, 64 << 18 | 8 << 12 | 1 << 8 | 64);
                }
            }
            0x8000_0008 => own.eax = (entry.eax & 0xff).min(ADDRESS_BITS) | 48 << 8,
            _ => {}
        }
        if registers(&own) != [0; 4] {
            entries.push(own);
        }
    }
    entries.extend(caches(if is_amd { 0x8000_001d } else { 0x4 }));
    if is_amd {
        entries.push(kvm_cpuid_entry2 { function: THREADS, ..Default::default() });
    }
    CpuId::from_entries(&entries).host("there are more CPUID leaves than KVM takes")
}

/// The bits of a leaf that processors of the level have.
fn allowed(level: CpuLevel, is_amd: bool, function: u32, index: u32) -> [u32; 4] {
    let mut bits = [0; 4];
    let other = if is_amd { Intel } else { Amd };
    for (from, whose, (leaf, subleaf, register), more) in FEATURES {
        if *from <= level && *whose != other && (*leaf, *subleaf) == (function, index) {
            bits[*register as usize] |= more;
        }
    }
    bits
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn masked(entry: &kvm_cpuid_entry2, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        eax: entry.eax & eax,
        ebx: entry.ebx & ebx,
        ecx: entry.ecx & ecx,
        edx: entry.edx & edx,
        ..*entry
    }
}

/// The most that XSAVE needs with these states, as far as KVM has them.
fn xsave_area(supported: &CpuId, states: u32) -> u32 {
    let extended = supported.as_slice().iter().filter(|e| e.function == 0xd && (2..32).contains(&e.index));
    let kept = extended.filter(|entry| states >> entry.index & 1 != 0);
    kept.map(|entry| entry.eax.saturating_add(entry.ebx)).fold(XSAVE_AREA, u32::max)
}

/// A third of the processor's name.
fn name(level: CpuLevel, function: u32) -> kvm_cpuid_entry2 {
    let mut text = [0; 48];
    text.iter_mut().zip(format!("AMI {level} Processor").bytes()).for_each(|(to, byte)| *to = byte);
    let word = |n: usize| {
        let at = 16 * (function - 0x8000_0002) as usize + 4 * n;
        text[at..at + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
    };
    kvm_cpuid_entry2 {
        function,
        eax: word(0),
        ebx: word(1),
        ecx: word(2),
        edx: word(3),
        ..Default::default()
    }
}

/// The caches, and that there are no more.
fn caches(function: u32) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let leaf = move |index| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..Default::default()
    };
    let cache = move |(index, (kind, level, ways, sets)): (u32, (u32, u32, u32, u32))| kvm_cpuid_entry2 {
        // It needs no software to initialise it.
        eax: 1 << 8 | level << 5 | kind,
        ebx: (ways - 1) << 22 | 63,
        ecx: sets - 1,
        ..leaf(index)
    };
    (0..).zip(CACHES).map(cache).chain([leaf(CACHES.len() as u32)])
}

#[cfg(test)]
mod tests;

//! Whether the processors of a saved machine, which are anybody's, are among those that new machines have here.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use self::Rule::{AtMost, Bits, Same, Told};
use super::registers;
use crate::error::{Result, saved};

/// What a register may be where a new machine's processors have a certain one.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Abilities: none that is not in it, beside these, which KVM sets where the guest has switched something on.
    Bits(u32),
    /// Numbers of a byte each: none that is higher.
    AtMost,
    /// This one.
    Same,
    /// Any: guests are told it, and KVM makes nothing of it.
    Told,
}

/// Leaf 1, ECX and leaf 7, ECX: the guest has switched on XSAVE, and protection keys.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

/// The rules of a leaf's registers. Abilities are what most are about.
fn rules(function: u32, index: u32) -> [Rule; 4] {
    const NO_MORE: Rule = Bits(0);
    match (function, index) {
        // The last leaf, and the vendor or the hypervisor.
        (0x0 | 0x4000_0000, _) => [AtMost, Same, Same, Same],
        // Family, model and stepping; the processor's number, and how many there are.
        (0x1, _) => [Same, Told, Bits(OSXSAVE), NO_MORE],
        // Caches, threads, cores; a name.
        (0x2 | 0x4 | 0xb | 0x8000_0002..=0x8000_0006 | 0x8000_001d | 0x8000_001e, _) => [Told; 4],
        // The last subleaf.
        (0x7, 0) => [AtMost, NO_MORE, Bits(OSPKE), NO_MORE],
        // Sizes of what XSAVE writes, of the states that are switched on and of all.
        (0xd, 0) => [NO_MORE, Told, Told, NO_MORE],
        (0xd, 1) => [NO_MORE, Told, NO_MORE, NO_MORE],
        // Where in it a state lies.
        (0xd, _) => [Same; 4],
        (0x8000_0000, _) => [AtMost, NO_MORE, NO_MORE, NO_MORE],
        // The bits of addresses; cores.
        (0x8000_0008, _) => [AtMost, NO_MORE, Told, NO_MORE],
        _ => [NO_MORE; 4],
    }
}

impl Rule {
    fn allows(self, is: u32, own: u32) -> bool {
        match self {
            Bits(beside) => is & !own & !beside == 0,
            AtMost => is.to_le_bytes().iter().zip(own.to_le_bytes()).all(|(is, own)| *is <= own),
            Same => is == own,
            Told => true,
        }
    }
}

/// What processors told of their family, model and stepping before version 3, by level and vendor. A machine that was restored of
/// such a version has them still when it is saved again.
const OLD_SIGNATURES: [u32; 6] =
    [0x0001_06a5, 0x0003_06f2, 0x0005_0654, 0x0060_0f20, 0x0080_0f12, 0x00a1_0f11];

/// Refuses a processor that has anything which a new machine's, whose leaves are `own`, has not. Its signature, leaf 1's
/// EAX, may be another where it was not its host's.
pub(crate) fn check(
    leaves: &[kvm_cpuid_entry2],
    own: &[kvm_cpuid_entry2],
    with_signature: bool,
) -> Result<()> {
    // A leaf that is not marked so is all of its subleaves to KVM.
    let key = |e: &kvm_cpuid_entry2| (e.function, e.index, e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    // One that is all zeroes is none: before Linux 6.5, KVM told as many as it was asked for, and so of some leaf 0 that are.
    for leaf in leaves.iter().filter(|leaf| registers(leaf) != [0; 4]) {
        let of_own = own.iter().find(|entry| key(entry) == key(leaf)).map(registers);
        // What KVM is told nothing of it says zeroes of.
        let pairs = registers(leaf).into_iter().zip(of_own.unwrap_or_default());
        let places = rules(leaf.function, leaf.index).into_iter().zip(["EAX", "EBX", "ECX", "EDX"]);
        for ((is, own), (rule, register)) in pairs.zip(places) {
            let is_signature = (leaf.function, register) == (0x1, "EAX");
            let old = is_signature && (!with_signature || OLD_SIGNATURES.contains(&is));
            if !rule.allows(is, own) && !old {
                return Err(saved(format!(
                    "the saved machine's processors are not such as machines have here: \
                     CPUID leaf {:#x}.{}, {register} is {is:#x}, here {own:#x}",
                    leaf.function, leaf.index
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use instance_core::machine::MachineErrorKind;

    use super::super::CpuLevel;
    use super::super::tests::{LEVELS, everything, leaf, model};
    use super::*;

    #[test]
    fn levels_are_within_higher_ones_of_their_vendor() {
        for vendor in [*b"Genu", *b"Auth"] {
            let other = if vendor == *b"Genu" { *b"Auth" } else { *b"Genu" };
            for (had, here) in LEVELS.iter().flat_map(|had| LEVELS.map(|here| (*had, here))) {
                let [own, others] = [vendor, other].map(|vendor| model(&everything(vendor), here));
                let saved = model(&everything(vendor), had);
                assert_eq!(check(&saved, &own, true).is_ok(), had <= here, "{had} on {here}");
                let refused = check(&saved, &others, true).unwrap_err().to_string();
                assert!(refused.contains("CPUID leaf 0x0.0, EBX"), "{refused}");
            }
        }
    }

    #[test]
    fn whatever_a_new_machine_lacks_is_refused_and_named() {
        let mut own = model(&everything(*b"Genu"), CpuLevel::V3);
        let [k, v, m] = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
        own.push(leaf(0x4000_0000, 0, [0x4000_0001, k, v, m]));
        type Change = fn(&mut kvm_cpuid_entry2);
        let refused: [(u32, u32, Change, &str); 12] = [
            (0x0, 0, |e| e.eax = 0xe, "leaf 0x0.0, EAX is 0xe, here 0xd"),
            (0x1, 0, |e| e.eax ^= 1 << 4, "leaf 0x1.0, EAX"),
            // Nested virtualisation: Intel's.
            (0x1, 0, |e| e.ecx |= 1 << 5, "leaf 0x1.0, ECX"),
            (0x7, 0, |e| e.ebx |= 1 << 16, "leaf 0x7.0, EBX"),
            (0x7, 0, |e| e.eax = 3, "leaf 0x7.0, EAX"),
            (0xd, 0, |e| e.eax |= 0xe0, "leaf 0xd.0, EAX"),
            (0xd, 2, |e| e.ebx += 64, "leaf 0xd.2, EBX"),
            // Hyper-V, which KVM has where the leaf says so.
            (0x4000_0000, 0, |e| e.ebx += 1, "leaf 0x40000000.0, EBX"),
            // More bits of addresses, though fewer of virtual ones.
            (0x8000_0008, 0, |e| e.eax = 52 | 47 << 8, "leaf 0x80000008.0, EAX"),
            (0x8000_0001, 0, |e| e.edx |= 1 << 30, "leaf 0x80000001.0, EDX"),
            // A leaf that is not there, and one that is all subleaves of one that is.
            (
                0x1,
                0,
                |e| *e = kvm_cpuid_entry2 { function: 0xa, eax: 1, ..Default::default() },
                "leaf 0xa.0, EAX",
            ),
            (0xd, 2, |e| e.flags ^= KVM_CPUID_FLAG_SIGNIFCANT_INDEX, "leaf 0xd.2, EAX"),
        ];
        for (function, index, change, expect) in refused {
            let mut saved = own.clone();
            change(saved.iter_mut().find(|e| (e.function, e.index) == (function, index)).unwrap());
            let error = check(&saved, &own, true).unwrap_err();
            assert_eq!(error.kind(), MachineErrorKind::Saved);
            assert!(error.to_string().contains(expect), "{error}, not {expect}");
        }
        let allowed: [(u32, u32, Change); 7] = [
            (0x4, 0, |e| *e = kvm_cpuid_entry2::default()),
            (0x1, 0, |e| e.ecx |= OSXSAVE),
            (0x1, 0, |e| e.ebx = 7 << 24),
            (0x1, 0, |e| e.ecx &= 1),
            (0x4, 0, |e| e.eax = 5),
            (0xd, 0, |e| e.ebx = 832),
            (0x8000_0008, 0, |e| e.eax = 39 | 48 << 8),
        ];
        for (function, index, change) in allowed {
            let mut saved = own.clone();
            change(saved.iter_mut().find(|e| (e.function, e.index) == (function, index)).unwrap());
            check(&saved, &own, true).unwrap();
        }
        // One of an earlier version, which made its signature up, and the same saved again by this.
        let with_signature = |signature: u32| {
            let mut saved = own.clone();
            saved.iter_mut().find(|e| e.function == 0x1).unwrap().eax = signature;
            [false, true].map(|checked| check(&saved, &own, checked).is_ok())
        };
        assert_eq!(with_signature(0x0003_06f2), [true, true]);
        assert_eq!(with_signature(0x0003_06f3), [true, false]);
    }
}

//! EC2's instance types as data (EC2 Instance Types guide, "Specifications"; DescribeInstanceTypes).

use ami_core::Architecture;

/// A family: what all its sizes share, and its sizes.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) architectures: &'static [Architecture],
    pub(super) sizes: &'static [Size],
}

/// Name, vCPUs, MiB of memory, network performance; network bandwidth in Mbps, baseline and most, if it is specified; and
/// the same of EBS, if the type is optimised for it.
pub(super) type Size = (&'static str, u32, u32, &'static str, Option<(u32, u32)>, Option<(u32, u32)>);

const BOTH_X86: &[Architecture] = &[Architecture::X86, Architecture::X86_64];
const X86_64: &[Architecture] = &[Architecture::X86_64];
const ARM64: &[Architecture] = &[Architecture::Arm64];

const LOW: &str = "Low to Moderate";
const MODERATE: &str = "Moderate";
const TO_5: &str = "Up to 5 Gigabit";
const TO_12: &str = "Up to 12.5 Gigabit";
const TO_15: &str = "Up to 15 Gigabit";

const GIB: u32 = 1024;

/// The sizes of a seventh generation of Intel's with so many GiB for each vCPU.
macro_rules! intel_7 {
    ($gib:literal) => {
        &[
            ("large", 2, 2 * $gib * GIB, TO_12, Some((781, 12_500)), Some((650, 10_000))),
            ("xlarge", 4, 4 * $gib * GIB, TO_12, Some((1562, 12_500)), Some((1250, 10_000))),
            ("2xlarge", 8, 8 * $gib * GIB, TO_12, Some((3125, 12_500)), Some((2500, 10_000))),
            ("4xlarge", 16, 16 * $gib * GIB, TO_12, Some((6250, 12_500)), Some((5000, 10_000))),
            ("8xlarge", 32, 32 * $gib * GIB, "12.5 Gigabit", Some((12_500, 12_500)), Some((10_000, 10_000))),
            (
                "12xlarge",
                48,
                48 * $gib * GIB,
                "18.75 Gigabit",
                Some((18_750, 18_750)),
                Some((15_000, 15_000)),
            ),
            ("16xlarge", 64, 64 * $gib * GIB, "25 Gigabit", Some((25_000, 25_000)), Some((20_000, 20_000))),
            ("24xlarge", 96, 96 * $gib * GIB, "37.5 Gigabit", Some((37_500, 37_500)), Some((30_000, 30_000))),
            ("48xlarge", 192, 192 * $gib * GIB, "50 Gigabit", Some((50_000, 50_000)), Some((40_000, 40_000))),
        ]
    };
}

/// The sizes of the family of Graviton3's with so many GiB for each vCPU.
macro_rules! graviton_3 {
    ($gib:literal) => {
        &[
            ("medium", 1, $gib * GIB, TO_12, Some((520, 12_500)), Some((315, 10_000))),
            ("large", 2, 2 * $gib * GIB, TO_12, Some((937, 12_500)), Some((630, 10_000))),
            ("xlarge", 4, 4 * $gib * GIB, TO_12, Some((1876, 12_500)), Some((1250, 10_000))),
            ("2xlarge", 8, 8 * $gib * GIB, TO_15, Some((3750, 15_000)), Some((2500, 10_000))),
            ("4xlarge", 16, 16 * $gib * GIB, TO_15, Some((7500, 15_000)), Some((5000, 10_000))),
            ("8xlarge", 32, 32 * $gib * GIB, "15 Gigabit", Some((15_000, 15_000)), Some((10_000, 10_000))),
            ("12xlarge", 48, 48 * $gib * GIB, "22.5 Gigabit", Some((22_500, 22_500)), Some((15_000, 15_000))),
            ("16xlarge", 64, 64 * $gib * GIB, "30 Gigabit", Some((30_000, 30_000)), Some((20_000, 20_000))),
        ]
    };
}

/// The sizes of a burstable family on Nitro.
const BURSTABLE: &[Size] = &[
    ("nano", 2, GIB / 2, TO_5, Some((32, 5000)), Some((43, 2085))),
    ("micro", 2, GIB, TO_5, Some((64, 5000)), Some((87, 2085))),
    ("small", 2, 2 * GIB, TO_5, Some((128, 5000)), Some((174, 2085))),
    ("medium", 2, 4 * GIB, TO_5, Some((256, 5000)), Some((347, 2085))),
    ("large", 2, 8 * GIB, TO_5, Some((512, 5000)), Some((695, 2780))),
    ("xlarge", 4, 16 * GIB, TO_5, Some((1024, 5000)), Some((695, 2780))),
    ("2xlarge", 8, 32 * GIB, TO_5, Some((2048, 5000)), Some((695, 2780))),
];

const T2: &[Size] = &[
    ("nano", 1, GIB / 2, LOW, None, None),
    ("micro", 1, GIB, LOW, None, None),
    ("small", 1, 2 * GIB, LOW, None, None),
    ("medium", 2, 4 * GIB, LOW, None, None),
    ("large", 2, 8 * GIB, LOW, None, None),
    ("xlarge", 4, 16 * GIB, MODERATE, None, None),
    ("2xlarge", 8, 32 * GIB, MODERATE, None, None),
];

const fn family(
    name: &'static str,
    architectures: &'static [Architecture],
    sizes: &'static [Size],
) -> Family {
    Family { name, architectures, sizes }
}

pub(super) const FAMILIES: &[Family] = &[
    family("t2", BOTH_X86, T2),
    family("t3", X86_64, BURSTABLE),
    family("t4g", ARM64, BURSTABLE),
    family("c7i", X86_64, intel_7!(2)),
    family("m7i", X86_64, intel_7!(4)),
    family("r7i", X86_64, intel_7!(8)),
    family("c7g", ARM64, graviton_3!(2)),
    family("m7g", ARM64, graviton_3!(4)),
    family("r7g", ARM64, graviton_3!(8)),
];

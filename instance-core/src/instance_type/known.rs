//! EC2's instance types as data (EC2 Instance Types guide, "Specifications"; DescribeInstanceTypes).

use ami_core::Architecture;

use super::InstanceStore;

/// A family: what all its sizes share, and its sizes.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) architectures: &'static [Architecture],
    /// How many threads a core has in sizes with more processors than one (EC2 User Guide, "CPU options").
    threads_per_core: u32,
    pub(super) sizes: &'static [Size],
    /// What instance store each size has, in their order.
    pub(super) stores: &'static [InstanceStore],
}

impl Family {
    /// How many threads a core of its size with so many processors has by default.
    pub(super) fn threads_per_core(&self, vcpus: u32) -> u32 {
        self.threads_per_core.min(vcpus)
    }
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
const TO_10: &str = "Up to 10 Gigabit";
const TO_12: &str = "Up to 12.5 Gigabit";
const TO_15: &str = "Up to 15 Gigabit";

const GIB: u32 = 1024;

/// The sizes of a generation of Intel's with so many GiB for each vCPU, and its largest, with so many vCPUs.
macro_rules! intel {
    ($gib:literal, $largest:literal, $vcpus:literal) => {
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
            (
                $largest,
                $vcpus,
                $vcpus * $gib * GIB,
                "50 Gigabit",
                Some((50_000, 50_000)),
                Some((40_000, 40_000)),
            ),
        ]
    };
}

/// The sizes of a seventh generation of Intel's.
macro_rules! intel_7 {
    ($gib:literal) => {
        intel!($gib, "48xlarge", 192)
    };
}

/// The sizes of a sixth generation of Intel's.
macro_rules! intel_6 {
    ($gib:literal) => {
        intel!($gib, "32xlarge", 128)
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

/// The instance store of the sixth generation of Intel's.
const INTEL_6_STORES: &[InstanceStore] = &[
    nvme(1, 118),
    nvme(1, 237),
    nvme(1, 474),
    nvme(1, 950),
    nvme(1, 1900),
    nvme(2, 1425),
    nvme(2, 1900),
    nvme(4, 1425),
    nvme(4, 1900),
];

const M5: &[Size] = &[
    ("large", 2, 8 * GIB, TO_10, Some((750, 10_000)), Some((650, 4750))),
    ("xlarge", 4, 16 * GIB, TO_10, Some((1250, 10_000)), Some((1150, 4750))),
    ("2xlarge", 8, 32 * GIB, TO_10, Some((2500, 10_000)), Some((2300, 4750))),
    ("4xlarge", 16, 64 * GIB, TO_10, Some((5000, 10_000)), Some((4750, 4750))),
    ("8xlarge", 32, 128 * GIB, "10 Gigabit", Some((10_000, 10_000)), Some((6800, 6800))),
    ("12xlarge", 48, 192 * GIB, "12 Gigabit", Some((12_000, 12_000)), Some((9500, 9500))),
    ("16xlarge", 64, 256 * GIB, "20 Gigabit", Some((20_000, 20_000)), Some((13_600, 13_600))),
    ("24xlarge", 96, 384 * GIB, "25 Gigabit", Some((25_000, 25_000)), Some((19_000, 19_000))),
];

const M5D_STORES: &[InstanceStore] = &[
    nvme(1, 75),
    nvme(1, 150),
    nvme(1, 300),
    nvme(2, 300),
    nvme(2, 600),
    nvme(2, 900),
    nvme(4, 600),
    nvme(4, 900),
];

const M3: &[Size] = &[
    ("medium", 1, 3840, MODERATE, None, None),
    ("large", 2, 7680, MODERATE, None, None),
    ("xlarge", 4, 15 * GIB, "High", None, None),
    ("2xlarge", 8, 30 * GIB, "High", None, None),
];

const M3_STORES: &[InstanceStore] = &[mapped(1, 4), mapped(1, 32), mapped(2, 40), mapped(2, 80)];

const fn nvme(disks: u32, disk_size_gb: u32) -> InstanceStore {
    InstanceStore { disks, disk_size_gb, nvme: true }
}

const fn mapped(disks: u32, disk_size_gb: u32) -> InstanceStore {
    InstanceStore { disks, disk_size_gb, nvme: false }
}

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
    threads_per_core: u32,
    sizes: &'static [Size],
) -> Family {
    Family { name, architectures, threads_per_core, sizes, stores: &[] }
}

const fn with_stores(family: Family, stores: &'static [InstanceStore]) -> Family {
    Family { stores, ..family }
}

pub(super) const FAMILIES: &[Family] = &[
    family("t2", BOTH_X86, 1, T2),
    family("t3", X86_64, 2, BURSTABLE),
    family("t4g", ARM64, 1, BURSTABLE),
    with_stores(family("m3", X86_64, 2, M3), M3_STORES),
    with_stores(family("m5d", X86_64, 2, M5), M5D_STORES),
    with_stores(family("c6id", X86_64, 2, intel_6!(2)), INTEL_6_STORES),
    with_stores(family("m6id", X86_64, 2, intel_6!(4)), INTEL_6_STORES),
    with_stores(family("r6id", X86_64, 2, intel_6!(8)), INTEL_6_STORES),
    family("c7i", X86_64, 2, intel_7!(2)),
    family("m7i", X86_64, 2, intel_7!(4)),
    family("r7i", X86_64, 2, intel_7!(8)),
    family("c7g", ARM64, 1, graviton_3!(2)),
    family("m7g", ARM64, 1, graviton_3!(4)),
    family("r7g", ARM64, 1, graviton_3!(8)),
];

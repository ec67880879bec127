//! Hardware specifications under EC2's names.

mod known;
mod store;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use ami_core::Architecture;
use serde::{Deserialize, Serialize};
use storage_block::{IoLimits, Limiter, Rate};

use self::known::{FAMILIES, Family};
pub use self::store::InstanceStore;
use crate::net::FrameLimits;
use crate::{Error, ErrorKind};

/// The hardware that an instance gets: a name, vCPUs, memory, and what the network and its volumes give.
///
/// ```
/// use instance_core::InstanceType;
///
/// let small: InstanceType = "t3.small".parse()?;
/// assert_eq!((small.vcpus().get(), small.memory_mib().get()), (2, 2048));
/// assert_eq!((small.family(), small.network_performance()), ("t3", Some("Up to 5 Gigabit")));
/// let ebs = small.ebs_bandwidth().ok_or("it is optimised for EBS")?;
/// assert_eq!((ebs.baseline_mbps, ebs.maximum_mbps), (174, 2085));
/// let network = small.network_bandwidth().ok_or("it is specified")?;
/// assert_eq!((network.baseline_mbps, network.maximum_mbps), (128, 5000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstanceType {
    name: Cow<'static, str>,
    vcpus: NonZeroU32,
    memory_mib: NonZeroU32,
    architectures: Cow<'static, [Architecture]>,
    network_performance: Option<Cow<'static, str>>,
    ebs_bandwidth: Option<EbsBandwidth>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instance_store: Option<InstanceStore>,
    /// Of a type of one's own that was told: those that are known by name have what their family has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threads_per_core: Option<NonZeroU32>,
    /// The same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network_bandwidth: Option<NetworkBandwidth>,
}

/// What an instance's volumes give together; [`InstanceType`] shows it in use. They are held to it unless the region
/// was opened [otherwise](crate::RegionOptions::ebs_limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EbsBandwidth {
    /// For as long as is wanted, in Mbit/s.
    pub baseline_mbps: u32,
    /// At best, in Mbit/s.
    pub maximum_mbps: u32,
}

impl EbsBandwidth {
    /// For how many seconds the best is kept up by an instance that has saved up all it can (EC2 User Guide,
    /// "Amazon EBS-optimized instance types").
    const BURST: u64 = 30 * 60;

    /// What holds the disks of an instance to it, together.
    pub(crate) fn limiters(self) -> [Limiter; 2] {
        limiters(self.baseline_mbps, self.maximum_mbps, Self::BURST)
    }
}

/// What an instance's network gives in each direction; [`InstanceType`] shows it in use. Its ports are held to it, by
/// hypervisors that can ([`net_limits`](crate::machine::Capabilities::net_limits)), unless the region was opened
/// [otherwise](crate::RegionOptions::network_limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetworkBandwidth {
    /// For as long as is wanted, in Mbit/s.
    pub baseline_mbps: u32,
    /// At best, in Mbit/s.
    pub maximum_mbps: u32,
}

impl NetworkBandwidth {
    /// For how many seconds the best is kept up by an instance that has saved up all it can: "typically from 5 to 60
    /// minutes" (EC2 User Guide, "Amazon EC2 instance network bandwidth"), of which this is the least.
    const BURST: u64 = 5 * 60;

    /// What holds the ports of an instance to it in one direction, together.
    pub(crate) fn limits(self) -> FrameLimits {
        FrameLimits::new(limiters(self.baseline_mbps, self.maximum_mbps, Self::BURST))
    }
}

/// What gives the most for so many seconds to whoever has saved up, and the baseline after.
fn limiters(baseline_mbps: u32, maximum_mbps: u32, burst_seconds: u64) -> [Limiter; 2] {
    let bytes = |mbps: u32| u64::from(mbps) * 1_000_000 / 8;
    let (baseline, maximum) = (bytes(baseline_mbps), bytes(maximum_mbps));
    let burst = (maximum.saturating_sub(baseline) * burst_seconds).max(baseline);
    [Rate::per_second(maximum), Rate { per_second: baseline, burst }]
        .map(|rate| Limiter::new(IoLimits { bytes: Some(rate), ..IoLimits::NONE }))
}

impl InstanceType {
    /// A type of one's own, for any architecture.
    ///
    /// ```
    /// use ami_core::Architecture;
    /// use instance_core::InstanceType;
    ///
    /// let lab = InstanceType::custom("lab.tiny", 1.try_into()?, 256.try_into()?);
    /// assert_eq!((lab.name(), lab.memory_mib().get()), ("lab.tiny", 256));
    /// assert_eq!(lab.architectures(), Architecture::ALL);
    /// let arm = lab.for_architectures([Architecture::Arm64]);
    /// assert_eq!((arm.architectures(), arm.network_performance()), (&[Architecture::Arm64][..], None));
    /// # Ok::<(), std::num::TryFromIntError>(())
    /// ```
    pub fn custom(name: impl Into<String>, vcpus: NonZeroU32, memory_mib: NonZeroU32) -> Self {
        Self {
            name: Cow::Owned(name.into()),
            vcpus,
            memory_mib,
            architectures: Cow::Borrowed(&Architecture::ALL),
            network_performance: None,
            ebs_bandwidth: None,
            instance_store: None,
            threads_per_core: None,
            network_bandwidth: None,
        }
    }

    /// The same, with its volumes held to this together.
    #[must_use]
    pub fn with_ebs_bandwidth(self, bandwidth: EbsBandwidth) -> Self {
        Self { ebs_bandwidth: Some(bandwidth), ..self }
    }

    /// The same, with its network held to this in each direction.
    ///
    /// ```
    /// use instance_core::{InstanceType, NetworkBandwidth};
    ///
    /// let lab = InstanceType::custom("lab.slow", 1.try_into()?, 256.try_into()?);
    /// assert_eq!(lab.network_bandwidth(), None);
    /// let bandwidth = NetworkBandwidth { baseline_mbps: 10, maximum_mbps: 100 };
    /// assert_eq!(lab.with_network_bandwidth(bandwidth).network_bandwidth(), Some(bandwidth));
    /// # Ok::<(), std::num::TryFromIntError>(())
    /// ```
    #[must_use]
    pub fn with_network_bandwidth(self, bandwidth: NetworkBandwidth) -> Self {
        Self { network_bandwidth: Some(bandwidth), ..self }
    }

    /// The same with disks of the host's.
    #[must_use]
    pub fn with_instance_store(self, store: InstanceStore) -> Self {
        Self { instance_store: Some(store), ..self }
    }

    /// The same with processors that are threads of cores, so many of each. A launch is refused where that makes no whole
    /// number of cores.
    ///
    /// ```
    /// use instance_core::InstanceType;
    ///
    /// let lab = InstanceType::custom("lab.threads", 4.try_into()?, 256.try_into()?);
    /// assert_eq!(lab.threads_per_core().get(), 1);
    /// assert_eq!(lab.with_threads_per_core(2.try_into()?).threads_per_core().get(), 2);
    /// # Ok::<(), std::num::TryFromIntError>(())
    /// ```
    #[must_use]
    pub fn with_threads_per_core(self, threads: NonZeroU32) -> Self {
        Self { threads_per_core: Some(threads), ..self }
    }

    /// The same for images of these architectures alone.
    #[must_use]
    pub fn for_architectures(self, architectures: impl Into<Vec<Architecture>>) -> Self {
        Self { architectures: Cow::Owned(architectures.into()), ..self }
    }

    /// The types that are known by name: the families t2, t3, t4g, m3, m5d, c6id, m6id, r6id, c7i, m7i,
    /// r7i, c7g, m7g and r7g (`DescribeInstanceTypes`).
    ///
    /// ```
    /// use ami_core::Architecture;
    /// use instance_core::InstanceType;
    ///
    /// let smallest = InstanceType::known()
    ///     .filter(|t| t.architectures().contains(&Architecture::Arm64))
    ///     .min_by_key(InstanceType::memory_mib);
    /// assert_eq!(smallest.map(|t| t.to_string()).as_deref(), Some("t4g.nano"));
    /// ```
    pub fn known() -> impl Iterator<Item = Self> {
        let sizes = FAMILIES.iter().flat_map(|family| (0..family.sizes.len()).map(move |n| (family, n)));
        sizes.filter_map(|(family, n)| Self::of_size(family, n))
    }

    /// The size of a family with this number.
    fn of_size(family: &Family, number: usize) -> Option<Self> {
        let (name, vcpus, memory, network, _, ebs) = *family.sizes.get(number)?;
        Some(Self {
            name: Cow::Owned(format!("{}.{name}", family.name)),
            vcpus: NonZeroU32::new(vcpus)?,
            memory_mib: NonZeroU32::new(memory)?,
            architectures: Cow::Borrowed(family.architectures),
            network_performance: Some(Cow::Borrowed(network)),
            ebs_bandwidth: ebs
                .map(|(baseline_mbps, maximum_mbps)| EbsBandwidth { baseline_mbps, maximum_mbps }),
            instance_store: family.stores.get(number).copied(),
            threads_per_core: None,
            network_bandwidth: None,
        })
    }

    /// The name, such as `t3.micro`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part of the name before the size, such as `t3`.
    pub fn family(&self) -> &str {
        self.name.split_once('.').map_or(&*self.name, |(family, _)| family)
    }

    /// How many virtual processors.
    pub fn vcpus(&self) -> NonZeroU32 {
        self.vcpus
    }

    /// How many of its processors are threads of one core (`DefaultThreadsPerCore`): its guest's scheduler gives each a core
    /// before it gives any core two.
    pub fn threads_per_core(&self) -> NonZeroU32 {
        let known = || {
            let (family, _) = self.known_size()?;
            NonZeroU32::new(family.threads_per_core(self.vcpus.get()))
        };
        self.threads_per_core.or_else(known).unwrap_or(NonZeroU32::MIN)
    }

    /// How much memory, in MiB.
    pub fn memory_mib(&self) -> NonZeroU32 {
        self.memory_mib
    }

    /// The architectures of the images that it runs.
    pub fn architectures(&self) -> &[Architecture] {
        &self.architectures
    }

    /// What the network gives, in EC2's words.
    pub fn network_performance(&self) -> Option<&str> {
        self.network_performance.as_deref()
    }

    /// What the network gives in figures, where EC2 specifies them or a type of one's own was told.
    pub fn network_bandwidth(&self) -> Option<NetworkBandwidth> {
        let known = || {
            let (family, size) = self.known_size()?;
            let (baseline_mbps, maximum_mbps) = family.sizes.get(size)?.4?;
            Some(NetworkBandwidth { baseline_mbps, maximum_mbps })
        };
        self.network_bandwidth.or_else(known)
    }

    /// The family and the number of its size, if it is known by name.
    fn known_size(&self) -> Option<(&'static Family, usize)> {
        // Those of one's own say nothing of their network, whatever their name.
        self.network_performance.as_ref()?;
        known_as(&self.name)
    }

    /// What its volumes give, if it is optimised for EBS.
    pub fn ebs_bandwidth(&self) -> Option<EbsBandwidth> {
        self.ebs_bandwidth
    }

    /// The disks of the host's that it has, if it has any.
    pub fn instance_store(&self) -> Option<InstanceStore> {
        self.instance_store
    }
}

impl fmt::Display for InstanceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

/// The family and the number of its size that are called so.
fn known_as(name: &str) -> Option<(&'static Family, usize)> {
    let (family, size) = name.split_once('.')?;
    let family = FAMILIES.iter().find(|f| f.name == family)?;
    Some((family, family.sizes.iter().position(|s| s.0 == size)?))
}

impl FromStr for InstanceType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        known_as(name).and_then(|(family, number)| Self::of_size(family, number)).ok_or_else(|| {
            let families: Vec<&str> = FAMILIES.iter().map(|f| f.name).collect();
            let what = format!("{name:?} is no instance type; known are those of {}", families.join(", "));
            Error::new(ErrorKind::InvalidInstanceType, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use storage_block::MemoryDisk;

    use super::*;

    #[test]
    fn every_known_type_is_found_by_its_name_and_is_what_its_family_says() {
        let known: Vec<InstanceType> = InstanceType::known().collect();
        assert_eq!(known.len(), 111);
        for hardware in &known {
            assert_eq!(&hardware.name().parse::<InstanceType>().unwrap(), hardware);
            let per_vcpu = hardware.memory_mib().get() / hardware.vcpus();
            match &hardware.family()[..1] {
                "m" if hardware.family() == "m3" => assert_eq!(per_vcpu, 3840, "{hardware}"),
                "c" => assert_eq!(per_vcpu, 2048, "{hardware}"),
                "m" => assert_eq!(per_vcpu, 4096, "{hardware}"),
                "r" => assert_eq!(per_vcpu, 8192, "{hardware}"),
                _ => {}
            }
            let is_arm = hardware.architectures() == [Architecture::Arm64];
            assert_eq!(is_arm, hardware.family().ends_with('g'), "{hardware}");
            let has_store = hardware.family().ends_with('d') || hardware.family() == "m3";
            assert_eq!(hardware.instance_store().is_some(), has_store, "{hardware}");
            let has_threads = hardware.vcpus().get() > 1 && hardware.family() != "t2" && !is_arm;
            assert_eq!(hardware.threads_per_core().get(), 1 + u32::from(has_threads), "{hardware}");
            if let Some(ebs) = hardware.ebs_bandwidth() {
                assert!(ebs.baseline_mbps <= ebs.maximum_mbps, "{hardware}");
            }
            // "Up to" so many gigabits is what bursts reach; others have it always.
            let performance = hardware.network_performance().unwrap();
            let gigabits = performance.trim_start_matches("Up to ").strip_suffix(" Gigabit");
            let most = gigabits.map(|gigabits| (gigabits.parse::<f64>().unwrap() * 1000.0) as u32);
            assert_eq!(hardware.network_bandwidth().map(|b| b.maximum_mbps), most, "{hardware}");
            if let Some(network) = hardware.network_bandwidth() {
                let bursts = network.baseline_mbps < network.maximum_mbps;
                assert_eq!(bursts, performance.starts_with("Up to"), "{hardware}");
            }
        }
    }

    /// Records have it, and digests of what launches asked for.
    #[test]
    fn what_is_stored_of_a_known_type_stays_as_it_is() {
        let stored = r#"{"name":"t3.micro","vcpus":2,"memory_mib":1024,"architectures":["x86_64"],"network_performance":"Up to 5 Gigabit","ebs_bandwidth":{"baseline_mbps":87,"maximum_mbps":2085}}"#;
        let known: InstanceType = "t3.micro".parse().unwrap();
        assert_eq!(serde_json::to_string(&known).unwrap(), stored);
        let read: InstanceType = serde_json::from_str(stored).unwrap();
        assert_eq!((read.network_bandwidth(), &read), (known.network_bandwidth(), &known));
        assert!(known.network_bandwidth().is_some());
        assert_eq!(read.threads_per_core().get(), 2);
    }

    #[test]
    fn types_of_ones_own_keep_their_threads_and_their_network() {
        let two = NonZeroU32::new(2).unwrap();
        // What is known is known of EC2's, not of a name.
        let own = InstanceType::custom("t3.micro", two, two);
        assert_eq!(own.threads_per_core(), NonZeroU32::MIN);
        let stored = serde_json::to_string(&own.with_threads_per_core(two)).unwrap();
        assert_eq!(serde_json::from_str::<InstanceType>(&stored).unwrap().threads_per_core(), two);
        let own = InstanceType::custom("t3.micro", two, two);
        assert_eq!(own.network_bandwidth(), None);
        let bandwidth = NetworkBandwidth { baseline_mbps: 10, maximum_mbps: 100 };
        let stored = serde_json::to_string(&own.with_network_bandwidth(bandwidth)).unwrap();
        let read: InstanceType = serde_json::from_str(&stored).unwrap();
        assert_eq!(read.network_bandwidth(), Some(bandwidth));
    }

    #[test]
    fn some_types_as_ec2_describes_them() {
        for (name, vcpus, memory, network, ebs) in [
            ("t2.nano", 1, 512, "Low to Moderate", None),
            ("t3.2xlarge", 8, 32_768, "Up to 5 Gigabit", Some((695, 2780))),
            ("t4g.small", 2, 2048, "Up to 5 Gigabit", Some((174, 2085))),
            ("m7i.48xlarge", 192, 786_432, "50 Gigabit", Some((40_000, 40_000))),
            ("c7i.12xlarge", 48, 98_304, "18.75 Gigabit", Some((15_000, 15_000))),
            ("r7i.large", 2, 16_384, "Up to 12.5 Gigabit", Some((650, 10_000))),
            ("m7g.medium", 1, 4096, "Up to 12.5 Gigabit", Some((315, 10_000))),
            ("r7g.16xlarge", 64, 524_288, "30 Gigabit", Some((20_000, 20_000))),
        ] {
            let hardware: InstanceType = name.parse().unwrap();
            assert_eq!((hardware.vcpus().get(), hardware.memory_mib().get()), (vcpus, memory), "{name}");
            assert_eq!(hardware.network_performance(), Some(network), "{name}");
            let found = hardware.ebs_bandwidth().map(|e| (e.baseline_mbps, e.maximum_mbps));
            assert_eq!(found, ebs, "{name}");
        }
        for (name, disks, size, nvme) in [
            ("m3.medium", 1, 4, false),
            ("m3.2xlarge", 2, 80, false),
            ("m5d.large", 1, 75, true),
            ("m5d.24xlarge", 4, 900, true),
            ("c6id.4xlarge", 1, 950, true),
            ("m6id.large", 1, 118, true),
            ("r6id.32xlarge", 4, 1900, true),
        ] {
            let store = name.parse::<InstanceType>().unwrap().instance_store().unwrap();
            assert_eq!((store.disks, store.disk_size_gb, store.nvme), (disks, size, nvme), "{name}");
        }
        for unknown in ["", "t3", "t3.", "t3.vast", "t9.nano", "T3.nano"] {
            let refused = unknown.parse::<InstanceType>().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInstanceType, "{unknown}");
        }
    }

    /// That a frame has to wait so many seconds from `begun` on.
    #[track_caller]
    fn waits(limits: &FrameLimits, begun: Instant, seconds: f64) {
        let delay = limits.delay().unwrap_or_default();
        let waits = Duration::from_secs_f64(seconds);
        // The limits count in floating point.
        let exact = Duration::from_millis(1);
        assert!(
            delay <= waits + exact && delay + begun.elapsed() + exact >= waits,
            "{delay:?}, not {seconds} s"
        );
    }

    #[test]
    fn a_network_bursts_and_then_keeps_to_its_baseline() {
        // A megabyte in a second, and a second more at best, of which a second's worth is saved up.
        let begun = Instant::now();
        let limits = NetworkBandwidth { baseline_mbps: 8, maximum_mbps: 16 }.limits();
        limits.charge(30_000_000);
        waits(&limits, begun, 14.0);
        // When what is saved up in five minutes has been used, the baseline is all.
        let begun = Instant::now();
        let limits = NetworkBandwidth { baseline_mbps: 8, maximum_mbps: 8000 }.limits();
        limits.charge(299_700_000_000);
        waits(&limits, begun, 298.7);
        limits.charge(1_000_000_000);
        waits(&limits, begun, 1000.0);
    }

    #[test]
    fn all_disks_of_an_instance_share_its_bandwidth() {
        // A megabyte in a second, of which one is saved up.
        let limiters = EbsBandwidth { baseline_mbps: 8, maximum_mbps: 8 }.limiters();
        let disks = [0, 1].map(|_| {
            let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
            limiters.iter().fold(disk, |disk, limiter| disk.limited(limiter))
        });
        let begun = Instant::now();
        for _ in 0..2 {
            disks.iter().for_each(|disk| disk.write_at(&[1; 512 << 10], 0).unwrap());
        }
        assert!(begun.elapsed() >= Duration::from_millis(400), "{:?}", begun.elapsed());
    }
}

//! Hardware specifications under EC2's names.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use ami_core::Architecture;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind};

/// The hardware that an instance gets: a name, vCPUs, memory.
///
/// ```
/// use instance_core::InstanceType;
///
/// let small: InstanceType = "t2.small".parse()?;
/// assert_eq!((small.vcpus().get(), small.memory_mib().get()), (1, 2048));
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstanceType {
    name: Cow<'static, str>,
    vcpus: NonZeroU32,
    memory_mib: NonZeroU32,
    architectures: Cow<'static, [Architecture]>,
}

const BOTH_X86: &[Architecture] = &[Architecture::X86, Architecture::X86_64];
const X86_64: &[Architecture] = &[Architecture::X86_64];
const ARM64: &[Architecture] = &[Architecture::Arm64];

/// Name, vCPUs, MiB of memory, architectures (EC2 User Guide, "Instance types").
const KNOWN: &[(&str, u32, u32, &[Architecture])] = &[
    ("t2.nano", 1, 512, BOTH_X86),
    ("t2.micro", 1, 1024, BOTH_X86),
    ("t2.small", 1, 2048, BOTH_X86),
    ("t2.medium", 2, 4096, BOTH_X86),
    ("t3.nano", 2, 512, X86_64),
    ("t3.micro", 2, 1024, X86_64),
    ("t3.small", 2, 2048, X86_64),
    ("t3.medium", 2, 4096, X86_64),
    ("t3.large", 2, 8192, X86_64),
    ("t3.xlarge", 4, 16384, X86_64),
    ("m7i.large", 2, 8192, X86_64),
    ("m7i.xlarge", 4, 16384, X86_64),
    ("c7i.large", 2, 4096, X86_64),
    ("c7i.xlarge", 4, 8192, X86_64),
    ("t4g.nano", 2, 512, ARM64),
    ("t4g.micro", 2, 1024, ARM64),
    ("t4g.small", 2, 2048, ARM64),
    ("m7g.large", 2, 8192, ARM64),
];

impl InstanceType {
    /// A type of one's own, for any architecture.
    ///
    /// ```
    /// use instance_core::InstanceType;
    ///
    /// let lab = InstanceType::custom("lab.tiny", 1.try_into()?, 256.try_into()?);
    /// assert_eq!((lab.name(), lab.memory_mib().get()), ("lab.tiny", 256));
    /// assert_eq!(lab.architectures(), ami_core::Architecture::ALL);
    /// # Ok::<(), std::num::TryFromIntError>(())
    /// ```
    pub fn custom(name: impl Into<String>, vcpus: NonZeroU32, memory_mib: NonZeroU32) -> Self {
        Self {
            name: Cow::Owned(name.into()),
            vcpus,
            memory_mib,
            architectures: Cow::Borrowed(&Architecture::ALL),
        }
    }

    /// The types that are known by name.
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
        KNOWN.iter().filter_map(|&(name, vcpus, memory, architectures)| {
            Some(Self {
                name: Cow::Borrowed(name),
                vcpus: NonZeroU32::new(vcpus)?,
                memory_mib: NonZeroU32::new(memory)?,
                architectures: Cow::Borrowed(architectures),
            })
        })
    }

    /// The name, such as `t3.micro`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many virtual processors.
    pub fn vcpus(&self) -> NonZeroU32 {
        self.vcpus
    }

    /// How much memory, in MiB.
    pub fn memory_mib(&self) -> NonZeroU32 {
        self.memory_mib
    }

    /// The architectures of the images that it runs.
    pub fn architectures(&self) -> &[Architecture] {
        &self.architectures
    }
}

impl fmt::Display for InstanceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

impl FromStr for InstanceType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::known().find(|t| t.name == name).ok_or_else(|| {
            let known: Vec<&str> = KNOWN.iter().map(|k| k.0).collect();
            let known = known.join(", ");
            Error::new(
                ErrorKind::InvalidInstanceType,
                format!("{name:?} is no instance type; known are {known}"),
            )
        })
    }
}

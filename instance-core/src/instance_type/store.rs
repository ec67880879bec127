//! Disks of the host's, which an instance has for as long as it runs.

use ami_core::{BlockDeviceKind, BlockDeviceMapping};
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// What instance store an instance type has (`InstanceStorageInfo`): disks that begin empty whenever an instance is
/// launched or started, outlast its reboots, and are gone when it is stopped, hibernates or is terminated. Its guest finds
/// each by its name, `ephemeral0` and so on, as its serial number.
///
/// Disks that are NVMe an instance has whatever is mapped, as in EC2. Others it has if its image or its launch maps
/// them and the launch does not leave them out.
///
/// ```
/// use instance_core::{InstanceStore, InstanceType};
///
/// let known: InstanceType = "m5d.4xlarge".parse()?;
/// let store = known.instance_store().ok_or("it has one")?;
/// assert_eq!((store.disks, store.disk_size_gb, store.nvme), (2, 300, true));
///
/// let scratch = InstanceStore { disks: 1, disk_size_gb: 2, nvme: true };
/// let own = InstanceType::custom("lab.scratch", 1.try_into()?, 512.try_into()?).with_instance_store(scratch);
/// assert_eq!(own.instance_store(), Some(scratch));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstanceStore {
    /// How many there are, [`MAX_DISKS`](Self::MAX_DISKS) at most.
    pub disks: u32,
    /// The size of each, in GB.
    pub disk_size_gb: u32,
    /// Whether they are NVMe.
    pub nvme: bool,
}

impl InstanceStore {
    /// The most disks: as many as EC2 has names for, `ephemeral0` to `ephemeral23` (EC2 API reference, `BlockDeviceMapping`).
    pub const MAX_DISKS: u32 = 24;

    /// That there are no more disks than names for them.
    pub(crate) fn check(self) -> Result<()> {
        if self.disks > Self::MAX_DISKS {
            let what = format!("{} disks of instance store are more than {}", self.disks, Self::MAX_DISKS);
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        Ok(())
    }

    /// In bytes: a GB is a whole number of sectors.
    pub(crate) fn disk_size(self) -> u64 {
        u64::from(self.disk_size_gb) * 1_000_000_000
    }

    /// The names of the disks that an instance has which these are mapped for.
    pub(crate) fn names(self, mapped: &[BlockDeviceMapping]) -> Vec<String> {
        self.all_names().filter(|name| self.nvme || mapping_of(name, mapped).is_some()).collect()
    }

    /// The mappings by which an instance has disks. Of NVMe disks there are none: what is mapped to them has no effect.
    pub(crate) fn served(self, mapped: &[BlockDeviceMapping]) -> Vec<BlockDeviceMapping> {
        let names = self.all_names().filter(|_| !self.nvme);
        names.filter_map(|name| mapping_of(&name, mapped).cloned()).collect()
    }

    fn all_names(self) -> impl Iterator<Item = String> {
        (0..self.disks.min(Self::MAX_DISKS)).map(|number| format!("ephemeral{number}"))
    }
}

/// What maps the disk of this name, if anything does.
fn mapping_of<'a>(name: &str, mapped: &'a [BlockDeviceMapping]) -> Option<&'a BlockDeviceMapping> {
    let names = |m: &&BlockDeviceMapping| matches!(m.kind(), BlockDeviceKind::Ephemeral { virtual_name } if virtual_name == name);
    mapped.iter().find(names)
}

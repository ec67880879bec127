//! The disks of an image: under which names, and with what on them.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::error::{Error, ErrorKind, quote, text_type, words};

/// A device name of EC2's, such as `/dev/xvda`.
///
/// | Form | Range |
/// |---|---|
/// | `/dev/sdX`, `/dev/sdXN` | `X` from a to z, `N` from 1 to 15 |
/// | `/dev/xvdX`, `/dev/xvdXY` | `X` and `Y` from a to z |
/// | `/dev/nvmeNn1` | `N` from 0 to 26 |
///
/// The `/dev/` may be left out of the first two. The name says where in EC2's order the disk is; what
/// the guest calls it is the guest's affair.
///
/// ```
/// use ami_core::DeviceName;
///
/// let name: DeviceName = "/dev/sda1".parse()?;
/// assert_eq!(name.as_str(), "/dev/sda1");
/// assert!(name.same_disk(&"/dev/xvda".parse()?));
/// assert!("/dev/hda".parse::<DeviceName>().is_err());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DeviceName(String);

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether both names stand for one disk, as `/dev/sda1`, `/dev/xvda` and `xvda` do. One
    /// image cannot map such names twice.
    pub fn same_disk(&self, other: &Self) -> bool {
        self.disk() == other.disk()
    }

    /// The part of the name that says which disk it is.
    fn disk(&self) -> &str {
        let name = self.0.strip_prefix("/dev/").unwrap_or(&self.0);
        match name.strip_prefix("sd") {
            Some(disk) => disk.trim_end_matches(|c: char| c.is_ascii_digit()),
            None => name.strip_prefix("xvd").unwrap_or(name),
        }
    }
}

text_type!(DeviceName);

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if !is_device_name(text) {
            let message = format!(
                "{} is no device name; use /dev/sd[a-z], /dev/sd[a-z][1-15], /dev/xvd[a-z], \
                 /dev/xvd[a-z][a-z] or /dev/nvme[0-26]n1",
                quote(text)
            );
            return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, message));
        }
        Ok(Self(text.to_owned()))
    }
}

fn is_device_name(text: &str) -> bool {
    if let Some(number) = text.strip_prefix("/dev/nvme").and_then(|rest| rest.strip_suffix("n1")) {
        return is_number(number, 0, 26);
    }
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    if let Some(letters) = name.strip_prefix("xvd") {
        return (1..=2).contains(&letters.len()) && letters.bytes().all(|b| b.is_ascii_lowercase());
    }
    let Some(rest) = name.strip_prefix("sd") else { return false };
    let Some(partition) = rest.strip_prefix(|c: char| c.is_ascii_lowercase()) else { return false };
    partition.is_empty() || is_number(partition, 1, 15)
}

/// Whether `text` is a decimal number from `min` to `max`, written without leading zeros.
fn is_number(text: &str, min: u8, max: u8) -> bool {
    let plain = text == "0" || !text.starts_with(['0', '+']);
    plain && text.parse::<u8>().is_ok_and(|number| (min..=max).contains(&number))
}

words! {
    /// The type of an EBS volume.
    ///
    /// ```
    /// use ami_core::VolumeType;
    ///
    /// let slow: VolumeType = "st1".parse()?;
    /// assert!(!slow.can_boot() && VolumeType::Gp3.can_boot());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    VolumeType, "volume type" {
        /// Magnetic.
        Standard = "standard",
        /// Provisioned IOPS.
        Io1 = "io1",
        /// Provisioned IOPS, second generation.
        Io2 = "io2",
        /// General purpose.
        Gp2 = "gp2",
        /// General purpose, third generation; the default here.
        Gp3 = "gp3",
        /// Cold HDD.
        Sc1 = "sc1",
        /// Throughput optimised HDD.
        St1 = "st1",
    }
}

impl VolumeType {
    /// The smallest and the largest size of such a volume in GiB.
    ///
    /// ```
    /// use ami_core::VolumeType;
    ///
    /// let boots_from = |gib| {
    ///     let fits = move |t: &VolumeType| (t.size_range_gib().0..=t.size_range_gib().1).contains(&gib);
    ///     VolumeType::ALL.iter().copied().filter(|t| t.can_boot()).filter(fits)
    /// };
    /// let words: Vec<&str> = boots_from(2).map(VolumeType::as_str).collect();
    /// assert_eq!(words, ["standard", "gp2", "gp3"]);
    /// assert_eq!(boots_from(20_000).collect::<Vec<_>>(), [VolumeType::Io2, VolumeType::Gp3]);
    /// ```
    pub const fn size_range_gib(self) -> (u32, u32) {
        match self {
            Self::Standard => (1, 1024),
            Self::Io1 => (4, 16_384),
            Self::Io2 => (4, 65_536),
            Self::Gp2 => (1, 16_384),
            Self::Gp3 => (1, 65_536),
            Self::Sc1 | Self::St1 => (125, 16_384),
        }
    }

    /// Whether an instance can boot from such a volume.
    pub const fn can_boot(self) -> bool {
        !matches!(self, Self::Sc1 | Self::St1)
    }
}

words! {
    /// What an image's root device is (`RootDeviceType`).
    ///
    /// ```
    /// use ami_core::RootDeviceType;
    ///
    /// assert_eq!("instance-store".parse::<RootDeviceType>()?, RootDeviceType::InstanceStore);
    /// assert_eq!(RootDeviceType::default(), RootDeviceType::Ebs);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    #[derive(Default)]
    RootDeviceType, "root device type" {
        /// A volume, which is kept while its instance is stopped.
        #[default]
        Ebs = "ebs",
        /// A disk of the host's, which is gone when its instance ends: that is never stopped.
        InstanceStore = "instance-store",
    }
}

/// A disk of the host's that begins with a content: the root device of an image whose root device is instance store.
///
/// ```
/// use ami_core::{BlockDeviceKind, BlockDeviceMapping, Digest};
///
/// let mapping = BlockDeviceMapping::instance_store_root("/dev/xvda", Digest::of(b"root"), 8);
/// let BlockDeviceKind::InstanceStore(store) = mapping.kind() else { panic!() };
/// assert_eq!((store.snapshot(), store.size()), (&Digest::of(b"root"), 8 << 30));
/// assert_eq!(mapping.content(), Some(&Digest::of(b"root")));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoreRoot {
    snapshot: Digest,
    size_gib: u32,
}

impl StoreRoot {
    /// The most that it has, in GiB (EC2 User Guide, "Root volumes").
    pub const MAX_GIB: u32 = 10;

    /// The content that it begins with.
    pub fn snapshot(&self) -> &Digest {
        &self.snapshot
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        u64::from(self.size_gib) << 30
    }
}

/// An EBS volume that an instance gets at launch.
///
/// ```
/// use ami_core::{BlockDeviceMapping, Digest, VolumeType};
///
/// let mapping = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
/// let ebs = mapping.as_ebs().ok_or("no volume")?;
/// assert_eq!((ebs.volume_size_gib(), ebs.volume_size()), (8, 8 << 30));
/// assert_eq!(ebs.snapshot(), Some(&Digest::of(b"root")));
/// assert_eq!((ebs.volume_type(), ebs.encrypted()), (VolumeType::Gp3, false));
/// assert!(ebs.delete_on_termination());
/// ebs.check_snapshot_size(2 << 30)?; // the other 6 GiB are empty
/// assert!(ebs.check_snapshot_size(9 << 30).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ebs {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    snapshot: Option<Digest>,
    volume_size_gib: u32,
    delete_on_termination: bool,
    volume_type: VolumeType,
    encrypted: bool,
}

impl Ebs {
    /// The content that the volume starts with, or `None` for an empty one. Named by digest, not by a
    /// region's `snap-` id, so that a copy of the image in another region is the same content.
    pub fn snapshot(&self) -> Option<&Digest> {
        self.snapshot.as_ref()
    }

    /// The size in GiB.
    pub fn volume_size_gib(&self) -> u32 {
        self.volume_size_gib
    }

    /// The size in bytes.
    pub fn volume_size(&self) -> u64 {
        u64::from(self.volume_size_gib) << 30
    }

    /// Whether the volume goes when its instance is terminated.
    pub fn delete_on_termination(&self) -> bool {
        self.delete_on_termination
    }

    /// The type of the volume.
    pub fn volume_type(&self) -> VolumeType {
        self.volume_type
    }

    /// Whether the volume is encrypted.
    pub fn encrypted(&self) -> bool {
        self.encrypted
    }

    /// Checks that a snapshot of `bytes` fits on the volume. A smaller one does: the rest is empty.
    ///
    /// The size of a snapshot is known to whoever holds it, so this check is theirs to call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidBlockDeviceMapping`] if the volume is too small.
    pub fn check_snapshot_size(&self, bytes: u64) -> Result<(), Error> {
        check_fits(bytes, self.volume_size_gib)
    }
}

fn check_fits(bytes: u64, size_gib: u32) -> Result<(), Error> {
    let least = bytes.div_ceil(1 << 30);
    if least <= u64::from(size_gib) {
        return Ok(());
    }
    let message = format!("a volume of {size_gib} GiB is smaller than its snapshot, which needs {least} GiB");
    Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, message))
}

/// What is at a device name.
///
/// ```
/// use ami_core::{BlockDeviceKind, BlockDeviceMapping};
///
/// let words = |mapping: &BlockDeviceMapping| match mapping.kind() {
///     BlockDeviceKind::Ebs(ebs) => format!("{}: {} GiB", mapping.device_name(), ebs.volume_size_gib()),
///     BlockDeviceKind::Ephemeral { virtual_name } => virtual_name.clone(),
///     _ => "nothing".to_owned(),
/// };
/// assert_eq!(words(&BlockDeviceMapping::blank("/dev/sdf", 100).encrypted(true)), "/dev/sdf: 100 GiB");
/// assert_eq!(words(&BlockDeviceMapping::ephemeral("/dev/sdb", "ephemeral0")), "ephemeral0");
/// assert_eq!(words(&BlockDeviceMapping::no_device("/dev/sdc")), "nothing");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
#[non_exhaustive]
pub enum BlockDeviceKind {
    /// An EBS volume.
    Ebs(Ebs),
    /// An instance store volume, which lives no longer than its instance runs.
    Ephemeral {
        /// `ephemeral0` to `ephemeral23`.
        virtual_name: String,
    },
    /// An instance store volume that begins with a content: a root device alone is one.
    InstanceStore(StoreRoot),
    /// Nothing: suppresses what would be there otherwise.
    NoDevice,
}

/// A disk of an image: its device name and what is there.
///
/// A mapping is made without being checked; the image's builder checks it, and so does
/// [`validate`](Self::validate) for a mapping that is used outside of an image.
///
/// ```
/// use ami_core::{BlockDeviceMapping, Digest, VolumeType};
///
/// let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
/// let data = BlockDeviceMapping::blank("/dev/sdf", 100).volume_type(VolumeType::Gp2).delete_on_termination(false);
/// assert_eq!(root.as_ebs().map(|ebs| ebs.volume_size()), Some(8 << 30));
/// assert!(data.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BlockDeviceMapping {
    device_name: String,
    kind: BlockDeviceKind,
}

impl BlockDeviceMapping {
    /// A volume that starts with the content `snapshot`.
    pub fn ebs(device_name: impl Into<String>, snapshot: Digest, volume_size_gib: u32) -> Self {
        Self::volume(device_name.into(), Some(snapshot), volume_size_gib)
    }

    /// An empty volume. It is of gp3, goes with its instance and is not encrypted, unless it is told otherwise.
    pub fn blank(device_name: impl Into<String>, volume_size_gib: u32) -> Self {
        Self::volume(device_name.into(), None, volume_size_gib)
    }

    fn volume(device_name: String, snapshot: Option<Digest>, volume_size_gib: u32) -> Self {
        let ebs = Ebs {
            snapshot,
            volume_size_gib,
            delete_on_termination: true,
            volume_type: VolumeType::Gp3,
            encrypted: false,
        };
        Self { device_name, kind: BlockDeviceKind::Ebs(ebs) }
    }

    /// An instance store volume, `ephemeral0` to `ephemeral23`.
    pub fn ephemeral(device_name: impl Into<String>, virtual_name: impl Into<String>) -> Self {
        let virtual_name = virtual_name.into();
        Self { device_name: device_name.into(), kind: BlockDeviceKind::Ephemeral { virtual_name } }
    }

    /// The root device of an image whose root device is instance store, of 10 GiB at most.
    pub fn instance_store_root(device_name: impl Into<String>, snapshot: Digest, size_gib: u32) -> Self {
        let kind = BlockDeviceKind::InstanceStore(StoreRoot { snapshot, size_gib });
        Self { device_name: device_name.into(), kind }
    }

    /// No device under this name.
    pub fn no_device(device_name: impl Into<String>) -> Self {
        Self { device_name: device_name.into(), kind: BlockDeviceKind::NoDevice }
    }

    /// The same, with the volume deleted or kept when its instance is terminated; it is deleted
    /// unless this says otherwise. Without meaning for anything but a volume.
    #[must_use]
    pub fn delete_on_termination(self, delete: bool) -> Self {
        self.with_ebs(|ebs| ebs.delete_on_termination = delete)
    }

    /// The same, with a volume of another type than gp3. Without meaning for anything but a volume.
    #[must_use]
    pub fn volume_type(self, volume_type: VolumeType) -> Self {
        self.with_ebs(|ebs| ebs.volume_type = volume_type)
    }

    /// The same, with an encrypted volume or a plain one. Without meaning for anything but a volume.
    #[must_use]
    pub fn encrypted(self, encrypted: bool) -> Self {
        self.with_ebs(|ebs| ebs.encrypted = encrypted)
    }

    /// The same, with a volume, or a root device of instance store, that starts with the content `snapshot`. Without
    /// meaning for anything else.
    #[must_use]
    pub fn snapshot(mut self, snapshot: Digest) -> Self {
        match &mut self.kind {
            BlockDeviceKind::Ebs(ebs) => ebs.snapshot = Some(snapshot),
            BlockDeviceKind::InstanceStore(store) => store.snapshot = snapshot,
            BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => {}
        }
        self
    }

    /// The volume that this is without a content, with the content of another mapping of the same disk and that one's name.
    pub(crate) fn with_content_of(&self, root: &Self) -> Option<Self> {
        let (said, wanted) = (self.as_ebs()?, root.as_ebs()?);
        let same = self.validate().ok()?.same_disk(&root.device_name.parse().ok()?);
        let encrypted = said.encrypted || wanted.encrypted;
        let ebs = Ebs { snapshot: wanted.snapshot, encrypted, ..said.clone() };
        let is_said = same && said.snapshot.is_none();
        is_said.then(|| Self { device_name: root.device_name.clone(), kind: BlockDeviceKind::Ebs(ebs) })
    }

    /// The same in another size; without meaning for what has none.
    pub(crate) fn with_size_gib(mut self, size: u32) -> Self {
        match &mut self.kind {
            BlockDeviceKind::Ebs(ebs) => ebs.volume_size_gib = size,
            BlockDeviceKind::InstanceStore(store) => store.size_gib = size,
            BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => {}
        }
        self
    }

    /// The size, if it has one of its own.
    pub(crate) fn size_gib(&self) -> Option<u32> {
        match &self.kind {
            BlockDeviceKind::Ebs(ebs) => Some(ebs.volume_size_gib),
            BlockDeviceKind::InstanceStore(store) => Some(store.size_gib),
            BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => None,
        }
    }

    fn with_ebs(mut self, change: impl FnOnce(&mut Ebs)) -> Self {
        if let BlockDeviceKind::Ebs(ebs) = &mut self.kind {
            change(ebs);
        }
        self
    }

    /// The device name. Within a [`Manifest`](crate::Manifest) it is a valid [`DeviceName`].
    pub fn device_name(&self) -> &str {
        &self.device_name
    }

    /// What is there.
    pub fn kind(&self) -> &BlockDeviceKind {
        &self.kind
    }

    /// The volume, if it is one.
    pub fn as_ebs(&self) -> Option<&Ebs> {
        match &self.kind {
            BlockDeviceKind::Ebs(ebs) => Some(ebs),
            _ => None,
        }
    }

    /// The content that it starts with, if it starts with any.
    pub fn content(&self) -> Option<&Digest> {
        match &self.kind {
            BlockDeviceKind::Ebs(ebs) => ebs.snapshot(),
            BlockDeviceKind::InstanceStore(store) => Some(store.snapshot()),
            BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => None,
        }
    }

    /// Checks that a snapshot of `bytes` fits, as [`Ebs::check_snapshot_size`] does. What takes none has room for any.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidBlockDeviceMapping`] if it does not.
    pub fn check_snapshot_size(&self, bytes: u64) -> Result<(), Error> {
        match &self.kind {
            BlockDeviceKind::Ebs(ebs) => ebs.check_snapshot_size(bytes),
            BlockDeviceKind::InstanceStore(store) => check_fits(bytes, store.size_gib),
            BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => Ok(()),
        }
    }

    /// Checks the mapping by itself and gives its device name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidBlockDeviceMapping`], with what is wrong.
    pub fn validate(&self) -> Result<DeviceName, Error> {
        let name: DeviceName = self.device_name.parse()?;
        let invalid = |problem| {
            let message = format!("device {name} {problem}");
            Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, message))
        };
        match &self.kind {
            BlockDeviceKind::Ebs(ebs) => {
                let (min, max) = ebs.volume_type.size_range_gib();
                if !(min..=max).contains(&ebs.volume_size_gib) {
                    let (size, kind) = (ebs.volume_size_gib, ebs.volume_type);
                    return invalid(format!("has {size} GiB, but {kind} volumes have {min} to {max} GiB"));
                }
            }
            BlockDeviceKind::Ephemeral { virtual_name } => {
                let number = virtual_name.strip_prefix("ephemeral");
                if !number.is_some_and(|number| is_number(number, 0, 23)) {
                    let virtual_name = quote(virtual_name);
                    return invalid(format!("is {virtual_name}, which is none of ephemeral0 to ephemeral23"));
                }
            }
            BlockDeviceKind::InstanceStore(store) => {
                let (size, max) = (store.size_gib, StoreRoot::MAX_GIB);
                if !(1..=max).contains(&size) {
                    return invalid(format!(
                        "has {size} GiB, but root devices of instance store have 1 to {max} GiB"
                    ));
                }
            }
            BlockDeviceKind::NoDevice => {}
        }
        Ok(name)
    }
}

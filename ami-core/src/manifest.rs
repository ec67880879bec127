//! The manifest: everything that an image is, wherever it is and whosever it is.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, words};
use crate::{
    Architecture, BlockDeviceKind, BlockDeviceMapping, Boot, BootSource, DeviceName, Digest, OperatingSystem,
    RootDeviceType, Software,
};

words! {
    /// How the machine is virtualised.
    ///
    /// ```
    /// use ami_core::VirtualizationType;
    ///
    /// assert_eq!("hvm".parse::<VirtualizationType>()?, VirtualizationType::Hvm);
    /// assert!("paravirtual".parse::<VirtualizationType>().is_err());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    VirtualizationType, "virtualization type" {
        /// In full, by the processor. EC2's older `paravirtual` is not known here.
        Hvm = "hvm",
    }
}

/// The immutable content of an image: what its digest covers, and nothing of region or owner.
///
/// A manifest is made by the builder of [`Ami`](crate::Ami) or read from JSON; both pass the same
/// checks, so that a `Manifest` at hand is a valid one. The order in which block devices and
/// software were given does not matter: a manifest keeps them sorted. Cloning is cheap.
///
/// ```
/// use ami_core::{Ami, BlockDeviceMapping, Digest, Manifest, X86_64};
///
/// let manifest = Ami::<X86_64>::builder("web")
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build_manifest()?;
/// assert_eq!(manifest.architecture().as_str(), "x86_64");
/// assert_eq!(manifest.root_device_name().as_str(), "/dev/xvda");
/// assert_eq!(manifest.root_volume(), manifest.block_device_mappings()[0].as_ebs());
/// assert_eq!(manifest.virtualization_type().as_str(), "hvm");
/// assert_eq!(manifest.boot(), &ami_core::Boot::root_volume());
/// assert!(manifest.operating_system().is_none() && manifest.software().is_empty());
/// assert!(manifest.parent().is_none());
/// let json = manifest.to_canonical_json();
/// assert!(String::from_utf8_lossy(&json).contains(&format!(r#""format":{}"#, Manifest::FORMAT)));
/// assert_eq!(Manifest::from_json_with_digest(&json, &manifest.digest())?, manifest);
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Manifest(Arc<Inner>);

struct Inner {
    content: Content,
    root_device: DeviceName,
    canonical: Vec<u8>,
    digest: Digest,
}

/// The manifest as it is in JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Content {
    pub(crate) format: u32,
    pub(crate) architecture: Architecture,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) operating_system: Option<OperatingSystem>,
    pub(crate) virtualization_type: VirtualizationType,
    pub(crate) root_device_name: String,
    pub(crate) block_device_mappings: Vec<BlockDeviceMapping>,
    pub(crate) boot: Boot,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) software: Vec<Software>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<Digest>,
}

impl Manifest {
    /// The version of the format that is written, and the only one that is read.
    pub const FORMAT: u32 = 1;

    /// The most bytes that a manifest has in JSON, read or written.
    pub const MAX_JSON: usize = 4 << 20;

    /// Reads a manifest from JSON, in canonical form or not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidManifest`] if the bytes are no manifest: longer than
    /// [`MAX_JSON`](Self::MAX_JSON), no JSON, of another format, with a field too many or too few; and
    /// the builder's errors if the manifest breaks one of its rules.
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        /// The one field that is there in every version of the format.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }

        check_length(json.len())?;
        let invalid =
            |err| Error::new(ErrorKind::InvalidManifest, "the manifest cannot be read").with_source(err);
        let Version { format } =
            serde_json::from_slice(json).map_err(|err: serde_json::Error| invalid(err))?;
        check_format(format)?;
        Self::new(serde_json::from_slice(json).map_err(invalid)?)
    }

    /// Reads a manifest from JSON and checks that it is the one that `digest` names.
    ///
    /// # Errors
    ///
    /// Those of [`from_json`](Self::from_json), and [`ErrorKind::DigestMismatch`].
    pub fn from_json_with_digest(json: &[u8], digest: &Digest) -> Result<Self, Error> {
        let manifest = Self::from_json(json)?;
        if manifest.digest() != *digest {
            let message = format!("the manifest is {}, not {digest}", manifest.digest());
            return Err(Error::new(ErrorKind::DigestMismatch, message));
        }
        Ok(manifest)
    }

    /// Reads a manifest from exactly the bytes that [`to_canonical_json`](Self::to_canonical_json)
    /// writes.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    /// use ami_core::Manifest;
    ///
    /// # let manifest = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build_manifest()?;
    /// let canonical = manifest.to_canonical_json();
    /// assert!(canonical.len() <= Manifest::MAX_JSON);
    /// assert_eq!(Manifest::from_canonical_json(&canonical)?, manifest);
    /// let spaced = [b" ".as_slice(), &canonical].concat();
    /// assert_eq!(Manifest::from_json(&spaced)?, manifest);
    /// assert!(Manifest::from_canonical_json(&spaced).is_err());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`from_json`](Self::from_json), and [`ErrorKind::InvalidManifest`] for any other form.
    pub fn from_canonical_json(json: &[u8]) -> Result<Self, Error> {
        let manifest = Self::from_json(json)?;
        if manifest.0.canonical != json {
            return Err(Error::new(ErrorKind::InvalidManifest, "the manifest is not in canonical form"));
        }
        Ok(manifest)
    }

    /// The one way to a manifest: brings `content` into order, checks it, and computes its digest.
    pub(crate) fn new(mut content: Content) -> Result<Self, Error> {
        content.block_device_mappings.sort_by(|a, b| a.device_name().cmp(b.device_name()));
        content.software.sort();
        let root_device = validate(&content)?;
        let canonical = serde_json_canonicalizer::to_vec(&content).map_err(|err| {
            Error::new(ErrorKind::InvalidManifest, "the manifest cannot be written").with_source(err)
        })?;
        check_length(canonical.len())?;
        let digest = Digest::of(&canonical);
        Ok(Self(Arc::new(Inner { content, root_device, canonical, digest })))
    }

    /// The same with other disks: another manifest, of another digest.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let manifest = ami.manifest();
    /// let secret = |disk: &BlockDeviceMapping| disk.clone().snapshot(Digest::of(b"root, encrypted")).encrypted(true);
    /// let encrypted = manifest.with_block_devices(manifest.block_device_mappings().iter().map(secret))?;
    /// assert_ne!(encrypted.digest(), manifest.digest());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The builder's errors if the manifest then breaks one of its rules.
    pub fn with_block_devices(
        &self,
        mappings: impl IntoIterator<Item = BlockDeviceMapping>,
    ) -> Result<Self, Error> {
        let block_device_mappings = mappings.into_iter().collect();
        Self::new(Content { block_device_mappings, ..self.0.content.clone() })
    }

    /// The manifest in canonical JSON (RFC 8785): the bytes that the digest covers.
    pub fn to_canonical_json(&self) -> Vec<u8> {
        self.0.canonical.clone()
    }

    /// The SHA-256 digest of the manifest in canonical JSON.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// The architecture.
    pub fn architecture(&self) -> Architecture {
        self.0.content.architecture
    }

    /// The operating system, if the image says which.
    pub fn operating_system(&self) -> Option<&OperatingSystem> {
        self.0.content.operating_system.as_ref()
    }

    /// How the machine is virtualised.
    pub fn virtualization_type(&self) -> VirtualizationType {
        self.0.content.virtualization_type
    }

    /// The name of the root device.
    pub fn root_device_name(&self) -> &DeviceName {
        &self.0.root_device
    }

    /// The mapping of the root device.
    pub fn root_device(&self) -> Option<&BlockDeviceMapping> {
        let root = self.root_device_name().as_str();
        self.block_device_mappings().iter().find(|mapping| mapping.device_name() == root)
    }

    /// What the root device is.
    ///
    /// ```
    /// use ami_core::{Ami, BlockDeviceMapping, Digest, RootDeviceType, X86_64};
    ///
    /// let manifest = Ami::<X86_64>::builder("scratch")
    ///     .root_device("/dev/xvda")
    ///     .block_device(BlockDeviceMapping::instance_store_root("/dev/xvda", Digest::of(b"root"), 8))
    ///     .build_manifest()?;
    /// assert_eq!(manifest.root_device_type(), RootDeviceType::InstanceStore);
    /// assert!(manifest.root_volume().is_none() && manifest.root_device().is_some());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn root_device_type(&self) -> RootDeviceType {
        match self.root_volume() {
            Some(_) => RootDeviceType::Ebs,
            None => RootDeviceType::InstanceStore,
        }
    }

    /// The volume of the root device, unless that is instance store.
    pub fn root_volume(&self) -> Option<&crate::Ebs> {
        self.root_device()?.as_ebs()
    }

    /// The disks, sorted by device name. Each is valid, and no two stand for one disk.
    pub fn block_device_mappings(&self) -> &[BlockDeviceMapping] {
        &self.0.content.block_device_mappings
    }

    /// How the image boots.
    pub fn boot(&self) -> &Boot {
        &self.0.content.boot
    }

    /// The software on the image, sorted by name and version.
    pub fn software(&self) -> &[Software] {
        &self.0.content.software
    }

    /// The image from which this one was made.
    pub fn parent(&self) -> Option<&Digest> {
        self.0.content.parent.as_ref()
    }
}

fn check_length(len: usize) -> Result<(), Error> {
    if len > Manifest::MAX_JSON {
        let max = Manifest::MAX_JSON;
        let message = format!("the manifest has {len} bytes, at most {max} can be");
        return Err(Error::new(ErrorKind::InvalidManifest, message));
    }
    Ok(())
}

fn check_format(format: u32) -> Result<(), Error> {
    if format != Manifest::FORMAT {
        let message = format!("the manifest is of format {format}, but only {} is known", Manifest::FORMAT);
        return Err(Error::new(ErrorKind::InvalidManifest, message));
    }
    Ok(())
}

/// Every rule for a manifest, whether it was built or read. Takes block devices and software as
/// sorted, and gives the name of the root device.
fn validate(content: &Content) -> Result<DeviceName, Error> {
    check_format(content.format)?;
    if let Some(os) = &content.operating_system {
        os.validate()?;
    }
    content.boot.validate()?;
    let root_device = validate_devices(content)?;
    content.software.iter().try_for_each(Software::validate)?;
    for pair in content.software.windows(2) {
        if pair[0] == pair[1] {
            let message = format!("the software {} {} is listed twice", pair[0].name(), pair[0].version());
            return Err(Error::new(ErrorKind::InvalidParameterValue, message));
        }
    }
    Ok(root_device)
}

fn validate_devices(content: &Content) -> Result<DeviceName, Error> {
    let invalid = |message| Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, message));
    if content.root_device_name.is_empty() {
        return Err(Error::new(ErrorKind::MissingParameter, "the image has no root device name"));
    }
    let root: DeviceName = content.root_device_name.parse()?;

    // The search is quadratic, but ends at the first repetition, and there are no more than 729 disks to
    // name: 702 by letters, 27 by NVMe numbers.
    let mut names: Vec<DeviceName> = Vec::new();
    for mapping in &content.block_device_mappings {
        let name = mapping.validate()?;
        if let Some(other) = names.iter().find(|other| other.same_disk(&name)) {
            return invalid(match *other == name {
                true => format!("device {name} is mapped twice"),
                false => format!("devices {other} and {name} stand for one disk"),
            });
        }
        if matches!(mapping.kind(), BlockDeviceKind::InstanceStore(_)) && name != root {
            return invalid(format!(
                "device {name} is instance store with a content, which root devices alone have"
            ));
        }
        names.push(name);
    }

    let Some(mapping) = content.block_device_mappings.iter().find(|m| m.device_name() == root.as_str())
    else {
        return invalid(format!("the root device {root} is not mapped"));
    };
    let ebs = match mapping.kind() {
        BlockDeviceKind::Ebs(ebs) => ebs,
        BlockDeviceKind::InstanceStore(_) => return Ok(root),
        BlockDeviceKind::Ephemeral { .. } | BlockDeviceKind::NoDevice => {
            return invalid(format!(
                "the root device {root} is neither an EBS volume nor instance store with a content"
            ));
        }
    };
    if !ebs.volume_type().can_boot() {
        return invalid(format!(
            "the root device {root} is a {} volume, which cannot boot",
            ebs.volume_type()
        ));
    }
    if ebs.snapshot().is_none() && *content.boot.source() == BootSource::RootVolume {
        return invalid(format!("the root device {root} has no snapshot, but the image boots from it"));
    }
    Ok(root)
}

impl PartialEq for Manifest {
    fn eq(&self, other: &Self) -> bool {
        self.0.canonical == other.0.canonical
    }
}

impl Eq for Manifest {}

impl std::hash::Hash for Manifest {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.digest.hash(state);
    }
}

impl fmt::Debug for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Manifest").field(&self.0.content).finish()
    }
}

impl Serialize for Manifest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.content.serialize(serializer)
    }
}

/// Checks like [`Manifest::from_json`], but for the length of what is read, which is the
/// deserializer's to bound.
impl<'de> Deserialize<'de> for Manifest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Content::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

//! The builder of images.

use std::marker::PhantomData;

use crate::error::{Error, ErrorKind};
use crate::manifest::Content;
use crate::{
    AccountId, Ami, Arch, Architecture, BlockDeviceMapping, Boot, BootSource, Digest, Manifest,
    OperatingSystem, RegionName, Software, Timestamp, TpmSupport, VirtualizationType,
};

/// Describes an image step by step. No step fails; [`build`](Self::build) checks everything.
///
/// ```
/// use ami_core::{Ami, BlockDeviceMapping, Digest, OperatingSystem, Software, X86_64};
///
/// let ami = Ami::<X86_64>::builder("web-server")
///     .operating_system(OperatingSystem::linux("debian", "12"))
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"the root volume"), 8))
///     .software(Software::new("nginx", "1.22.1-9"))
///     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// assert_eq!(ami.name(), "web-server");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder makes an image only when built"]
pub struct AmiBuilder<A: Arch> {
    architecture: Option<Architecture>,
    name: String,
    created: Option<Timestamp>,
    operating_system: Option<OperatingSystem>,
    root_device: String,
    root_size_gib: Option<u32>,
    block_devices: Vec<BlockDeviceMapping>,
    boot: Boot,
    tpm: Option<TpmSupport>,
    software: Vec<Software>,
    parent: Option<Digest>,
    arch: PhantomData<A>,
}

impl<A: Arch> AmiBuilder<A> {
    pub(crate) fn new(architecture: Option<Architecture>, name: String) -> Self {
        Self {
            architecture,
            name,
            created: None,
            operating_system: None,
            root_device: String::new(),
            root_size_gib: None,
            block_devices: Vec::new(),
            boot: Boot::default(),
            tpm: None,
            software: Vec::new(),
            parent: None,
            arch: PhantomData,
        }
    }

    /// The name of the image that is being described.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The operating system on the image.
    pub fn operating_system(mut self, os: OperatingSystem) -> Self {
        self.operating_system = Some(os);
        self
    }

    /// The name of the root device, which must be mapped to a volume or to instance store with a content.
    pub fn root_device(mut self, name: impl Into<String>) -> Self {
        self.root_device = name.into();
        self
    }

    /// The name of the root device, if it has been said.
    ///
    /// ```
    /// use ami_core::{Ami, X86_64};
    ///
    /// let builder = Ami::<X86_64>::builder("web");
    /// assert_eq!(builder.root_device_name(), None);
    /// assert_eq!(builder.root_device("/dev/sda1").root_device_name(), Some("/dev/sda1"));
    /// ```
    pub fn root_device_name(&self) -> Option<&str> {
        Some(self.root_device.as_str()).filter(|name| !name.is_empty())
    }

    /// The size of the root device in GiB. Where it is mapped in another size, the image is refused.
    ///
    /// ```
    /// use ami_core::{Ami, BlockDeviceMapping, Digest, ErrorKind, X86_64};
    ///
    /// let builder = Ami::<X86_64>::builder("web").root_device("/dev/xvda").root_size_gib(20);
    /// let small = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
    /// let refused = builder.block_device(small).build_manifest().unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::InvalidBlockDeviceMapping);
    /// ```
    pub fn root_size_gib(mut self, size: u32) -> Self {
        self.root_size_gib = Some(size);
        self
    }

    /// Gives the root device, which is called as in `root` from then on, the content of `root`. The rest of `root` is what it
    /// is where nothing else has been said: a volume that is mapped there without a content says size, type, encryption and
    /// whether it goes with its instance, and [`root_size_gib`](Self::root_size_gib) the size. A volume of a content that is
    /// encrypted is encrypted.
    ///
    /// ```
    /// use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    ///
    /// let builder = || Ami::<X86_64>::builder("web").root_device("/dev/sda1");
    /// let content = || BlockDeviceMapping::ebs("/dev/sda1", Digest::of(b"root"), 8);
    /// let plain = builder().root_content(content()).build_manifest()?;
    /// assert_eq!(plain.root_device(), Some(&content()));
    ///
    /// let kept = BlockDeviceMapping::blank("/dev/xvda", 20).delete_on_termination(false);
    /// let manifest = builder().block_device(kept).root_content(content()).build_manifest()?;
    /// let root = manifest.root_volume().ok_or("a volume")?;
    /// assert_eq!((root.snapshot(), root.volume_size_gib()), (Some(&Digest::of(b"root")), 20));
    /// assert!(!root.delete_on_termination());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn root_content(mut self, root: BlockDeviceMapping) -> Self {
        self.root_device = root.device_name().to_owned();
        let mapped =
            self.block_devices.iter_mut().find_map(|said| Some((said.with_content_of(&root)?, said)));
        match mapped {
            Some((merged, said)) => *said = merged,
            None => self.block_devices.push(match self.root_size_gib {
                Some(size) => root.with_size_gib(size),
                None => root,
            }),
        }
        self
    }

    /// Adds a disk.
    pub fn block_device(mut self, mapping: BlockDeviceMapping) -> Self {
        self.block_devices.push(mapping);
        self
    }

    /// Adds disks.
    pub fn block_devices(mut self, mappings: impl IntoIterator<Item = BlockDeviceMapping>) -> Self {
        self.block_devices.extend(mappings);
        self
    }

    /// How the image boots; from its root volume unless this says otherwise.
    pub fn boot(mut self, boot: impl Into<Boot>) -> Self {
        self.boot = boot.into();
        self
    }

    /// Where the kernel comes from, through the firmware that [`boot`](Self::boot) says.
    ///
    /// ```
    /// # use ami_core::{BlockDeviceMapping, Digest, X86_64};
    /// use ami_core::{Ami, Boot, BootMode, BootSource};
    ///
    /// # let builder = Ami::<X86_64>::builder("web").root_device("/dev/xvda");
    /// # let builder = builder.block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8));
    /// let builder = builder.boot(Boot::root_volume().mode(BootMode::Uefi));
    /// let manifest = builder.boot_source(BootSource::RootVolume).build_manifest()?;
    /// assert_eq!(manifest.boot().boot_mode(), Some(BootMode::Uefi));
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn boot_source(mut self, source: BootSource) -> Self {
        self.boot = self.boot.with_source(source);
        self
    }

    /// Which Trusted Platform Module the image is made for, whatever [`boot`](Self::boot) says before or after. It is no image
    /// for machines without one, and has the boot mode `uefi`.
    ///
    /// ```
    /// # use ami_core::{BlockDeviceMapping, Digest, X86_64};
    /// use ami_core::{Ami, Boot, BootMode, TpmSupport};
    ///
    /// # let builder = Ami::<X86_64>::builder("vault").root_device("/dev/xvda");
    /// # let builder = builder.block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8));
    /// let builder = builder.boot(Boot::root_volume().mode(BootMode::Uefi)).tpm_support(TpmSupport::V2_0);
    /// assert_eq!(builder.build_manifest()?.boot().tpm_support(), Some(TpmSupport::V2_0));
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn tpm_support(mut self, tpm: TpmSupport) -> Self {
        self.tpm = Some(tpm);
        self
    }

    /// Adds a piece of software to the list of what is installed.
    pub fn software(mut self, software: Software) -> Self {
        self.software.push(software);
        self
    }

    /// Adds pieces of software to the list of what is installed.
    pub fn software_list(mut self, software: impl IntoIterator<Item = Software>) -> Self {
        self.software.extend(software);
        self
    }

    /// The digest of the image from which this one was made.
    pub fn parent(mut self, parent: Digest) -> Self {
        self.parent = Some(parent);
        self
    }

    /// When the image was made; the moment of [`build`](Self::build) unless this says otherwise.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    /// let image = Ami::<X86_64>::builder("web")
    ///     .root_device("/dev/xvda")
    ///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8));
    /// let (region, owner) = ("us-east-1".parse()?, "123456789012".parse()?);
    /// let early = image.clone().created("2026-01-31T12:00:00.000Z".parse()?).build(&region, &owner)?;
    /// assert_eq!(early, image.build(&region, &owner)?, "the time is no part of what an image is");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn created(mut self, created: Timestamp) -> Self {
        self.created = Some(created);
        self
    }

    /// Makes the image, in a region and for an owner.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::MalformedName`], and those of [`build_manifest`](Self::build_manifest).
    pub fn build(mut self, region: &RegionName, owner: &AccountId) -> Result<Ami<A>, Error> {
        let name = std::mem::take(&mut self.name);
        let created = self.created.unwrap_or_else(Timestamp::now);
        let manifest = self.build_manifest()?;
        Ami::assemble(region.clone(), *owner, name, created, manifest)
    }

    /// Makes the manifest alone.
    ///
    /// ```
    /// use ami_core::{Ami, Arm64, BlockDeviceMapping, Boot, Digest, Software};
    ///
    /// let manifest = Ami::<Arm64>::builder("a name that no manifest has")
    ///     .root_device("/dev/xvda")
    ///     .block_devices(["/dev/xvda", "/dev/sdf"].map(|name| BlockDeviceMapping::blank(name, 8)))
    ///     .boot(Boot::direct(Digest::of(b"kernel"), Some(Digest::of(b"initrd")), "root=/dev/vda"))
    ///     .software_list([Software::new("nginx", "1.22.1-9"), Software::new("curl", "7.88.1-10")])
    ///     .parent(Digest::of(b"the image that it was made from"))
    ///     .build_manifest()?;
    /// assert_eq!(manifest.software()[0].name(), "curl", "sorted");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`ErrorKind::MissingParameter`] without a root device, or without an architecture;
    /// - [`ErrorKind::InvalidBlockDeviceMapping`] for a device name that is none, a device mapped twice,
    ///   a size that the volume type does not have, or a root device that is not mapped to a volume
    ///   that can boot or to instance store with a content, or is so in another size than was said, or
    ///   something else that is mapped to such;
    /// - [`ErrorKind::InvalidParameterValue`] and [`ErrorKind::InvalidParameterCombination`] for
    ///   what else is wrong;
    /// - [`ErrorKind::InvalidManifest`] if all of it is too long.
    pub fn build_manifest(self) -> Result<Manifest, Error> {
        let Some(architecture) = self.architecture else {
            return Err(Error::new(ErrorKind::MissingParameter, "the image has no architecture"));
        };
        let manifest = Manifest::new(Content {
            format: Manifest::FORMAT,
            architecture,
            operating_system: self.operating_system,
            virtualization_type: VirtualizationType::Hvm,
            root_device_name: self.root_device,
            block_device_mappings: self.block_devices,
            // Kept apart until now: whoever says later how it boots does not take it away.
            boot: match self.tpm {
                Some(tpm) => self.boot.tpm(tpm),
                None => self.boot,
            },
            software: self.software,
            parent: self.parent,
        })?;
        let found = manifest.root_device().and_then(BlockDeviceMapping::size_gib);
        match self.root_size_gib.filter(|size| Some(*size) != found) {
            Some(size) => {
                let message = format!("the root device is to have {size} GiB, and is mapped in another size");
                Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, message))
            }
            None => Ok(manifest),
        }
    }
}

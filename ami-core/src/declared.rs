//! Images declared in a program, to be compared with those that a region has.

use std::fmt;
use std::marker::PhantomData;

use crate::{
    Ami, AmiBuilder, AmiId, Arch, BlockDeviceMapping, BootMode, OperatingSystem, OsFamily, Software,
    TpmSupport,
};

/// What a program expects of an image: a class written down in code, also as a constant.
///
/// It says as much as its author wants to hold; what it does not say is free. An image that is compared with it by
/// [`check`](Self::check) comes back with its architecture in its type, and one that is to be made as declared begins with
/// [`builder`](Self::builder).
///
/// ```
/// use ami_core::{Ami, AnyAmi, BlockDeviceMapping, BootMode, DeclaredAmi, Digest, OsFamily, X86_64};
///
/// const WEB: DeclaredAmi<X86_64> = DeclaredAmi::new("web")
///     .operating_system(OsFamily::Linux, "debian", "12")
///     .root_device("/dev/xvda")
///     .root_size_gib(8)
///     .software(&[("nginx-light", None), ("openssh-server", Some("1:9.2p1-2"))]);
///
/// let registered = WEB
///     .builder()
///     .software_list([ami_core::Software::new("nginx-light", "1.22.1-9")])
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let ami: Ami<X86_64> = WEB.check(&registered.into_any())?;
///
/// let larger = WEB.root_size_gib(16).boot_mode(BootMode::Uefi);
/// let differs = larger.check(&ami).unwrap_err();
/// let fields: Vec<_> = differs.differences().iter().map(|d| d.field).collect();
/// assert_eq!(fields, ["root-device-size", "boot-mode"]);
/// assert_eq!(differs.differences()[0].to_string(), "root-device-size is 8 GiB, not 16 GiB");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeclaredAmi<A: Arch> {
    name: &'static str,
    operating_system: Option<(OsFamily, &'static str, &'static str)>,
    root_device: Option<&'static str>,
    root_size_gib: Option<u32>,
    boot_mode: Option<BootMode>,
    tpm_support: Option<TpmSupport>,
    software: &'static [(&'static str, Option<&'static str>)],
    digest: Option<&'static str>,
    arch: PhantomData<A>,
}

impl<A: Arch> DeclaredAmi<A> {
    /// An image of this name, and of the architecture `A`, of which else nothing is said yet.
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            operating_system: None,
            root_device: None,
            root_size_gib: None,
            boot_mode: None,
            tpm_support: None,
            software: &[],
            digest: None,
            arch: PhantomData,
        }
    }

    /// It has this operating system; name and version as `ID` and `VERSION_ID` of os-release(5) give them.
    pub const fn operating_system(
        mut self,
        family: OsFamily,
        name: &'static str,
        version: &'static str,
    ) -> Self {
        self.operating_system = Some((family, name, version));
        self
    }

    /// Its root device has this name.
    pub const fn root_device(mut self, name: &'static str) -> Self {
        self.root_device = Some(name);
        self
    }

    /// Its root device has this size, in GiB.
    pub const fn root_size_gib(mut self, size: u32) -> Self {
        self.root_size_gib = Some(size);
        self
    }

    /// It boots in this mode.
    pub const fn boot_mode(mut self, mode: BootMode) -> Self {
        self.boot_mode = Some(mode);
        self
    }

    /// It is made for this Trusted Platform Module.
    pub const fn tpm_support(mut self, tpm: TpmSupport) -> Self {
        self.tpm_support = Some(tpm);
        self
    }

    /// It lists all of this software, in these versions or, where none is said, in any.
    pub const fn software(mut self, software: &'static [(&'static str, Option<&'static str>)]) -> Self {
        self.software = software;
        self
    }

    /// Its [digest](Ami::digest) is this, in hexadecimal: it is this image and no other.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, DeclaredAmi, Digest, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// const PINNED: DeclaredAmi<X86_64> = DeclaredAmi::new("web")
    ///     .digest("7d3c1c8f0e00f3cc7cc7b2c3b2e4a5d4f3a1c0ffee00000000000000000000aa");
    /// assert_eq!(PINNED.check(&ami).unwrap_err().differences()[0].field, "digest");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub const fn digest(mut self, hex: &'static str) -> Self {
        self.digest = Some(hex);
        self
    }

    /// The name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Begins an image as it is declared, whose disks are still to be said: of the root device, which is as large as declared,
    /// at least the content. Software that is declared in any version is,
    /// too. With [`AnyArch`](crate::AnyArch) the architecture is missing, which building says.
    pub fn builder(&self) -> AmiBuilder<A> {
        let mut builder = Ami::builder(self.name);
        if let Some((family, name, version)) = self.operating_system {
            builder = builder.operating_system(OperatingSystem::new(family, name, version));
        }
        if let Some(name) = self.root_device {
            builder = builder.root_device(name);
        }
        if let Some(size) = self.root_size_gib {
            builder = builder.root_size_gib(size);
        }
        if let Some(mode) = self.boot_mode {
            builder = builder.boot(crate::Boot::root_volume().mode(mode));
        }
        if let Some(tpm) = self.tpm_support {
            builder = builder.tpm_support(tpm);
        }
        let software =
            self.software.iter().filter_map(|(name, version)| Some(Software::new(*name, (*version)?)));
        builder.software_list(software)
    }

    /// The image, if it is as declared.
    ///
    /// # Errors
    ///
    /// All that is different.
    pub fn check<B: Arch>(&self, ami: &Ami<B>) -> Result<Ami<A>, DeclarationMismatch> {
        let differences = self.differences(ami);
        match ami.typed() {
            Ok(ami) if differences.is_empty() => Ok(ami),
            _ => Err(DeclarationMismatch { id: ami.id(), differences }),
        }
    }

    fn differences<B: Arch>(&self, ami: &Ami<B>) -> Vec<Difference> {
        let mut all = Vec::new();
        let mut compare = |field: &'static str, declared: Option<String>, found: Option<String>| {
            if let Some(declared) = declared.filter(|declared| Some(declared) != found.as_ref()) {
                all.push(Difference { field, declared, found });
            }
        };
        let manifest = ami.manifest();
        let gib = |size: u32| format!("{size} GiB");
        compare("architecture", A::ARCHITECTURE.map(|a| a.to_string()), Some(ami.architecture().to_string()));
        compare("name", Some(self.name.to_owned()), Some(ami.name().to_owned()));
        compare(
            "operating-system",
            self.operating_system.map(|(family, name, version)| format!("{family} {name} {version}")),
            manifest.operating_system().map(|os| format!("{} {} {}", os.family(), os.name(), os.version())),
        );
        compare(
            "root-device-name",
            self.root_device.map(str::to_owned),
            Some(manifest.root_device_name().to_string()),
        );
        compare(
            "root-device-size",
            self.root_size_gib.map(gib),
            manifest.root_device().and_then(BlockDeviceMapping::size_gib).map(gib),
        );
        let mode = |mode: BootMode| mode.to_string();
        compare("boot-mode", self.boot_mode.map(mode), manifest.boot().boot_mode().map(mode));
        let tpm = |tpm: TpmSupport| tpm.to_string();
        compare("tpm-support", self.tpm_support.map(tpm), manifest.boot().tpm_support().map(tpm));
        compare("digest", self.digest.map(str::to_owned), Some(ami.digest().to_hex()));
        for (name, version) in self.software {
            let listed = manifest.software().iter().filter(|software| software.name() == *name);
            let versions: Vec<&str> = listed.map(Software::version).collect();
            let is_there = version.map_or(!versions.is_empty(), |version| versions.contains(&version));
            if !is_there {
                let said = |version: &str| format!("{name} {version}");
                let declared = said(version.unwrap_or("in any version"));
                let found = (!versions.is_empty()).then(|| said(&versions.join(", ")));
                all.push(Difference { field: "software", declared, found });
            }
        }
        all
    }
}

/// In what an image is not as declared; [`DeclaredAmi`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// What it is that differs, such as `root-device-size`.
    pub field: &'static str,
    /// What was declared.
    pub declared: String,
    /// What the image has, if it has any.
    pub found: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = self.found.as_deref().unwrap_or("nothing");
        write!(f, "{} is {found}, not {}", self.field, self.declared)
    }
}

/// An image is not as a program declares it; [`DeclaredAmi`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{id} is not as declared: {}", join(.differences))]
pub struct DeclarationMismatch {
    id: AmiId,
    differences: Vec<Difference>,
}

impl DeclarationMismatch {
    /// The image.
    pub fn id(&self) -> AmiId {
        self.id
    }

    /// All that is different, in the order of the declaration's fields.
    pub fn differences(&self) -> &[Difference] {
        &self.differences
    }
}

fn join(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AnyAmi, AnyArch, Architecture, Arm64, Boot, Digest, X86_64};

    const DECLARED: DeclaredAmi<X86_64> = DeclaredAmi::new("web")
        .operating_system(OsFamily::Linux, "debian", "12")
        .root_device("/dev/xvda")
        .root_size_gib(8)
        .boot_mode(BootMode::Uefi)
        .software(&[("nginx", Some("1.22")), ("curl", None)]);

    fn image(architecture: Architecture) -> AnyAmi {
        AnyAmi::builder_for(architecture, "web")
            .operating_system(OperatingSystem::linux("debian", "12"))
            .root_device("/dev/xvda")
            .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
            .boot(Boot::root_volume().mode(BootMode::Uefi))
            .software_list([Software::new("nginx", "1.22"), Software::new("curl", "8")])
            .build(&"us-east-1".parse().unwrap(), &"123456789012".parse().unwrap())
            .unwrap()
    }

    #[test]
    fn what_is_as_declared_is_typed() {
        let ami = image(Architecture::X86_64);
        assert_eq!(DECLARED.check(&ami).unwrap(), ami);
        assert_eq!(DeclaredAmi::<AnyArch>::new("web").check(&ami).unwrap(), ami);
    }

    #[test]
    fn each_thing_that_differs_is_named() {
        let ami = image(Architecture::X86_64);
        let other = |declared: DeclaredAmi<X86_64>, says: &str| {
            let err = declared.check(&ami).unwrap_err();
            assert_eq!((err.id(), err.differences().len()), (ami.id(), 1), "{err}");
            assert_eq!(err.to_string(), format!("{} is not as declared: {says}", ami.id()));
        };
        other(DeclaredAmi { name: "wob", ..DECLARED }, "name is web, not wob");
        let os = DECLARED.operating_system(OsFamily::Linux, "debian", "13");
        other(os, "operating-system is linux debian 12, not linux debian 13");
        other(DECLARED.root_device("/dev/sda1"), "root-device-name is /dev/xvda, not /dev/sda1");
        other(DECLARED.root_size_gib(9), "root-device-size is 8 GiB, not 9 GiB");
        other(DECLARED.boot_mode(BootMode::LegacyBios), "boot-mode is uefi, not legacy-bios");
        other(DECLARED.tpm_support(TpmSupport::V2_0), "tpm-support is nothing, not v2.0");
        other(DECLARED.digest("00"), &format!("digest is {}, not 00", ami.digest().to_hex()));
        other(DECLARED.software(&[("nginx", Some("2"))]), "software is nginx 1.22, not nginx 2");
        other(DECLARED.software(&[("vim", None)]), "software is nothing, not vim in any version");
        let arm = image(Architecture::Arm64);
        let err = DECLARED.check(&arm).unwrap_err();
        assert_eq!(err.differences()[0].to_string(), "architecture is arm64, not x86_64");
        assert!(DeclaredAmi::<Arm64>::new("web").check(&arm).is_ok());
    }

    #[test]
    fn what_is_built_as_declared_is_as_declared() {
        let declared = DECLARED.tpm_support(TpmSupport::V2_0);
        let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
        let built = declared.builder().software(Software::new("curl", "8")).block_device(root);
        let built = built.build(&"us-east-1".parse().unwrap(), &"123456789012".parse().unwrap()).unwrap();
        assert_eq!(declared.check(&built).unwrap(), built);
    }

    #[test]
    fn a_tpm_stays_whatever_is_said_of_booting_before_or_after() {
        let tpm = |builder: AmiBuilder<X86_64>| {
            let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
            let builder = builder.root_device("/dev/xvda").block_device(root);
            builder.build_manifest().unwrap().boot().tpm_support()
        };
        let uefi = || Boot::root_volume().mode(BootMode::Uefi);
        let new = || Ami::<X86_64>::builder("vault");
        let expected = Some(TpmSupport::V2_0);
        assert_eq!(tpm(new().boot(uefi()).tpm_support(TpmSupport::V2_0)), expected);
        assert_eq!(tpm(new().tpm_support(TpmSupport::V2_0).boot(uefi())), expected);
        assert_eq!(tpm(new().boot(uefi().tpm(TpmSupport::V2_0))), expected);
        assert_eq!(tpm(DECLARED.tpm_support(TpmSupport::V2_0).builder().boot(uefi())), expected);
        assert_eq!(tpm(new().boot(uefi())), None);
    }
}

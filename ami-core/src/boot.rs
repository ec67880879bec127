//! How an image boots.

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::error::{Error, ErrorKind, invalid_value, words};

words! {
    /// The firmware that an image wants, in EC2's words.
    ///
    /// ```
    /// use ami_core::BootMode;
    ///
    /// assert_eq!("uefi-preferred".parse::<BootMode>()?, BootMode::UefiPreferred);
    /// assert_eq!(BootMode::ALL[0].as_str(), "legacy-bios");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    BootMode, "boot mode" {
        /// BIOS.
        LegacyBios = "legacy-bios",
        /// UEFI.
        Uefi = "uefi",
        /// UEFI where the machine has it, else BIOS.
        UefiPreferred = "uefi-preferred",
    }
}

words! {
    /// The Trusted Platform Module that an image is made for (`TpmSupport`). It is found by UEFI, so that this is the boot mode
    /// of such an image. EC2 launches it on instance types with NitroTPM and on no others; the machines of `instance-core` have
    /// no TPM, so that a launch of it is refused there.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, ErrorKind, X86_64};
    /// use ami_core::{Boot, BootMode, TpmSupport};
    ///
    /// # let builder = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8));
    /// let boot = Boot::root_volume().mode(BootMode::Uefi).tpm(TpmSupport::V2_0);
    /// let manifest = builder.clone().boot(boot).build_manifest()?;
    /// assert_eq!(manifest.boot().tpm_support(), Some(TpmSupport::V2_0));
    ///
    /// let alone = builder.boot(Boot::root_volume().tpm(TpmSupport::V2_0)).build_manifest();
    /// assert_eq!(alone.unwrap_err().kind(), ErrorKind::InvalidParameterCombination);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    TpmSupport, "support for a TPM" {
        /// TPM 2.0.
        V2_0 = "v2.0",
    }
}

/// Where the kernel comes from.
///
/// ```
/// use ami_core::{Boot, BootSource, Digest};
///
/// let boot = Boot::direct(Digest::of(b"kernel"), None, "console=ttyS0 root=/dev/vda1 ro");
/// assert!("console=ttyS0 root=/dev/vda1 ro".len() <= Boot::MAX_COMMAND_LINE);
/// match boot.source() {
///     BootSource::Direct { kernel, initrd: None, .. } => assert_eq!(*kernel, Digest::of(b"kernel")),
///     other => panic!("{other:?}"),
/// }
/// assert_eq!(Boot::from(BootSource::RootVolume), Boot::default());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
#[non_exhaustive]
pub enum BootSource {
    /// The boot loader entries on the root volume name it.
    RootVolume,
    /// The image carries it beside the root volume.
    Direct {
        /// The content of the kernel.
        kernel: Digest,
        /// The content of the initial RAM disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<Digest>,
        /// The kernel's command line: at most [`Boot::MAX_COMMAND_LINE`] bytes in one line.
        command_line: String,
    },
}

/// How an image boots: where its kernel comes from, and through which firmware.
///
/// An absent boot mode means that the image asks for no firmware: the kernel is loaded directly. That
/// is the only way of a [`BootSource::Direct`], which therefore takes no boot mode.
///
/// ```
/// use ami_core::{Boot, BootMode, BootSource};
///
/// let boot = Boot::root_volume().mode(BootMode::Uefi);
/// assert_eq!(boot.source(), &BootSource::RootVolume);
/// assert_eq!(boot.boot_mode(), Some(BootMode::Uefi));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    source: BootSource,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<BootMode>,
    #[serde(rename = "tpmSupport", default, skip_serializing_if = "Option::is_none")]
    tpm: Option<TpmSupport>,
}

impl Boot {
    /// The longest command line of a kernel in bytes: what x86 kernels read.
    pub const MAX_COMMAND_LINE: usize = 2048;

    /// Boots what the root volume's boot loader entries name.
    pub fn root_volume() -> Self {
        BootSource::RootVolume.into()
    }

    /// Boots `kernel`, which the image carries beside the root volume.
    pub fn direct(kernel: Digest, initrd: Option<Digest>, command_line: impl Into<String>) -> Self {
        BootSource::Direct { kernel, initrd, command_line: command_line.into() }.into()
    }

    /// The same, through the firmware `mode`.
    #[must_use]
    pub fn mode(mut self, mode: BootMode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// The same for a machine with a Trusted Platform Module.
    #[must_use]
    pub fn tpm(mut self, tpm: TpmSupport) -> Self {
        self.tpm = Some(tpm);
        self
    }

    /// The same with a kernel from elsewhere.
    #[must_use]
    pub fn with_source(mut self, source: BootSource) -> Self {
        self.source = source;
        self
    }

    /// Where the kernel comes from.
    pub fn source(&self) -> &BootSource {
        &self.source
    }

    /// The firmware that the image wants, or `None` if it asks for none.
    pub fn boot_mode(&self) -> Option<BootMode> {
        self.mode
    }

    /// The Trusted Platform Module that the image is made for, if it is for one.
    pub fn tpm_support(&self) -> Option<TpmSupport> {
        self.tpm
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.tpm.is_some() && self.mode != Some(BootMode::Uefi) {
            let message = "an image with support for a TPM has the boot mode uefi, and says so";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, message));
        }
        let BootSource::Direct { command_line, .. } = &self.source else { return Ok(()) };
        if let Some(mode) = self.mode {
            let message =
                format!("a kernel that is loaded directly passes no firmware, so not {mode} either");
            return Err(Error::new(ErrorKind::InvalidParameterCombination, message));
        }
        if command_line.len() > Self::MAX_COMMAND_LINE {
            let (len, max) = (command_line.len(), Self::MAX_COMMAND_LINE);
            return Err(invalid_value(format!(
                "the kernel command line has {len} bytes, at most {max} can be"
            )));
        }
        if command_line.contains(['\0', '\n', '\r']) {
            return Err(invalid_value("the kernel command line has a NUL or a line break in it"));
        }
        Ok(())
    }
}

impl From<BootSource> for Boot {
    fn from(source: BootSource) -> Self {
        Self { source, mode: None, tpm: None }
    }
}

impl Default for Boot {
    fn default() -> Self {
        Self::root_volume()
    }
}

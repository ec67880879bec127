//! What can go wrong in a region, under EC2's codes.

use std::error::Error as StdError;
use std::fmt;

use crate::machine::MachineError;

/// What an error says, with all that caused it: for where only a text can be kept.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// A result of this crate.
///
/// ```
/// use instance_core::{InstanceType, Result};
///
/// fn cheapest() -> Result<InstanceType> {
///     "t2.nano".parse()
/// }
/// assert_eq!(cheapest()?.vcpus().get(), 1);
/// # Ok::<(), instance_core::Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
///
/// ```
/// use instance_core::testing::FakeHypervisor;
/// use instance_core::{ErrorKind, Region};
///
/// let dir = tempfile::tempdir()?;
/// let _owner = Region::open(dir.path(), FakeHypervisor::new())?;
/// match Region::open(dir.path(), FakeHypervisor::new()) {
///     Err(e) if e.kind() == ErrorKind::RegionInUse => println!("{e}"), // says which directory
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The region has no such image.
    ImageNotFound,
    /// The image is there but not `available`, or not for this account.
    ImageUnavailable,
    /// The account has an image of that name already.
    ImageNameDuplicate,
    /// An image description breaks a rule.
    InvalidImage,
    /// The disk holds nothing that this library can boot.
    NotBootable,
    /// Image, instance type and hypervisor are not of one architecture.
    ArchitectureMismatch,
    /// The region has no such instance.
    InstanceNotFound,
    /// The instance's state does not allow it.
    IncorrectInstanceState,
    /// No instance type of that name.
    InvalidInstanceType,
    /// A parameter that no call can take.
    InvalidParameter,
    /// This library, or this hypervisor, cannot do that.
    Unsupported,
    /// The host cannot hold it: no disk space.
    InsufficientCapacity,
    /// Another process, or another handle of this one, has the region open.
    RegionInUse,
    /// Bytes in the region directory are not what they should be.
    Corrupt,
    /// The hypervisor failed.
    Hypervisor,
    /// Anything else that the host did.
    Internal,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use instance_core::{ErrorKind, InstanceType};
///
/// let err = "t9.vast".parse::<InstanceType>().unwrap_err();
/// assert_eq!(err.kind(), ErrorKind::InvalidInstanceType);
/// assert_eq!(err.code(), "InvalidParameterValue");
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    code: Option<&'static str>,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, code: None, context: context.into(), source: None }
    }

    /// The same under a code that says more than its kind.
    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(crate) fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// EC2's code for it (API reference, "Error codes"); where EC2 has none, `InternalError`.
    pub fn code(&self) -> &'static str {
        if let Some(code) = self.code {
            return code;
        }
        match self.kind {
            ErrorKind::ImageNotFound => "InvalidAMIID.NotFound",
            ErrorKind::ImageUnavailable => "InvalidAMIID.Unavailable",
            ErrorKind::ImageNameDuplicate => "InvalidAMIName.Duplicate",
            ErrorKind::InvalidImage | ErrorKind::InvalidParameter => "InvalidParameterValue",
            ErrorKind::InvalidInstanceType | ErrorKind::ArchitectureMismatch => "InvalidParameterValue",
            ErrorKind::NotBootable => "ImportFailed.UnsupportedDisk",
            ErrorKind::InstanceNotFound => "InvalidInstanceID.NotFound",
            ErrorKind::IncorrectInstanceState => "IncorrectInstanceState",
            ErrorKind::Unsupported => "UnsupportedOperation",
            ErrorKind::InsufficientCapacity => "InsufficientInstanceCapacity",
            ErrorKind::RegionInUse => "ResourceInUse",
            ErrorKind::Corrupt | ErrorKind::Hypervisor | ErrorKind::Internal => "InternalError",
        }
    }

    pub(crate) fn io(source: std::io::Error, context: impl Into<String>) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::InsufficientCapacity
            }
            _ => ErrorKind::Internal,
        };
        Self::of_host(kind, context).caused_by(source)
    }

    /// Where the disk is full, what to do is the same whatever was being done.
    fn of_host(kind: ErrorKind, context: impl Into<String>) -> Self {
        let mut context = context.into();
        if kind == ErrorKind::InsufficientCapacity {
            context.push_str("; free space on the file system of the region and try again");
        }
        Self::new(kind, context)
    }

    pub(crate) fn storage(source: storage_block::Error, context: impl Into<String>) -> Self {
        use storage_block::ErrorKind as Storage;
        let kind = match source.kind() {
            Storage::NoSpace => ErrorKind::InsufficientCapacity,
            Storage::Corrupt => ErrorKind::Corrupt,
            Storage::InUse => ErrorKind::RegionInUse,
            Storage::InvalidSize => ErrorKind::InvalidParameter,
            _ => ErrorKind::Internal,
        };
        Self::of_host(kind, context).caused_by(source)
    }

    pub(crate) fn machine(source: MachineError, context: impl Into<String>) -> Self {
        use crate::machine::MachineErrorKind as Machine;
        let kind = match source.kind() {
            Machine::Unsupported => ErrorKind::Unsupported,
            Machine::Boot => ErrorKind::NotBootable,
            _ => ErrorKind::Hypervisor,
        };
        Self::new(kind, context).caused_by(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

//! What can go wrong in a region, under EC2's codes.

mod convert;

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
    /// A text is no id of its kind, which is none of those that follow.
    MalformedId,
    /// A text is no id of an image.
    MalformedImageId,
    /// A text is no id of an instance.
    MalformedInstanceId,
    /// A text is no id of a reservation.
    MalformedReservationId,
    /// A text is no id of a volume.
    MalformedVolumeId,
    /// A text is no id of a snapshot.
    MalformedSnapshotId,
    /// A text is no id of a subnet.
    MalformedSubnetId,
    /// A text is no id of a launch template.
    MalformedLaunchTemplateId,
    /// A text is no id of a task that makes an image: by import, by a copy, or of an instance.
    MalformedConversionTaskId,
    /// A text is no id of a task that exports an image.
    MalformedExportTaskId,
    /// A text is no id of an account.
    MalformedAccountId,
    /// There is no such image, or none that the account sees.
    ImageNotFound,
    /// The image is there but not `available`.
    ImageUnavailable,
    /// The account has an image of that name already.
    ImageNameDuplicate,
    /// A text is no name of an image.
    MalformedImageName,
    /// What is written of an image is none, or not what its digest says.
    InvalidManifest,
    /// The disk holds nothing that this library can boot.
    NotBootable,
    /// Image, instance type and hypervisor are not of one architecture.
    ArchitectureMismatch,
    /// The account has no such instance.
    InstanceNotFound,
    /// The instance's state does not allow it.
    IncorrectInstanceState,
    /// No instance type of that name.
    InvalidInstanceType,
    /// The instance has not shown the keys of its SSH server.
    HostKeysUnknown,
    /// The account has no such volume.
    VolumeNotFound,
    /// The volume is attached to an instance.
    VolumeInUse,
    /// The volume has not been modified.
    VolumeModificationNotFound,
    /// The account has no such snapshot.
    SnapshotNotFound,
    /// The account has no such launch template.
    LaunchTemplateNotFound,
    /// The launch template has no such version.
    LaunchTemplateVersionNotFound,
    /// The account has a launch template of that name already.
    LaunchTemplateNameDuplicate,
    /// What is no name of a launch template.
    MalformedLaunchTemplateName,
    /// The account has no such task that makes an image.
    TaskNotFound,
    /// The account has no such task that exports an image.
    ExportTaskNotFound,
    /// The account has as many of these as it can have.
    ResourceLimitExceeded,
    /// The account has as many pending snapshots as it can have.
    PendingSnapshotLimitExceeded,
    /// The account has as many launch templates as it can have.
    MaxTemplateLimitExceeded,
    /// The launch template has as many versions as it can have.
    MaxTemplateVersionLimitExceeded,
    /// These are more instances than a launch makes.
    ResourceCountExceeded,
    /// There is no such key for encryption, or nobody who has any.
    KeyUnavailable,
    /// There is no such key pair.
    KeyPairNotFound,
    /// There is no default VPC to be launched into, and no subnet was named.
    VpcNotSpecified,
    /// The default VPC has no default subnet to be launched into, and no other was named.
    SubnetNotSpecified,
    /// There is no such subnet.
    SubnetNotFound,
    /// A subnet has no address left.
    SubnetFull,
    /// There is no such security group.
    SecurityGroupNotFound,
    /// There is no such network interface.
    NetworkInterfaceNotFound,
    /// Another instance has the network interface.
    NetworkInterfaceInUse,
    /// Another interface has the address.
    AddressInUse,
    /// The instance has as many volumes or network interfaces as it can have.
    AttachmentLimitExceeded,
    /// No instance boots from a volume of this type.
    BootForVolumeTypeUnsupported,
    /// The account has as many Elastic IP addresses as it can have.
    AddressLimitExceeded,
    /// No public address is left for an instance to have while it runs.
    InsufficientAddressCapacity,
    /// An image needs the snapshot.
    SnapshotInUse,
    /// The state of an image, a volume or a snapshot does not allow it.
    IncorrectState,
    /// A text is no id of anything that can have tags.
    InvalidResourceId,
    /// A tag's key breaks the rule for keys.
    MalformedTagKey,
    /// There are more tags than a resource can have.
    TagLimitExceeded,
    /// A block device mapping cannot be.
    InvalidBlockDeviceMapping,
    /// A parameter that no call can take.
    InvalidParameter,
    /// What is added to an attribute of an image, or removed from one, is no item of it.
    InvalidAttributeItemValue,
    /// A filter has more values than one may have.
    FilterLimitExceeded,
    /// Parameters that exclude each other.
    InvalidParameterCombination,
    /// The instance was not launched so that it can hibernate, or cannot be.
    UnsupportedHibernation,
    /// A parameter without a default was not given.
    MissingParameter,
    /// A token is not that of an earlier page.
    InvalidNextToken,
    /// The client token is that of a launch with other parameters.
    IdempotentParameterMismatch,
    /// The client token is that of a launch whose instances are all terminated.
    IdempotentInstanceTerminated,
    /// The instance is protected against it.
    OperationNotPermitted,
    /// The account may not do this.
    AuthFailure,
    /// The account has not accepted the terms of a product.
    OptInRequired,
    /// Only asked whether it would be done: it would.
    DryRunOperation,
    /// Only asked whether it would be done: the account may not do this.
    UnauthorizedOperation,
    /// This library, or this hypervisor, cannot do that.
    Unsupported,
    /// The host cannot hold an instance: no memory, no vCPUs or no disk space.
    InsufficientCapacity,
    /// The disk has no space for anything else: a volume, a snapshot, an image or what is written down of them.
    InsufficientVolumeCapacity,
    /// Whoever watched its progress ended it.
    Cancelled,
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
    /// An error of `kind` about what `context` says. A [`StateStore`](crate::state_store::StateStore) makes
    /// its errors so.
    ///
    /// ```
    /// use std::error::Error as _;
    /// use instance_core::{Error, ErrorKind};
    ///
    /// let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    /// let err = Error::new(ErrorKind::Internal, "cannot write the table").with_source(full);
    /// assert!(err.code() == "InternalError" && err.source().is_some());
    /// ```
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, code: None, context: context.into(), source: None }
    }

    /// The same under a code that says more than its kind.
    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The same with its cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
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
            ErrorKind::MalformedId => "InvalidParameterValue",
            ErrorKind::MalformedImageId => "InvalidAMIID.Malformed",
            ErrorKind::MalformedInstanceId => "InvalidInstanceID.Malformed",
            ErrorKind::MalformedReservationId => "InvalidReservationID.Malformed",
            ErrorKind::MalformedVolumeId => "InvalidVolumeID.Malformed",
            ErrorKind::MalformedSnapshotId => "InvalidSnapshotID.Malformed",
            ErrorKind::MalformedSubnetId => "InvalidSubnetID.Malformed",
            ErrorKind::MalformedLaunchTemplateId => "InvalidLaunchTemplateId.Malformed",
            ErrorKind::MalformedConversionTaskId => "InvalidConversionTaskId.Malformed",
            ErrorKind::MalformedExportTaskId => "InvalidExportTaskID.Malformed",
            ErrorKind::MalformedAccountId => "InvalidUserID.Malformed",
            ErrorKind::ImageNotFound => "InvalidAMIID.NotFound",
            ErrorKind::ImageUnavailable => "InvalidAMIID.Unavailable",
            ErrorKind::ImageNameDuplicate => "InvalidAMIName.Duplicate",
            ErrorKind::MalformedImageName => "InvalidAMIName.Malformed",
            ErrorKind::InvalidManifest => "InvalidManifest",
            ErrorKind::InvalidParameter => "InvalidParameterValue",
            ErrorKind::InvalidInstanceType | ErrorKind::ArchitectureMismatch => "InvalidParameterValue",
            ErrorKind::NotBootable => "ImportFailed.UnsupportedDisk",
            ErrorKind::InstanceNotFound => "InvalidInstanceID.NotFound",
            ErrorKind::IncorrectInstanceState | ErrorKind::HostKeysUnknown => "IncorrectInstanceState",
            ErrorKind::VolumeNotFound => "InvalidVolume.NotFound",
            ErrorKind::VolumeInUse => "VolumeInUse",
            ErrorKind::SnapshotNotFound => "InvalidSnapshot.NotFound",
            ErrorKind::LaunchTemplateNotFound => "InvalidLaunchTemplateId.NotFound",
            ErrorKind::LaunchTemplateVersionNotFound => "InvalidLaunchTemplateId.VersionNotFound",
            ErrorKind::MalformedLaunchTemplateName => "InvalidLaunchTemplateName.MalformedException",
            ErrorKind::LaunchTemplateNameDuplicate => "InvalidLaunchTemplateName.AlreadyExistsException",
            ErrorKind::TaskNotFound => "InvalidConversionTaskId",
            ErrorKind::ExportTaskNotFound => "InvalidExportTaskID.NotFound",
            ErrorKind::PendingSnapshotLimitExceeded => "PendingSnapshotLimitExceeded",
            ErrorKind::MaxTemplateLimitExceeded => "MaxTemplateLimitExceeded",
            ErrorKind::MaxTemplateVersionLimitExceeded => "MaxTemplateVersionLimitExceeded",
            ErrorKind::ResourceLimitExceeded => "ResourceLimitExceeded",
            ErrorKind::ResourceCountExceeded => "ResourceCountExceeded",
            ErrorKind::KeyUnavailable => "InvalidKMSKey.InvalidState",
            ErrorKind::VolumeModificationNotFound => "InvalidVolumeModification.NotFound",
            ErrorKind::KeyPairNotFound => "InvalidKeyPair.NotFound",
            ErrorKind::VpcNotSpecified => "VPCIdNotSpecified",
            ErrorKind::SubnetNotSpecified => "MissingInput",
            ErrorKind::SubnetNotFound => "InvalidSubnetID.NotFound",
            ErrorKind::SubnetFull => "InsufficientFreeAddressesInSubnet",
            ErrorKind::SecurityGroupNotFound => "InvalidGroup.NotFound",
            ErrorKind::NetworkInterfaceNotFound => "InvalidNetworkInterfaceID.NotFound",
            ErrorKind::NetworkInterfaceInUse => "InvalidNetworkInterface.InUse",
            ErrorKind::AddressInUse => "InvalidIPAddress.InUse",
            ErrorKind::AttachmentLimitExceeded => "AttachmentLimitExceeded",
            ErrorKind::BootForVolumeTypeUnsupported => "BootForVolumeTypeUnsupported",
            ErrorKind::AddressLimitExceeded => "AddressLimitExceeded",
            ErrorKind::InsufficientAddressCapacity => "InsufficientAddressCapacity",
            ErrorKind::SnapshotInUse => "InvalidSnapshot.InUse",
            ErrorKind::IncorrectState => "IncorrectState",
            ErrorKind::InvalidResourceId => "InvalidID",
            ErrorKind::MalformedTagKey => "InvalidTagKey.Malformed",
            ErrorKind::TagLimitExceeded => "TagLimitExceeded",
            ErrorKind::InvalidBlockDeviceMapping => "InvalidBlockDeviceMapping",
            ErrorKind::InvalidAttributeItemValue => "InvalidAMIAttributeItemValue",
            ErrorKind::FilterLimitExceeded => "FilterLimitExceeded",
            ErrorKind::InvalidParameterCombination => "InvalidParameterCombination",
            ErrorKind::UnsupportedHibernation => "UnsupportedHibernationConfiguration",
            ErrorKind::MissingParameter => "MissingParameter",
            ErrorKind::InvalidNextToken => "InvalidNextToken",
            ErrorKind::IdempotentParameterMismatch => "IdempotentParameterMismatch",
            ErrorKind::IdempotentInstanceTerminated => "IdempotentInstanceTerminated",
            ErrorKind::OperationNotPermitted => "OperationNotPermitted",
            ErrorKind::AuthFailure => "AuthFailure",
            ErrorKind::OptInRequired => "OptInRequired",
            ErrorKind::DryRunOperation => "DryRunOperation",
            ErrorKind::UnauthorizedOperation => "UnauthorizedOperation",
            ErrorKind::Unsupported => "UnsupportedOperation",
            ErrorKind::InsufficientCapacity => "InsufficientInstanceCapacity",
            ErrorKind::InsufficientVolumeCapacity => "InsufficientVolumeCapacity",
            ErrorKind::RegionInUse => "ResourceInUse",
            ErrorKind::Corrupt | ErrorKind::Hypervisor | ErrorKind::Cancelled | ErrorKind::Internal => {
                "InternalError"
            }
        }
    }

    pub(crate) fn io(source: std::io::Error, context: impl Into<String>) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::InsufficientVolumeCapacity
            }
            _ => ErrorKind::Internal,
        };
        Self::of_host(kind, context).with_source(source)
    }

    /// Where the disk is full, what to do is the same whatever was being done.
    fn of_host(kind: ErrorKind, context: impl Into<String>) -> Self {
        let mut context = context.into();
        if kind == ErrorKind::InsufficientVolumeCapacity {
            context.push_str("; free space on the file system of the region and try again");
        }
        Self::new(kind, context)
    }

    pub(crate) fn storage(source: storage_block::Error, context: impl Into<String>) -> Self {
        use storage_block::ErrorKind as Storage;
        let kind = match source.kind() {
            Storage::NoSpace => ErrorKind::InsufficientVolumeCapacity,
            Storage::KeyUnavailable => ErrorKind::KeyUnavailable,
            Storage::Corrupt => ErrorKind::Corrupt,
            Storage::Cancelled => ErrorKind::Cancelled,
            Storage::InUse => ErrorKind::RegionInUse,
            Storage::InvalidSize => ErrorKind::InvalidParameter,
            _ => ErrorKind::Internal,
        };
        Self::of_host(kind, context).with_source(source)
    }

    /// The same of an instance that was to run, which whatever is full has no room for.
    pub(crate) fn of_instance(self) -> Self {
        match self.kind {
            ErrorKind::InsufficientVolumeCapacity => Self { kind: ErrorKind::InsufficientCapacity, ..self },
            _ => self,
        }
    }

    pub(crate) fn machine(source: MachineError, context: impl Into<String>) -> Self {
        use crate::machine::MachineErrorKind as Machine;
        let kind = match source.kind() {
            Machine::Unsupported => ErrorKind::Unsupported,
            Machine::Boot => ErrorKind::NotBootable,
            _ => ErrorKind::Hypervisor,
        };
        Self::new(kind, context).with_source(source)
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

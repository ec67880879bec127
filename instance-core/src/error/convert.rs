//! What `ami-core` says, under this crate's kinds.

use super::{Error, ErrorKind};

/// The kind of what is no id, by EC2's code for it.
fn malformed_id(code: &str) -> ErrorKind {
    use ErrorKind::{
        MalformedConversionTaskId, MalformedExportTaskId, MalformedImageId, MalformedInstanceId,
        MalformedLaunchTemplateId, MalformedReservationId, MalformedSnapshotId, MalformedSubnetId,
        MalformedVolumeId,
    };
    let kinds = [
        MalformedImageId,
        MalformedInstanceId,
        MalformedReservationId,
        MalformedVolumeId,
        MalformedSnapshotId,
        MalformedSubnetId,
        MalformedLaunchTemplateId,
        MalformedConversionTaskId,
        MalformedExportTaskId,
    ];
    let same = |kind: &ErrorKind| Error::new(*kind, "").code() == code;
    kinds.into_iter().find(same).unwrap_or(ErrorKind::MalformedId)
}

impl ErrorKind {
    /// The kind of what a task has failed with, by EC2's code for it.
    pub(crate) fn of_task(code: &str) -> Self {
        let kinds = [
            Self::NotBootable,
            Self::ImageNameDuplicate,
            Self::MalformedImageName,
            Self::ImageNotFound,
            Self::ImageUnavailable,
            Self::InvalidManifest,
            Self::InvalidBlockDeviceMapping,
            Self::InvalidParameter,
            Self::InvalidParameterCombination,
            Self::MissingParameter,
            Self::InstanceNotFound,
            Self::IncorrectInstanceState,
            Self::IncorrectState,
            Self::VolumeNotFound,
            Self::SnapshotNotFound,
            Self::KeyUnavailable,
            Self::AuthFailure,
            Self::OptInRequired,
            Self::OperationNotPermitted,
            Self::MalformedTagKey,
            Self::TagLimitExceeded,
            Self::ResourceLimitExceeded,
            Self::Unsupported,
            Self::InsufficientCapacity,
            Self::InsufficientVolumeCapacity,
            Self::RegionInUse,
        ];
        let same = |kind: &Self| Error::new(*kind, "").code() == code;
        kinds.into_iter().find(same).unwrap_or(Self::Internal)
    }
}

/// What `ami-core` says of an image, a tag, a filter or a page, under this crate's kinds.
impl From<ami_core::Error> for Error {
    fn from(e: ami_core::Error) -> Self {
        use ami_core::ErrorKind as Ami;
        let kind = match e.kind() {
            Ami::MalformedId => malformed_id(e.code()),
            Ami::MalformedAccount => ErrorKind::MalformedAccountId,
            Ami::NotFound => ErrorKind::ImageNotFound,
            Ami::Unavailable => ErrorKind::ImageUnavailable,
            Ami::DuplicateName => ErrorKind::ImageNameDuplicate,
            Ami::AuthFailure => ErrorKind::AuthFailure,
            Ami::OptInRequired => ErrorKind::OptInRequired,
            Ami::InvalidBlockDeviceMapping => ErrorKind::InvalidBlockDeviceMapping,
            Ami::InvalidAttributeItemValue => ErrorKind::InvalidAttributeItemValue,
            Ami::FilterLimitExceeded => ErrorKind::FilterLimitExceeded,
            Ami::InvalidParameterCombination => ErrorKind::InvalidParameterCombination,
            Ami::MissingParameter => ErrorKind::MissingParameter,
            Ami::ArchitectureMismatch => ErrorKind::ArchitectureMismatch,
            Ami::MalformedTagKey => ErrorKind::MalformedTagKey,
            Ami::TagLimitExceeded => ErrorKind::TagLimitExceeded,
            Ami::IncorrectState | Ami::Conflict => ErrorKind::IncorrectState,
            Ami::InvalidNextToken => ErrorKind::InvalidNextToken,
            Ami::InvalidResourceId => ErrorKind::InvalidResourceId,
            Ami::MalformedName => ErrorKind::MalformedImageName,
            Ami::InvalidManifest | Ami::DigestMismatch => ErrorKind::InvalidManifest,
            Ami::Internal => ErrorKind::Internal,
            _ => ErrorKind::InvalidParameter,
        };
        let same = Self::new(kind, e.to_string()).with_code(e.code());
        match e.into_source().map(|source| source.downcast::<Self>()) {
            // An error of this crate's that went through a catalogue of `ami-core`.
            Some(Ok(ours)) => *ours,
            Some(Err(source)) => same.with_source(source),
            None => same,
        }
    }
}

impl From<ami_core::MalformedId> for Error {
    fn from(e: ami_core::MalformedId) -> Self {
        ami_core::Error::from(e).into()
    }
}

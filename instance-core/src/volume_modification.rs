//! Changing size and type of volumes, and what was last changed (`ModifyVolume`, `DescribeVolumesModifications`).

use ami_core::{Page, Timestamp, VolumeId, VolumeType};

use crate::describe::{DescribeVolumes, Filterable};
use crate::record::VolumeRecord;
use crate::region::Region;
use crate::volumes::{GIB, volume_not_found};
use crate::{Error, ErrorKind, Result};

/// What is to be changed of a volume; [`VolumeModification`] shows it in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct ModifyVolume {
    pub(crate) size_gib: Option<u32>,
    pub(crate) volume_type: Option<VolumeType>,
}

impl ModifyVolume {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The size in GiB, no less than it has.
    pub fn size_gib(mut self, size_gib: u32) -> Self {
        self.size_gib = Some(size_gib);
        self
    }

    /// The type.
    pub fn volume_type(mut self, volume_type: VolumeType) -> Self {
        self.volume_type = Some(volume_type);
        self
    }
}

/// How far a modification is. It is done when its call returns, so that there is one state to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VolumeModificationState {
    /// The volume is as it was asked for.
    Completed,
}

impl VolumeModificationState {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
        }
    }
}

/// What was last changed of a volume (`DescribeVolumesModifications`).
///
/// ```
/// # use instance_core::{Region, testing::FakeHypervisor};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use ami_core::VolumeType;
/// use instance_core::{DescribeVolumes, ModifyVolume, VolumeModificationState, VolumeSpec};
///
/// let volume = region.create_volume(VolumeSpec::new(1))?.id;
/// let change = ModifyVolume::new().size_gib(2).volume_type(VolumeType::Gp2);
/// let done = region.modify_volume(volume, change)?;
/// assert_eq!((done.state, done.original_size_gib, done.target_size_gib), (VolumeModificationState::Completed, 1, 2));
/// let all = region.describe_volumes_modifications(&DescribeVolumes::new().filter("target-size", ["2"]))?;
/// assert_eq!(all.items, [done]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeModification {
    /// The volume.
    pub volume_id: VolumeId,
    /// How far it is.
    pub state: VolumeModificationState,
    /// How far it is in percent.
    pub progress: u8,
    /// The size before.
    pub original_size_gib: u64,
    /// The size that was asked for.
    pub target_size_gib: u64,
    /// The type before.
    pub original_type: VolumeType,
    /// The type that was asked for.
    pub target_type: VolumeType,
    /// When it was begun.
    pub start_time: Timestamp,
    /// When it was done.
    pub end_time: Timestamp,
}

impl VolumeModification {
    fn of(record: &VolumeRecord) -> Option<Self> {
        let made = record.modification.as_ref()?;
        Some(Self {
            volume_id: record.id,
            state: VolumeModificationState::Completed,
            progress: 100,
            original_size_gib: made.original_size.div_ceil(GIB),
            target_size_gib: made.target_size.div_ceil(GIB),
            original_type: made.original_type,
            target_type: made.target_type,
            start_time: made.started,
            end_time: made.ended,
        })
    }
}

impl<H> Region<H> {
    /// Changes size and type of a volume, also while an instance that runs has it, whose guest is told of its size
    /// (`ModifyVolume`). What it holds stays as it is; to make use of the room is the guest's.
    ///
    /// # Errors
    ///
    /// [`MissingParameter`](ErrorKind::MissingParameter) if nothing is to be changed,
    /// [`BootForVolumeTypeUnsupported`](ErrorKind::BootForVolumeTypeUnsupported) for a root volume and a type that nothing boots
    /// from, and otherwise as [`grow_volume`](Self::grow_volume).
    pub fn modify_volume(&self, volume: VolumeId, change: ModifyVolume) -> Result<VolumeModification> {
        if change == ModifyVolume::new() {
            let what = "neither a size nor a type of the volume is given";
            return Err(Error::new(ErrorKind::MissingParameter, what));
        }
        let record = self.inner.modify_volume(*self.account(), volume, change)?;
        VolumeModification::of(&record).ok_or_else(|| not_modified(volume))
    }

    /// What was last changed of those of the account's volumes that were changed and that the request asks for
    /// (`DescribeVolumesModifications`).
    ///
    /// Filters: `modification-state`, `original-size`, `original-volume-type`, `start-time`, `target-size`,
    /// `target-volume-type`, `volume-id`.
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound) and
    /// [`VolumeModificationNotFound`](ErrorKind::VolumeModificationNotFound) for a volume that is named,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_volumes_modifications(
        &self,
        request: &DescribeVolumes,
    ) -> Result<Page<VolumeModification>> {
        request.check::<VolumeModification>()?;
        let mut records = self.inner.store.all::<VolumeRecord>()?;
        records.retain(|record| record.owner == *self.account());
        let unmodified = |record: &&VolumeRecord| record.modification.is_none();
        if let Some(record) = records.iter().filter(|r| request.ids.contains(&r.id)).find(unmodified) {
            return Err(not_modified(record.id));
        }
        request.answer(
            records,
            |record| record.id,
            |record| VolumeModification::of(&record),
            volume_not_found,
        )
    }
}

fn not_modified(id: VolumeId) -> Error {
    Error::new(ErrorKind::VolumeModificationNotFound, format!("the volume {id} has not been modified"))
}

impl Filterable for VolumeModification {
    const WHAT: &'static str = "modifications of volumes";
    const NAMES: &'static [&'static str] = &[
        "modification-state",
        "original-size",
        "original-volume-type",
        "start-time",
        "target-size",
        "target-volume-type",
        "volume-id",
    ];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "modification-state" => vec![self.state.as_str().to_owned()],
            "original-size" => vec![self.original_size_gib.to_string()],
            "original-volume-type" => vec![self.original_type.to_string()],
            "start-time" => vec![self.start_time.to_string()],
            "target-size" => vec![self.target_size_gib.to_string()],
            "target-volume-type" => vec![self.target_type.to_string()],
            "volume-id" => vec![self.volume_id.to_string()],
            _ => Vec::new(),
        }
    }
}

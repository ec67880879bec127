//! The instant of which snapshots are: of one volume, or of several that an instance has.

use std::sync::PoisonError;

use ami_core::{AccountId, InstanceId, Tags, VolumeId};

use super::unfinished::UnfinishedSnapshotRecord;
use crate::record::VolumeRecord;
use crate::region::Inner;
use crate::storing::Instant;
use crate::{Error, ErrorKind, InstanceState, Result};

/// Snapshots of the volumes of an instance, all of one instant (`CreateSnapshots`).
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// use instance_core::{BlockDeviceMappingRequest, CreateSnapshots, SnapshotState};
///
/// let of_one_gib = |device| BlockDeviceMappingRequest::new(device).size_gib(1);
/// let [data, log] = ["/dev/sdf", "/dev/sdg"].map(of_one_gib);
/// let spec = LaunchSpec::new("t2.nano".parse()?).block_device(data).block_device(log);
/// let database = region.launch(&ami, spec)?;
/// let both = CreateSnapshots::new(database.id()).exclude_boot_volume(true).tag("kind", "backup");
/// let made = region.create_snapshots(&both)?;
/// let volumes: Vec<_> = database.describe().attachments[1..].iter().map(|a| a.volume_id).collect();
/// assert_eq!(made.iter().map(|snapshot| snapshot.volume_id).collect::<Vec<_>>(), volumes);
/// assert!(made.iter().all(|snapshot| snapshot.state == SnapshotState::Completed));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a request does nothing by itself"]
pub struct CreateSnapshots {
    pub(super) instance: InstanceId,
    pub(super) exclude_boot_volume: bool,
    pub(super) exclude_data_volumes: Vec<VolumeId>,
    pub(super) description: String,
    pub(super) tags: Vec<(String, String)>,
    pub(super) copy_tags: bool,
}

impl CreateSnapshots {
    /// Of all volumes of an instance.
    pub fn new(instance: InstanceId) -> Self {
        let (exclude_data_volumes, description, tags) = Default::default();
        Self {
            instance,
            exclude_boot_volume: false,
            exclude_data_volumes,
            description,
            tags,
            copy_tags: false,
        }
    }

    /// Whether the root volume is left out.
    pub fn exclude_boot_volume(mut self, exclude: bool) -> Self {
        self.exclude_boot_volume = exclude;
        self
    }

    /// Leaves out a volume that is not the root volume.
    pub fn exclude_data_volume(mut self, volume: VolumeId) -> Self {
        self.exclude_data_volumes.push(volume);
        self
    }

    /// A description of at most 255 characters, which each of them has.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// A tag, which each of them has.
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.push((key.into(), value.into()));
        self
    }

    /// Whether each has the tags of its volume, too.
    pub fn copy_tags_from_volumes(mut self, copy: bool) -> Self {
        self.copy_tags = copy;
        self
    }
}

/// What snapshots are made of.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    Volume { id: VolumeId, description: String },
    Instance(CreateSnapshots),
}

impl Wanted {
    fn description(&self) -> &str {
        match self {
            Self::Volume { description, .. } => description,
            Self::Instance(request) => &request.description,
        }
    }

    /// Refuses what cannot be, before anything is done.
    pub(super) fn check(&self) -> Result<()> {
        if self.description().chars().count() > 255 {
            let what = "the description of a snapshot has at most 255 characters";
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        match self {
            Self::Volume { .. } => Ok(()),
            Self::Instance(request) => request.tags_of(Tags::new()).map(drop),
        }
    }

    /// A snapshot of one of the volumes, which is not there yet.
    fn unfinished(&self, volume: VolumeRecord) -> Result<UnfinishedSnapshotRecord> {
        let tags = match self {
            Self::Volume { .. } => Tags::new(),
            Self::Instance(request) => {
                let theirs = if request.copy_tags { volume.tags.clone() } else { Tags::new() };
                request.tags_of(theirs)?
            }
        };
        UnfinishedSnapshotRecord::of(volume, self.description(), tags)
    }
}

impl CreateSnapshots {
    /// The tags of a snapshot, beside these.
    fn tags_of(&self, mut tags: Tags) -> Result<Tags> {
        for (key, value) in &self.tags {
            tags.insert(key.clone(), value.clone())?;
        }
        Ok(tags)
    }
}

impl Inner {
    /// What is wanted as it is now, and what is known of the snapshots of it. Nothing is held while they are stored.
    pub(super) fn take_wanted(
        &self,
        owner: AccountId,
        wanted: &Wanted,
    ) -> Result<(Vec<UnfinishedSnapshotRecord>, Instant<'_>)> {
        let (volumes, instant) = match wanted {
            Wanted::Volume { id, .. } => {
                self.take_volume(owner, *id).map(|(volume, instant)| (vec![volume], instant))?
            }
            Wanted::Instance(request) => self.take_volumes(owner, request)?,
        };
        let snapshots = volumes.into_iter().map(|volume| wanted.unfinished(volume));
        Ok((snapshots.collect::<Result<_>>()?, instant))
    }

    /// A volume as it is now, wherever it is.
    fn take_volume(&self, owner: AccountId, id: VolumeId) -> Result<(VolumeRecord, Instant<'_>)> {
        loop {
            self.volume(owner, id)?;
            let holder = self.directory.attached(id);
            if let Some(holder) = holder {
                let cell = self.cell(owner, holder.id)?;
                let mut live = self.hold_to_freeze(&cell);
                let attachments = &live.record.description.attachments;
                let open = attachments.iter().zip(&live.volumes).find(|(a, _)| a.volume_id == id);
                if let Some((_, open)) = open {
                    return Ok((self.volume(owner, id)?, self.freeze(vec![(id, open.clone())])));
                }
                if attachments.iter().any(|a| a.volume_id == id) {
                    let volume = self.volume(owner, id)?;
                    self.settle_volumes(&mut live)?;
                    return Ok((volume, self.freeze(vec![(id, self.open_volume(id)?)])));
                }
            }
            // Attaching and deleting wait.
            let resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
            let volume = self.volume(owner, id)?;
            // It may have been attached or detached since it was looked for.
            if self.directory.attached(id).is_some() {
                continue;
            }
            if self.storing.open(id).is_none() {
                return Ok((volume, self.freeze(vec![(id, self.open_volume(id)?)])));
            }
            drop(resources);
            self.storing.wait(id);
        }
    }

    /// The volumes of an instance as they are at one instant.
    fn take_volumes(
        &self,
        owner: AccountId,
        request: &CreateSnapshots,
    ) -> Result<(Vec<VolumeRecord>, Instant<'_>)> {
        let cell = self.cell(owner, request.instance)?;
        let mut live = self.hold_to_freeze(&cell);
        let description = live.record.description.clone();
        let (id, state) = (cell.id, description.state);
        if !matches!(state, InstanceState::Running | InstanceState::Stopping | InstanceState::Stopped) {
            let what = format!("{id} is {state}, in which no snapshots can be made of its volumes");
            return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
        }
        let is_root = |device: &str| description.is_root_device(device);
        for excluded in &request.exclude_data_volumes {
            let is_data = |a: &crate::Attachment| a.volume_id == *excluded && !is_root(&a.device_name);
            if !description.attachments.iter().any(is_data) {
                let what = format!("{excluded} is no data volume of {id}");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
        }
        let wanted = |device: &str, volume: &VolumeId| {
            !(request.exclude_boot_volume && is_root(device) || request.exclude_data_volumes.contains(volume))
        };
        let ids: Vec<VolumeId> = (description.attachments.iter())
            .filter(|a| wanted(&a.device_name, &a.volume_id))
            .map(|a| a.volume_id)
            .collect();
        if ids.is_empty() {
            let what = format!("no volume of {id} is left to make a snapshot of");
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        let records = ids.iter().map(|id| self.volume(owner, *id)).collect::<Result<Vec<_>>>()?;
        if live.volumes.is_empty() {
            self.settle_volumes(&mut live)?;
        }
        let open =
            ids.iter().map(|id| Ok((*id, live.volume(*id).map_or_else(|| self.open_volume(*id), Ok)?)));
        let instant = self.freeze(open.collect::<Result<_>>()?);
        Ok((records, instant))
    }
}

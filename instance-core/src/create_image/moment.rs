//! The instant of which an image is: an instance's volumes taken, and all that is said of them then.

use std::sync::Arc;
use std::time::{Duration, Instant as Clock};

use ami_core::{
    AmiId, AnyAmi, BlockDeviceMapping, Digest, Image, RootDeviceType, SourceImage, Tags, VolumeId,
};
use storage_block::{Snapshot, Volume};

use super::spec::{CreateImage, ImageConsistency};
use crate::boot_cache::BootPlan;
use crate::description::{Attachment, InstanceDescription, StateReason};
use crate::error::chain;
use crate::guest_agent::{self, Frozen, Turn};
use crate::images::gib;
use crate::instance::{Cell, Hold, Live, PowerOffFor};
use crate::launch::plan;
use crate::lifecycle::{asked_to_power_off, check_ebs_root};
use crate::machine::{ExitCause, Machine, MachineError};
use crate::products::ProductCodes;
use crate::record::{FormerImage, VolumeRecord};
use crate::region::Inner;
use crate::storing::Instant;
use crate::volumes::volume_not_found;
use crate::{BlockDeviceMappingRequest, BlockDeviceRequestKind, Error, ErrorKind, InstanceState, Result};

/// How long a guest is asked to shut down.
const PATIENCE: Duration = Duration::from_secs(60);

/// An instance at the instant of an image.
pub(super) struct Moment<'r> {
    pub(super) draft: Draft,
    pub(super) instant: Instant<'r>,
    pub(super) consistency: ImageConsistency,
    /// How long it stood still.
    pub(super) paused: Duration,
}

/// All that is said of an instance then, whatever becomes of it.
pub(super) struct Draft {
    parent: Image,
    instance: Arc<InstanceDescription>,
    pub(super) direct_boot: Option<BootPlan>,
    /// The volumes that are taken.
    disks: Vec<(Attachment, VolumeRecord)>,
}

/// What a disk of an image begins with.
pub(super) struct Content {
    digest: Digest,
    size: u64,
    encrypted: bool,
}

impl Draft {
    /// Which of the volumes is the root volume.
    pub(super) fn root(&self) -> Option<usize> {
        self.disks.iter().position(|(attachment, _)| self.instance.is_root_device(&attachment.device_name))
    }
}

impl Content {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        Self { digest: snapshot.digest(), size: snapshot.size(), encrypted: snapshot.encrypted() }
    }

    /// What a volume may become, to see what is wrong with an image before anything is stored.
    fn expected((_, volume): &(Attachment, VolumeRecord)) -> Self {
        Self { digest: Digest::of(b""), size: volume.size, encrypted: volume.kms_key_id.is_some() }
    }
}

fn volumes_of(live: &Live) -> Vec<VolumeId> {
    live.record.description.attachments.iter().map(|a| a.volume_id).collect()
}

impl Inner {
    pub(super) fn take_moment(&self, cell: &Cell, image: &CreateImage) -> Result<Moment<'_>> {
        let with_agent = self.guest_agent.filter(|_| image.no_reboot);
        let (turn, live) = match with_agent {
            Some(port) => {
                let (turn, live) = self.hold_with_agent(cell);
                (Some((turn, port)), live)
            }
            None => (None, self.hold_to_freeze(cell)),
        };
        if matches!(live.record.description.state, InstanceState::Running | InstanceState::Stopped) {
            // What cannot be is refused before anything is done.
            self.draft(&live, image)?;
        }
        let (live, frozen) = match turn {
            Some((turn, port)) => self.let_freeze(cell, turn, live, port),
            None => (live, None),
        };
        // Who has attached a volume since has had its guest mount what does not stand still.
        let same = frozen.as_ref().is_some_and(|(_, volumes)| *volumes == volumes_of(&live));
        // It is held no longer when the guest is to go on, which may take its time.
        let moment = self.take_moment_of(cell, live, image);
        let flushed = frozen.is_some_and(|(frozen, _)| frozen.thaw()) && same;
        let moment = moment?;
        Ok(match flushed {
            true => Moment { consistency: ImageConsistency::FileSystemConsistent, ..moment },
            false => moment,
        })
    }

    /// Holds an instance of whose volumes none is being stored, and has its guest's agent, which others wait for no longer
    /// than it takes.
    fn hold_with_agent<'c>(&self, cell: &'c Cell) -> (Turn<'c>, Hold<'c>) {
        loop {
            drop(self.hold_to_freeze(cell));
            let turn = cell.agent();
            let live = cell.hold(self.supervisor.reports());
            if self.storing_of(&live).is_none() {
                return (turn, live);
            }
        }
    }

    /// Has the guest of a running instance flush its file systems, which stand still from then on, if it has an agent that does.
    /// Gives the volumes that it had then.
    fn let_freeze<'c>(
        &self,
        cell: &'c Cell,
        mut turn: Turn<'c>,
        mut live: Hold<'c>,
        port: u32,
    ) -> (Hold<'c>, Option<(Frozen<'c>, Vec<VolumeId>)>) {
        loop {
            let runs = live.machine.is_some() && live.record.description.state == InstanceState::Running;
            let Some(vsock) = live.vsock.clone().filter(|_| runs) else { return (live, None) };
            let (generation, volumes) = (live.generation, volumes_of(&live));
            // Not held meanwhile: others may stop or terminate it.
            drop(live);
            let frozen = guest_agent::freeze(turn, &vsock, port).inspect_err(|e| {
                tracing::info!(instance = %cell.id, error = %e, "an image is crash-consistent");
            });
            live = cell.hold(self.supervisor.reports());
            if self.storing_of(&live).is_none() {
                return match frozen {
                    Ok(frozen) if live.generation == generation => (live, Some((frozen, volumes))),
                    // That of a machine that is gone; it has nobody to wait for.
                    _ => (live, None),
                };
            }
            // A snapshot of one of its volumes has begun, and nothing stands still for as long as that is stored.
            drop(live);
            if frozen.map(drop).is_err() {
                return (self.hold_to_freeze(cell), None);
            }
            (turn, live) = self.hold_with_agent(cell);
        }
    }

    /// Takes an instance that is held, and lets it go.
    fn take_moment_of<'c>(
        &self,
        cell: &'c Cell,
        mut live: Hold<'c>,
        image: &CreateImage,
    ) -> Result<Moment<'_>> {
        let state = live.record.description.state;
        let begun = Clock::now();
        let (taken, consistency) = match (&live.machine, state) {
            (Some(_), InstanceState::Running) if !image.no_reboot => {
                let (held, consistency) = self.shut_down(cell, live)?;
                live = held;
                let ended = live.end_machine();
                let taken = ended.and_then(|()| self.take(&live, &live.volumes, image));
                // Whatever has become of the image.
                self.reset(cell, &mut live)?;
                (taken, consistency)
            }
            (Some(machine), InstanceState::Running) => {
                machine.pause().map_err(|e| Error::machine(e, format!("cannot pause {}", cell.id)))?;
                let taken = self.take(&live, &live.volumes, image);
                if let Err(e) = machine.resume() {
                    drop(taken);
                    return Err(self.not_resumed(cell, &mut live, e));
                }
                (taken, ImageConsistency::CrashConsistent)
            }
            (None, InstanceState::Stopped) => {
                let consistency = match live.record.shut_down {
                    true => ImageConsistency::FileSystemConsistent,
                    false => ImageConsistency::CrashConsistent,
                };
                (self.take(&live, &self.open_volumes(&live)?, image), consistency)
            }
            _ => {
                let what = format!("{} is {state}, in which no image can be made of it", cell.id);
                return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
            }
        };
        let paused = begun.elapsed();
        let (draft, instant) = taken?;
        Ok(Moment { draft, instant, consistency, paused })
    }

    /// Takes those of the volumes, which are open, that are to be in the image.
    fn take(&self, live: &Live, volumes: &[Volume], image: &CreateImage) -> Result<(Draft, Instant<'_>)> {
        let draft = self.draft(live, image)?;
        let open = live.record.description.attachments.iter().zip(volumes);
        let wanted = |id: VolumeId| draft.disks.iter().any(|(_, volume)| volume.id == id);
        let volumes = open.filter(|(a, _)| wanted(a.volume_id)).map(|(a, v)| (a.volume_id, v.clone()));
        let instant = self.freeze(volumes.collect());
        Ok((draft, instant))
    }

    /// Has the guest of a running instance shut down, which nobody takes for the end of its run meanwhile.
    fn shut_down<'c>(&self, cell: &'c Cell, mut live: Hold<'c>) -> Result<(Hold<'c>, ImageConsistency)> {
        if live.powers_off_for() == Some(PowerOffFor::Image) {
            let what = format!("the guest of {} is shutting down for another image", cell.id);
            return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
        }
        let asked = live.machine.as_deref().filter(|machine| asked_to_power_off(*machine, PATIENCE));
        if let Some(state) = asked.map(Machine::state) {
            let generation = live.generation;
            live.set_powers_off_for(Some(PowerOffFor::Image));
            // Not held meanwhile: others may stop or terminate it.
            drop(live);
            let _ = state.wait(Clock::now() + PATIENCE, |s| s.exit_cause().is_some());
            live = self.hold_to_freeze(cell);
            let now = live.record.description.state;
            if live.generation != generation || now != InstanceState::Running {
                let what = format!("{} is {now} now, and was not left to shut down", cell.id);
                return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
            }
        }
        let ended = live.machine.as_ref().and_then(|machine| machine.state().get().exit_cause().cloned());
        let consistency = match ended {
            Some(ExitCause::PowerOff) => ImageConsistency::FileSystemConsistent,
            _ => ImageConsistency::CrashConsistent,
        };
        Ok((live, consistency))
    }

    /// Nobody would resume it later: a machine that stands still is no running instance.
    pub(crate) fn not_resumed(&self, cell: &Cell, live: &mut Live, e: MachineError) -> Error {
        let stands = |machine: &dyn Machine| machine.state().get().exit_cause().is_none();
        let failed = Error::machine(e, format!("cannot resume {}", cell.id));
        // The end of one that has ended is followed up with its own reason.
        if live.machine.as_deref().is_some_and(stands) {
            self.lose(cell, live, StateReason::new("Server.InternalError", chain(&failed)));
        }
        failed
    }

    /// What is said of an instance now, if an image can be made of it.
    fn draft(&self, live: &Live, image: &CreateImage) -> Result<Draft> {
        let instance = live.record.description.clone();
        check_ebs_root(&instance, "made an image of")?;
        instance.check_root_volume()?;
        self.check_free(&image.name, &instance.owner, &self.region.name)?;
        let left_out = |attachment: &Attachment| {
            let out = |change: &&BlockDeviceMappingRequest| change.kind == BlockDeviceRequestKind::NoDevice;
            image.block_devices.iter().filter(out).any(|change| change.is_at(&attachment.device_name))
                && !instance.is_root_device(&attachment.device_name)
        };
        let mut disks = Vec::new();
        for attachment in instance.attachments.iter().filter(|a| !left_out(a)) {
            let id = attachment.volume_id;
            let volume =
                self.store.get::<VolumeRecord>(&id.to_string())?.ok_or_else(|| volume_not_found(id))?;
            disks.push((attachment.clone(), volume));
        }
        let parent = self.parent(instance.image_id)?;
        let draft = Draft { parent, instance, direct_boot: live.record.direct_boot.clone(), disks };
        let expected: Vec<Content> = draft.disks.iter().map(Content::expected).collect();
        self.image_of(&draft, image, &expected)?;
        Ok(draft)
    }

    /// The image that an instance was made from, whether or not it is still registered.
    fn parent(&self, id: AmiId) -> Result<Image> {
        match self.store.get::<FormerImage>(&id.to_string())? {
            Some(former) => Ok(former.0),
            None => Ok(self.image(id)?.image),
        }
    }

    /// The image of an instance: what its parent says of it, with the instance's volumes as they were, and what is asked for.
    pub(super) fn image_of(&self, draft: &Draft, image: &CreateImage, contents: &[Content]) -> Result<Image> {
        let Draft { parent, instance, disks, .. } = draft;
        let (parent, imds_support) = (parent.ami(), parent.imds_support());
        let manifest = parent.manifest();
        let mut codes: ProductCodes = instance.product_codes.clone();
        let mut mappings = Vec::new();
        for ((attachment, volume), content) in disks.iter().zip(contents) {
            codes.extend(volume.product_codes.iter().cloned());
            let size = gib(content.size)?;
            let name = match instance.is_root_device(&attachment.device_name) {
                true => &instance.root_device_name,
                false => &attachment.device_name,
            };
            let mapping = BlockDeviceMapping::ebs(name, content.digest, size);
            mappings.push(
                mapping
                    .delete_on_termination(attachment.delete_on_termination)
                    .volume_type(volume.volume_type)
                    .encrypted(content.encrypted),
            );
        }
        // What is no volume the image has as its parent had it.
        let others = manifest.block_device_mappings().iter().filter(|m| m.as_ebs().is_none());
        let is_taken = |m: &&BlockDeviceMapping| disks.iter().any(|(attachment, _)| is_at(m, attachment));
        mappings.extend(others.filter(|m| !is_taken(m)).cloned());
        for change in &image.block_devices {
            let taken = disks.iter().any(|(attachment, _)| change.is_at(&attachment.device_name));
            match (taken, change.content()) {
                (true, Some(_)) => {
                    let what = format!("the content of {} is the instance's", change.device_name);
                    return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what));
                }
                (false, Some(named)) => codes.extend(self.codes_of_content(&instance.owner, named)?),
                _ => {}
            }
        }
        let root = (manifest.root_device_name(), RootDeviceType::Ebs);
        let mappings =
            plan::changed(root, mappings, &image.block_devices, |named| gib(self.content(named)?.size()))?;
        for (mapping, content) in mappings.iter().filter_map(|m| Some((m, m.content()?))) {
            let known = disks.iter().zip(contents).find(|((attachment, _), _)| is_at(mapping, attachment));
            let size = match known {
                Some((_, content)) => content.size,
                None => self.content(content)?.size(),
            };
            mapping.check_snapshot_size(size)?;
        }
        let mut builder = AnyAmi::builder_for(parent.architecture(), &image.name)
            .root_device(&instance.root_device_name)
            .block_devices(mappings)
            .software_list(manifest.software().iter().cloned())
            .boot(manifest.boot().clone())
            .parent(parent.digest());
        if let Some(os) = manifest.operating_system() {
            builder = builder.operating_system(os.clone());
        }
        let mut made = Image::new(builder.build(&self.region.name, &instance.owner)?);
        made.set_description(image.description.clone())?;
        let mut tags = Tags::new();
        image.tags.iter().try_for_each(|(key, value)| tags.insert(key.clone(), value.clone()).map(drop))?;
        *made.tags_mut() = tags;
        codes.into_iter().try_for_each(|code| made.add_product_code(code))?;
        imds_support.into_iter().for_each(|support| made.set_imds_support(support));
        let source = SourceImage { region: parent.region().clone(), id: parent.id() };
        made.set_source(Some(source), Some(instance.id));
        Ok(made)
    }
}

/// Whether a mapping is of the device at which a volume is attached.
fn is_at(mapping: &BlockDeviceMapping, attachment: &Attachment) -> bool {
    let named = mapping.validate().ok().zip(attachment.device_name.parse().ok());
    named.is_some_and(|(one, other)| one.same_disk(&other))
}

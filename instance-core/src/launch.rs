//! Launching: from an image and hardware to an instance that runs.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Instant;

use ami_core::{
    Ami, AmiId, Arch, BlockDeviceKind, BlockDeviceMapping, BootSource, InstanceId, ReservationId, Tags,
    VolumeId,
};
use storage_block::Volume;

use crate::error::chain;
use crate::instance::{Cell, Instance, Live};
use crate::machine::Runs;
use crate::record::{
    Attachment, ImageRecord, InstanceDescription, InstanceRecord, ShutdownBehavior, StateReason, VolumeRecord,
};
use crate::region::{Inner, Region, StateChange};
use crate::store::Changes;
use crate::{Error, ErrorKind, InstanceState, InstanceType, Result, Transition};

/// What to launch an image with.
///
/// ```
/// use instance_core::{LaunchSpec, ShutdownBehavior};
///
/// let spec = LaunchSpec::new("t3.micro".parse()?)
///     .shutdown_behavior(ShutdownBehavior::Terminate)
///     .tag("Name", "employee-directory");
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    instance_type: InstanceType,
    shutdown_behavior: ShutdownBehavior,
    tags: BTreeMap<String, String>,
}

impl LaunchSpec {
    /// This hardware, and EC2's defaults for the rest.
    pub fn new(instance_type: InstanceType) -> Self {
        Self { instance_type, shutdown_behavior: ShutdownBehavior::default(), tags: BTreeMap::new() }
    }

    /// What happens when the guest powers itself off.
    #[must_use]
    pub fn shutdown_behavior(mut self, behavior: ShutdownBehavior) -> Self {
        self.shutdown_behavior = behavior;
        self
    }

    /// A tag of the instance.
    #[must_use]
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(key.into(), value.into());
        self
    }
}

impl<H> Region<H> {
    /// Launches an instance of `ami` and returns it when its machine runs (`RunInstances`).
    ///
    /// Its volumes are made copy-on-write from the image's snapshots, in constant time.
    ///
    /// ```no_run
    /// # fn demo(region: &instance_core::Region) -> Result<(), Box<dyn std::error::Error>> {
    /// use instance_core::LaunchSpec;
    ///
    /// let image = region.image("ami-0123456789abcdef0".parse()?)?;
    /// let server = region.launch(image.ami(), LaunchSpec::new("t3.micro".parse()?).tag("Name", "web"))?;
    /// println!("{} is {}", server.id(), server.state());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound),
    /// [`ImageUnavailable`](ErrorKind::ImageUnavailable),
    /// [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch), and
    /// [`Unsupported`](ErrorKind::Unsupported) for an instance store volume, before anything is made;
    /// [`Unsupported`](ErrorKind::Unsupported) for hardware that the hypervisor cannot give,
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity),
    /// [`Hypervisor`](ErrorKind::Hypervisor) and others when the host fails, after which nothing is
    /// left of the instance.
    pub fn launch<A: Arch>(&self, ami: &Ami<A>, spec: LaunchSpec) -> Result<Instance>
    where
        H: Runs<A>,
    {
        let cell = self.inner.launch(ami.id(), spec)?;
        Ok(Instance::new(self.inner.clone(), cell))
    }
}

/// A volume to be made for a launch.
struct Planned {
    attachment: Attachment,
    record: VolumeRecord,
}

impl Inner {
    fn launch(&self, image: AmiId, spec: LaunchSpec) -> Result<Arc<Cell>> {
        self.forget_terminated(Instant::now());
        let naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let image = self.image(image)?;
        self.check_launch(&image, &spec)?;
        let planned = plan_volumes(&image)?;
        let boot = self.boot.boot(&image.boot)?;
        let record = new_record(&image, spec, &planned)?;
        let put_volumes = |c: &mut Changes| planned.iter().try_for_each(|p| c.put(&p.record));
        // Not durable yet: what a crash would leave of this launch, nobody has been promised, and files that
        // no record names are removed when the region is opened.
        self.store.stage(|c| {
            put_volumes(c)?;
            c.put(&record)
        })?;
        drop(naming);
        let cell = Arc::new(Cell::new(record));
        self.cells().insert(cell.id, cell.clone());
        self.announce(&StateChange::of(&cell.description.get()));

        let mut live = cell.hold(self.supervisor.sender());
        let begun = self.make_volumes(&planned).and_then(|volumes| {
            live.volumes = volumes.clone();
            while_durable(&volumes, || self.power_on(&cell, &mut live, boot))?;
            live.record.launched = true;
            self.transition_with(&cell, &mut live, Transition::Started, None, put_volumes)
        });
        if let Err(e) = begun {
            self.undo_launch(&cell, &mut live, &e);
            return Err(e);
        }
        drop(live);
        Ok(cell)
    }

    fn check_launch(&self, image: &ImageRecord, spec: &LaunchSpec) -> Result<()> {
        let refused = |e: ami_core::Error| {
            let code = e.code();
            Error::new(ErrorKind::ImageUnavailable, "the image cannot be launched")
                .with_code(code)
                .caused_by(e)
        };
        image.image.check_launch(&self.region.account).map_err(refused)?;
        Tags::try_from(spec.tags.clone()).map_err(|e| {
            let code = e.code();
            Error::new(ErrorKind::InvalidParameter, "the instance cannot have these tags")
                .with_code(code)
                .caused_by(e)
        })?;
        let architecture = image.image.ami().architecture();
        let hardware = &spec.instance_type;
        let mismatch = |what: String| Err(Error::new(ErrorKind::ArchitectureMismatch, what));
        if !hardware.architectures().contains(&architecture) {
            return mismatch(format!("the image is for {architecture}, which {hardware} does not run"));
        }
        let can = self.hypervisor.capabilities();
        if !can.architectures.contains(&architecture) {
            return mismatch(format!(
                "the image is for {architecture}, which {} does not run on this host",
                can.name
            ));
        }
        Ok(())
    }

    fn make_volumes(&self, planned: &[Planned]) -> Result<Vec<Volume>> {
        planned
            .iter()
            .map(|Planned { record, .. }| {
                let failed = |e| Error::storage(e, format!("cannot make the volume {}", record.id));
                let base =
                    record.base.map(|digest| self.blocks.snapshot(&digest)).transpose().map_err(failed)?;
                let dir = self.paths.volume(record.id);
                Volume::create_unsynced(&dir, base.as_ref(), record.size).map_err(failed)
            })
            .collect()
    }

    /// Leaves nothing of a launch that failed. What cannot be removed now is when the region is
    /// opened again: the record says that the launch was never acknowledged.
    fn undo_launch(&self, cell: &Cell, live: &mut Live, why: &Error) {
        self.power_off(live);
        self.cells().remove(&cell.id);
        // It may have got as far as to say so.
        live.record.launched = false;
        if let Err(e) = self.forget(&live.record) {
            tracing::error!(instance = %cell.id, error = chain(&e), "a failed launch left something behind");
        }
        let mut gone = live.record.description.clone();
        gone.state = InstanceState::Terminated;
        gone.state_reason = Some(StateReason::new(why.code(), chain(why)));
        self.announce(&StateChange::of(&gone));
        cell.description.set(gone);
    }
}

/// Does `work` while new volumes become durable, so that only one of the two is waited for.
fn while_durable<T>(volumes: &[Volume], work: impl FnOnce() -> Result<T>) -> Result<T> {
    thread::scope(|scope| {
        let syncing = thread::Builder::new().name("sync-volumes".to_owned());
        let syncing = syncing
            .spawn_scoped(scope, || volumes.iter().try_for_each(Volume::sync_created))
            .map_err(|e| Error::io(e, "cannot start a thread"))?;
        let done = work();
        let synced = syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        synced.map_err(|e| Error::storage(e, "cannot make a volume durable"))?;
        done
    })
}

fn new_record(image: &ImageRecord, spec: LaunchSpec, planned: &[Planned]) -> Result<InstanceRecord> {
    let ami = image.image.ami();
    let direct = matches!(ami.manifest().boot().source(), BootSource::Direct { .. });
    let no_random = |e| Error::io(e, "cannot make an id");
    Ok(InstanceRecord {
        description: InstanceDescription {
            id: InstanceId::random().map_err(no_random)?,
            reservation_id: ReservationId::random().map_err(no_random)?,
            image_id: ami.id(),
            architecture: ami.architecture(),
            instance_type: spec.instance_type,
            state: InstanceState::Pending,
            state_reason: None,
            shutdown_behavior: spec.shutdown_behavior,
            attachments: planned.iter().map(|p| p.attachment.clone()).collect(),
            tags: spec.tags,
        },
        launched: false,
        direct_boot: direct.then(|| image.boot.clone()),
    })
}

/// The volumes of an image's instance, the root volume first.
fn plan_volumes(image: &ImageRecord) -> Result<Vec<Planned>> {
    let manifest = image.image.ami().manifest();
    let root = manifest.root_device_name().as_str();
    let mut mappings: Vec<&BlockDeviceMapping> = manifest.block_device_mappings().iter().collect();
    mappings.sort_by_key(|m| m.device_name() != root);
    let planned = mappings.into_iter().map(plan_volume).filter_map(Result::transpose);
    planned.collect()
}

fn plan_volume(mapping: &BlockDeviceMapping) -> Result<Option<Planned>> {
    let ebs = match mapping.kind() {
        BlockDeviceKind::Ebs(ebs) => ebs,
        BlockDeviceKind::NoDevice => return Ok(None),
        _ => {
            let what = format!("{}: instance store volumes are not supported", mapping.device_name());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
    };
    let id = VolumeId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
    Ok(Some(Planned {
        attachment: Attachment {
            device_name: mapping.device_name().to_owned(),
            volume_id: id,
            delete_on_termination: ebs.delete_on_termination(),
        },
        record: VolumeRecord { id, size: ebs.volume_size(), base: ebs.snapshot().copied() },
    }))
}

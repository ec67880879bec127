//! Volumes and the instances that have them: attached, detached and made larger, also while the instance runs.

mod checks;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ami_core::{AccountId, DeviceName, InstanceId, Timestamp, VolumeId, may_export};
use storage_block::{Disk, Volume};

use self::checks::{check_awake, check_can_boot, check_free_device, check_place, check_settled};
use crate::description::{Attachment, InstanceDescription};
use crate::error::chain;
use crate::instance::{Cell, Live};
use crate::machine::{Detach, DiskSpec, Machine, MachineError, MachineErrorKind};
use crate::record::{ModificationRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::volume_modification::ModifyVolume;
use crate::volumes::{GIB, VolumeDescription, check_stopped};
use crate::{Error, ErrorKind, InstanceState, Result};

/// How long a guest is asked to let go of a volume.
const PATIENCE: Duration = Duration::from_secs(20);

impl<H> Region<H> {
    /// Attaches a volume of the account's to an instance that is running or stopped (`AttachVolume`). It is kept when
    /// the instance is terminated. A guest that runs finds it soon, as a virtio disk whose serial number is the volume's id without
    /// the dash (`/sys/block/vd*/serial` on Linux): device names are the region's alone, unless the guest's own udev rules make
    /// links of them.
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
    /// use instance_core::VolumeSpec;
    ///
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// let volume = region.create_volume(VolumeSpec::new(1))?;
    /// region.attach_volume(volume.id, server.id(), "/dev/sdf")?; // as it runs
    /// region.grow_volume(volume.id, 2)?;
    /// region.detach_volume(volume.id)?; // the guest lets go of it
    /// server.terminate()?;
    /// region.delete_volume(volume.id)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`InstanceNotFound`](ErrorKind::InstanceNotFound),
    /// [`VolumeInUse`](ErrorKind::VolumeInUse), [`InvalidParameter`](ErrorKind::InvalidParameter) for a device
    /// name that is none or taken, by a volume or by instance store,
    /// [`BootForVolumeTypeUnsupported`](ErrorKind::BootForVolumeTypeUnsupported) for the root device's and a volume of a type that
    /// nothing boots from,
    /// [`OptInRequired`](ErrorKind::OptInRequired) for a volume with a product code whose terms the account has not
    /// [accepted](Self::accept_terms), and [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) unless the instance
    /// is stopped for such a one, [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) unless the
    /// instance is running or stopped, or if it hibernates, [`AttachmentLimitExceeded`](ErrorKind::AttachmentLimitExceeded)
    /// for one with as many disks as its machine can have, [`Unsupported`](ErrorKind::Unsupported) for one that runs on a
    /// machine that takes no disks meanwhile, or what the host met.
    pub fn attach_volume(&self, volume: VolumeId, instance: InstanceId, device: &str) -> Result<()> {
        self.inner.attach_volume(*self.account(), volume, instance, device)
    }

    /// Detaches a volume from the instance that has it (`DetachVolume`). A guest that runs is asked to let go of it,
    /// and is waited for, for twenty seconds at most, in which other calls on the instance wait.
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`IncorrectState`](ErrorKind::IncorrectState) if it is
    /// attached to nothing or the guest has not let go of it, [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState)
    /// unless the instance is running or stopped, [`OperationNotPermitted`](ErrorKind::OperationNotPermitted) for the
    /// root volume of one that runs, [`Unsupported`](ErrorKind::Unsupported) for a machine that gives no disks up, or
    /// what the host met.
    pub fn detach_volume(&self, volume: VolumeId) -> Result<()> {
        self.inner.detach_volume(*self.account(), volume, Detach::Ask { until: Instant::now() + PATIENCE })
    }

    /// The same whatever the guest does with it (`DetachVolume` with `Force`): what it has not written is lost.
    ///
    /// # Errors
    ///
    /// As [`detach_volume`](Self::detach_volume).
    pub fn force_detach_volume(&self, volume: VolumeId) -> Result<()> {
        self.inner.detach_volume(*self.account(), volume, Detach::Force)
    }

    /// The bytes of a volume of the account's that is attached to nothing, to read and to write, by a file system's tools
    /// over [NBD](storage_block::nbd), say. As long as there is a handle of the disk the volume is this
    /// process's: it is neither attached nor changed nor deleted, and no snapshot is made of it. What is written is
    /// durable when the disk has been flushed.
    ///
    /// Those of a volume that an instance has are read by a [snapshot](Self::create_snapshot) of it.
    ///
    /// ```
    /// # use instance_core::{Region, testing::FakeHypervisor};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path().join("region"), FakeHypervisor::new())?;
    /// use instance_core::{ErrorKind, VolumeSpec};
    /// use storage_block::nbd;
    ///
    /// let volume = region.create_volume(VolumeSpec::new(1))?;
    /// let server = nbd::Server::bind(dir.path().join("volume.sock"), region.volume_disk(volume.id)?)?;
    /// // qemu-nbd, nbd-client or guestfish have it now.
    /// let refused = region.delete_volume(volume.id).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::VolumeInUse);
    /// drop(server);
    /// region.delete_volume(volume.id)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`VolumeInUse`](ErrorKind::VolumeInUse),
    /// [`AuthFailure`](ErrorKind::AuthFailure) for one with a product code, or what the host met.
    pub fn volume_disk(&self, id: VolumeId) -> Result<Disk> {
        let inner = &self.inner;
        loop {
            let resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
            let record = inner.volume(*self.account(), id)?;
            may_export(&record.product_codes, &format!("the volume {id}"))?;
            inner.check_detached(id)?;
            // One that is being stored is open, and would be so for more than one.
            if inner.storing.open(id).is_none() {
                return Ok(inner.open_volume(id)?.disk());
            }
            drop(resources);
            inner.storing.wait(id);
        }
    }

    /// Makes a volume larger, also while an instance that runs has it, whose guest is told (`ModifyVolume`). What
    /// it holds stays as it is; to make use of the room is the guest's.
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`InvalidParameter`](ErrorKind::InvalidParameter) for a size
    /// that is less than it has or more than its type may have, [`Unsupported`](ErrorKind::Unsupported) for an instance
    /// that runs on a machine whose disks do not grow, or what the host met.
    pub fn grow_volume(&self, volume: VolumeId, size_gib: u32) -> Result<VolumeDescription> {
        self.modify_volume(volume, ModifyVolume::new().size_gib(size_gib))?;
        let record = self.inner.volume(*self.account(), volume)?;
        Ok(VolumeDescription::of(record, self.inner.directory.attached(volume).as_deref()))
    }
}

impl Inner {
    fn attach_volume(
        &self,
        owner: AccountId,
        id: VolumeId,
        instance: InstanceId,
        device: &str,
    ) -> Result<()> {
        let name: DeviceName = device.parse().map_err(|e: ami_core::Error| {
            Error::new(ErrorKind::InvalidParameter, "the volume cannot be attached there").with_source(e)
        })?;
        let cell = self.cell(owner, instance)?;
        let mut live = cell.hold(self.supervisor.reports());
        let _resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let volume = self.volume(owner, id)?;
        self.check_free_to_go(id)?;
        check_settled(&live)?;
        check_free_device(&live.record, &name)?;
        let is_root = live.record.description.is_root_device(name.as_str());
        if is_root {
            check_can_boot(id, volume.volume_type)?;
        }
        check_place(&live.record, &self.hypervisor.capabilities())?;
        if !volume.product_codes.is_empty() {
            self.check_accepted(&owner, &volume.product_codes)?;
            check_stopped(&live)?;
        }
        // From here on it has a volume that is not of its launch, and may not be made again.
        self.settle_volumes(&mut live)?;
        let mut record = live.record.clone();
        // What is on it need not be whole.
        record.shut_down = false;
        let description = record.description_mut();
        // The root volume is the first, and has the name that the image gives it.
        let (place, device_name) = match is_root {
            true => (0, description.root_device_name.clone()),
            false => (description.attachments.len(), name.to_string()),
        };
        let attachment = Attachment { device_name, volume_id: id, delete_on_termination: false };
        description.attachments.insert(place, attachment);
        description.product_codes.extend(volume.product_codes);
        // The machine first: what it refuses has been written nowhere.
        let volume = live.machine.is_some().then(|| self.plug_volume(&live, id)).transpose()?;
        if let Err(e) = self.store.commit(|c| c.put(&record)) {
            if volume.is_some() {
                unplug_again(&live, id);
            }
            // What the store has of it all the same is not there any more when another is given the volume.
            return self.store.later(|c| c.put(&live.record)).and(Err(e));
        }
        volume.into_iter().for_each(|volume| live.volumes.insert(place, volume));
        self.publish(&cell, &mut live, record);
        Ok(())
    }

    fn detach_volume(&self, owner: AccountId, id: VolumeId, how: Detach) -> Result<()> {
        self.volume(owner, id)?;
        let not_attached = || {
            let what = format!("the volume {id} is attached to nothing");
            Error::new(ErrorKind::IncorrectState, what)
        };
        let holder: Arc<InstanceDescription> = self.directory.attached(id).ok_or_else(not_attached)?;
        let cell = self.cell(owner, holder.id)?;
        let mut live = cell.hold(self.supervisor.reports());
        let description = &live.record.description;
        let attached = description.state != InstanceState::Terminated;
        let place = description.attachments.iter().position(|a| a.volume_id == id).filter(|_| attached);
        let place = place.ok_or_else(not_attached)?;
        if live.machine.is_some() && description.root_volume() == Some(place) {
            let what = format!("the root volume of {} cannot be detached while it runs", cell.id);
            return Err(Error::new(ErrorKind::OperationNotPermitted, what));
        }
        check_settled(&live)?;
        // From here on no instance says what it is made of.
        self.settle_volumes(&mut live)?;
        let mut record = live.record.clone();
        record.description_mut().attachments.remove(place);
        if live.machine.is_none() {
            return self.change(&cell, &mut live, record);
        }
        let volume = self.unplug_volume(&cell, &mut live, place, how)?;
        let detached = self.change(&cell, &mut live, record);
        detached.inspect_err(|_| plug_again(&mut live, place, volume))
    }

    /// Makes the volumes that an instance was launched with durable, unless they are known to be.
    pub(crate) fn settle_volumes(&self, live: &mut Live) -> Result<()> {
        if live.record.launched {
            return Ok(());
        }
        let closed = live.machine.is_none() && live.volumes.is_empty();
        if closed {
            live.volumes = self.open_volumes(live)?;
        }
        let settled = live.settle();
        if closed {
            live.volumes.clear();
        }
        // From here on one that is missing or damaged is not made again.
        settled.and_then(|()| self.store.later(|c| c.put(&live.record)))
    }

    /// Gives a volume to a machine.
    fn plug_volume(&self, live: &Live, id: VolumeId) -> Result<Volume> {
        let volume = self.open_volume(id)?;
        let plugged = with_machine(live, |machine| machine.attach_disk(disk_of(live, id, &volume)));
        let instance = live.record.description.id;
        plugged.map_err(|e| refused(e, format!("cannot attach {id} to {instance} while it runs")))?;
        Ok(volume)
    }

    /// Takes a volume from a machine, and gives it, with all on the disk that its guest has written.
    fn unplug_volume(&self, cell: &Cell, live: &mut Live, place: usize, how: Detach) -> Result<Volume> {
        let id = live.record.description.attachments[place].volume_id;
        let detached = with_machine(live, |machine| machine.detach_disk(&serial(id), how));
        match detached {
            // One that could not be plugged in again has gone from the machine already.
            Err(e) if e.kind() == MachineErrorKind::NoSuchDisk => {}
            detached => detached
                .map_err(|e| refused(e, format!("cannot detach {id} from {} while it runs", cell.id)))?,
        }
        let volume = live.volumes.remove(place);
        if let Err(e) = volume.disk().flush() {
            plug_again(live, place, volume);
            return Err(Error::storage(e, format!("cannot flush {id}")));
        }
        Ok(volume)
    }

    pub(crate) fn modify_volume(
        &self,
        owner: AccountId,
        id: VolumeId,
        change: ModifyVolume,
    ) -> Result<VolumeRecord> {
        let started = Timestamp::now();
        self.volume(owner, id)?;
        let holder = self.directory.attached(id);
        let cell = holder.map(|holder| self.cell(owner, holder.id)).transpose()?;
        let mut live = cell.as_ref().map(|cell| cell.hold(self.supervisor.reports()));
        let _resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record: VolumeRecord = self.volume(owner, id)?;
        if record.growing {
            let open = live.as_ref().and_then(|live| live.volume(id));
            record = self.settle_size(&record, &open.map_or_else(|| self.open_volume(id), Ok)?)?;
            self.store.commit(|c| c.put(&record))?;
        }
        // It may have been attached since.
        let is_root = self.directory.attached(id).is_some_and(|holder| holder.is_root_volume(id));
        if let Some(wanted) = change.volume_type.filter(|_| is_root) {
            check_can_boot(id, wanted)?;
        }
        let target_type = change.volume_type.unwrap_or(record.volume_type);
        let (old, (least, most)) = (record.size.div_ceil(GIB), target_type.size_range_gib());
        let size_gib = change.size_gib.map_or(old, u64::from);
        if size_gib < old.max(u64::from(least)) || size_gib > u64::from(most) {
            let what = format!("a volume of {old} GiB cannot be a {target_type} volume of {size_gib}");
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        let target_size = size_gib * GIB;
        let mut modification = ModificationRecord {
            original_size: record.size,
            target_size,
            original_type: record.volume_type,
            target_type,
            started,
            ended: started,
        };
        record.volume_type = target_type;
        let grows = target_size > record.size;
        if let Some(live) = live.as_mut().filter(|_| grows) {
            check_awake(&live.record)?;
            self.settle_volumes(live)?;
        }
        let machine = live.as_ref().filter(|_| grows);
        let machine = machine.and_then(|live| Some((live.machine.as_deref()?, live.volume(id)?)));
        if machine.is_some() && !self.hypervisor.capabilities().live_growth {
            let what =
                format!("{id} is attached to an instance that runs, whose disks do not grow meanwhile");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if grows {
            let volume = match &machine {
                Some((_, volume)) => volume.clone(),
                None => self.open_volume(id)?,
            };
            let failed = |e| Error::storage(e, format!("cannot make {id} larger"));
            volume.check_growth(target_size).map_err(failed)?;
            let before = VolumeRecord { growing: true, ..self.volume(owner, id)? };
            (record.size, record.growing) = (target_size, true);
            record.modification = Some(modification.clone());
            // From here on it is as large, whatever comes in between: opening the region makes it so.
            let grown = self.store.commit(|c| c.put(&record));
            grown.and_then(|()| volume.grow(target_size).map_err(failed)).inspect_err(|_| {
                // Nobody has been told. Which size the disk has is seen when it is next looked at.
                if let Err(e) = self.store.commit(|c| c.put(&before)) {
                    tracing::error!(volume = %id, error = chain(&e), "a volume that could not grow may be said to have");
                }
            })?;
        }
        modification.ended = Timestamp::now();
        record.modification = Some(modification);
        match std::mem::take(&mut record.growing) {
            // What was promised is durable. If this is lost, the next look at it finds nothing to do.
            true => {
                if let Err(e) = self.store.stage(|c| c.put(&record)) {
                    tracing::warn!(volume = %id, error = chain(&e), "cannot note that a volume has grown");
                }
            }
            false => self.store.commit(|c| c.put(&record))?,
        }
        if let Some((machine, _)) = machine {
            // The volume is larger all the same: a guest that was not told finds out when it is started again.
            machine
                .disk_grown(&serial(id))
                .map_err(|e| refused(e, format!("{id} is larger, and the guest has not been told")))?;
        }
        Ok(record)
    }

    /// Has a volume whose growth was cut off, and its record, which it gives, agree: whichever says more is right.
    pub(crate) fn settle_size(&self, record: &VolumeRecord, volume: &Volume) -> Result<VolumeRecord> {
        let size = record.size.max(volume.size());
        let failed = |e| Error::storage(e, format!("cannot make {} as large as it is said to be", record.id));
        volume.grow(size).map_err(failed)?;
        Ok(VolumeRecord { size, growing: false, ..record.clone() })
    }

    pub(crate) fn open_volume(&self, id: VolumeId) -> Result<Volume> {
        if let Some(open) = self.storing.open(id) {
            return Ok(open);
        }
        Volume::open(&self.paths.volume(id), &self.blocks).map_err(|e| match e.kind() {
            storage_block::ErrorKind::InUse => {
                let what = format!("the disk of the volume {id} is in use");
                Error::new(ErrorKind::VolumeInUse, what).with_source(e)
            }
            _ => Error::storage(e, format!("cannot open the volume {id}")),
        })
    }
}

/// Takes a volume from a machine that was given it: the instance does not have it, as far as anybody has been told.
fn unplug_again(live: &Live, id: VolumeId) {
    if let Err(e) = with_machine(live, |machine| machine.detach_disk(&serial(id), Detach::Force)) {
        tracing::error!(volume = %id, error = chain(&e), "a volume is in use until its instance's machine ends");
    }
}

/// Gives a volume back to a machine that it was taken from: the instance still has it, as far as anybody has been told.
fn plug_again(live: &mut Live, place: usize, volume: Volume) {
    let id = live.record.description.attachments[place].volume_id;
    if let Err(e) = with_machine(live, |machine| machine.attach_disk(disk_of(live, id, &volume))) {
        tracing::error!(volume = %id, error = chain(&e), "a volume that was detached is not back");
    }
    // In any case: volumes go by the places of their attachments.
    live.volumes.insert(place, volume);
}

/// The serial number that a guest finds a volume by: its id without the dash, as EC2's guests do.
fn serial(id: VolumeId) -> String {
    id.to_string().replace('-', "")
}

/// A volume as its instance's machine has it.
pub(crate) fn disk_of(live: &Live, id: VolumeId, volume: &Volume) -> DiskSpec {
    let disk = live.limiters.iter().fold(volume.disk(), |disk, limiter| disk.limited(limiter));
    DiskSpec::new(disk, serial(id))
}

fn with_machine(
    live: &Live,
    act: impl FnOnce(&dyn Machine) -> Result<(), MachineError>,
) -> Result<(), MachineError> {
    match live.machine.as_deref() {
        Some(machine) => act(machine),
        None => Err(MachineError::new(MachineErrorKind::WrongState, "the instance has no machine any more")),
    }
}

/// What a machine's refusal is to users.
fn refused(error: MachineError, what: String) -> Error {
    let kind = match error.kind() {
        MachineErrorKind::Unsupported => ErrorKind::Unsupported,
        MachineErrorKind::Held => ErrorKind::IncorrectState,
        MachineErrorKind::WrongState => ErrorKind::IncorrectInstanceState,
        _ => ErrorKind::Hypervisor,
    };
    Error::new(kind, what).with_source(error)
}

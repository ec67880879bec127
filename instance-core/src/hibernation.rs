//! Hibernation: the machine of an instance is saved beside its volumes, and goes on when the instance is started.
//!
//! What a guest keeps in mind belongs to its volumes as they were at that moment, so a saved machine goes on once at
//! most. The record that says `stopped` names it, and is committed when it and the volumes are durable; the one that says
//! `running` names it no more, and is committed before the guest goes on. Of one that no record names nothing is left
//! when the region is opened: the instance then boots.
//!
//! A saved machine is as secret as the root volume: where this is encrypted, so is that, under the same key. In the open
//! it is then in memory alone, once more beside the guest's, while it is written and for as long as the guest runs that
//! was restored from it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use ami_core::InstanceId;
use storage_block::keys::EncryptionKey;
use storage_block::{Disk, ErrorKind as BlockErrorKind, RawFile, Volume, VolumeOptions};

use crate::description::{StateReason, user_initiated};
use crate::error::chain;
use crate::garbage::remove_any;
use crate::instance::{Cell, Live};
use crate::lifecycle::{check_ebs_root, check_stoppable};
use crate::machine::{Machine, MachineErrorKind, MachineState, RestoreSpec, SavedMachine};
use crate::power::memory_file;
use crate::record::SavedRecord;
use crate::region::Inner;
use crate::{Error, ErrorKind, Instance, InstanceState, Result, Transition};

/// What the size of a volume is a multiple of.
const BLOCK: u64 = 4096;
/// How much is copied at once.
const PART: u64 = 1 << 20;

impl Instance {
    /// Stops it as it is (`StopInstances` with `Hibernate`): its memory is saved beside its volumes, and when it is next
    /// [started](Self::start) its guest goes on as if nothing had been, but for the time. It has to be launched with
    /// [`hibernation`](method@crate::LaunchSpec::hibernation). Where it cannot be saved it is
    /// [stopped](Self::stop) with this patience, as EC2 does, and its state's reason says why. Does nothing to one that is
    /// stopped. While its memory is written other calls on it wait. It waits itself while the guest's file systems stand
    /// still for [an image](crate::RegionOptions::guest_agent).
    ///
    /// What it has saved is as secret as its root volume: encrypted if that is. EC2 asks for an encrypted root volume;
    /// here it need not be. While it hibernates its volumes neither come nor go nor grow. Images and snapshots that
    /// are made then hold what it had written, not what it has in memory. What is on its instance store is lost.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, InstanceState, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// use std::time::Duration;
    ///
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?).hibernation(true))?;
    /// server.hibernate(Duration::from_secs(60))?;
    /// let asleep = server.describe();
    /// assert_eq!(asleep.state, InstanceState::Stopped);
    /// assert_eq!(asleep.state_reason.ok_or("it has one")?.code, "Client.UserInitiatedHibernate");
    /// server.start()?; // it does not boot
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`UnsupportedHibernation`](ErrorKind::UnsupportedHibernation) if it was not launched with hibernation,
    /// [`Unsupported`](ErrorKind::Unsupported) on a hypervisor that cannot save machines and for one whose root device is
    /// instance store, and as [`stop`](Self::stop).
    pub fn hibernate(&self, patience: Duration) -> Result<()> {
        let (region, cell) = self.parts();
        region.hibernate(cell, patience)
    }
}

impl Inner {
    fn hibernate(&self, cell: &Cell, patience: Duration) -> Result<()> {
        // What stands still for an image would do so for ever when it is woken: nobody would be there to have it go on.
        let turn = cell.agent();
        let mut live = cell.hold(self.supervisor.reports());
        check_ebs_root(&live.record.description, "hibernated")?;
        check_stoppable(&live.record.description)?;
        if !live.record.description.hibernation {
            let what = format!("{} was launched without hibernation", cell.id);
            return Err(Error::new(ErrorKind::UnsupportedHibernation, what));
        }
        self.can_save().map_err(|what| Error::new(ErrorKind::Unsupported, what))?;
        let state = live.record.description.state;
        if matches!(state, InstanceState::Stopped | InstanceState::Stopping) {
            drop(turn);
            return self.stop_held(cell, live, patience, user_initiated());
        }
        let reason = StateReason::new("Client.UserInitiatedHibernate", "asked for by the user");
        self.transition(cell, &mut live, Transition::Stop, Some(reason.clone()))?;
        let unthawed = live.vsock.as_ref().and_then(|vsock| turn.owes(vsock));
        let saved = self.save(cell, &live).map(|saved| SavedRecord { unthawed, ..saved });
        drop(turn);
        match saved {
            Ok(saved) => {
                live.end_machine().inspect_err(|_| self.remove_saved(cell.id))?;
                self.power_off(&mut live);
                let mut record = live.after(Transition::Stopped, Some(reason))?;
                record.saved = Some(saved);
                self.store.commit(|c| c.put(&record))?;
                self.publish(cell, &mut live, record);
                Ok(())
            }
            Err(e) => {
                tracing::warn!(instance = %cell.id, error = chain(&e), "an instance that cannot hibernate is stopped");
                // One that does not go on is ended without being asked.
                let _ = live.machine.as_deref().map(Machine::resume);
                let mut reason = user_initiated();
                reason.message = format!("it could not hibernate: {}", chain(&e));
                let mut record = live.record.clone();
                record.description_mut().state_reason = Some(reason.clone());
                self.change(cell, &mut live, record)?;
                self.stop_held(cell, live, patience, reason)
            }
        }
    }

    /// What there is to say against saving machines, if anything.
    pub(crate) fn can_save(&self) -> Result<(), String> {
        let can = self.hypervisor.capabilities();
        match can.save {
            true => Ok(()),
            false => Err(format!("{} does not save machines, so nothing hibernates on it", can.name)),
        }
    }

    /// Has the machine stand still and saves it; it and what its guest has written are durable then.
    fn save(&self, cell: &Cell, live: &Live) -> Result<SavedRecord> {
        let lost = || Error::new(ErrorKind::Internal, "the machine was lost");
        let machine = live.machine.as_deref().ok_or_else(lost)?;
        machine.pause().map_err(|e| Error::machine(e, format!("cannot pause {}", cell.id)))?;
        let flushed: Result<(), _> = live.volumes.iter().try_for_each(|volume| volume.disk().flush());
        flushed.map_err(|e| Error::storage(e, "cannot flush a volume"))?;
        let path = self.paths.saved_machine(cell.id);
        self.remove_saved(cell.id);
        let saved = match live.root_volume().and_then(Volume::key) {
            Some(key) => save_encrypted(machine, &path, key),
            None => save_open(machine, &path),
        };
        saved
            .map(|len| SavedRecord { len, vsock: live.vsock.is_some(), unthawed: None })
            .inspect_err(|_| self.remove_saved(cell.id))
    }

    /// Has a machine go on that was saved. It is paused; or it is lost, with the reason.
    pub(crate) fn wake(
        &self,
        cell: &Cell,
        live: &mut Live,
        saved: &SavedRecord,
    ) -> Result<Result<(), StateReason>> {
        let lost = |e: &dyn std::error::Error| {
            let what = format!("it could not go on where it hibernated, and has booted: {}", chain(e));
            Ok(Err(StateReason::new("Server.InternalError", what)))
        };
        let machine = match self.saved_machine(cell.id, saved) {
            Ok(machine) => machine,
            Err(e) if e.kind() == ErrorKind::Corrupt => return lost(&e),
            Err(e) => return Err(e),
        };
        let spec = RestoreSpec::new(cell.id.to_string(), machine, cell.console.port());
        match self.restore(cell, live, spec, saved.vsock)? {
            Ok(()) => {
                if let (Some(vsock), Some(port)) = (&live.vsock, saved.unthawed) {
                    cell.turns().owe(vsock, port);
                }
                Ok(Ok(()))
            }
            Err(e) if matches!(e.kind(), MachineErrorKind::Saved | MachineErrorKind::Unsupported) => lost(&e),
            Err(e) => Err(Error::machine(e, format!("cannot restore the machine of {}", cell.id))),
        }
    }

    /// Lets a machine run that was restored.
    pub(crate) fn go_on(&self, cell: &Cell, live: &mut Live) -> Result<()> {
        match live.machine.as_deref().filter(|machine| machine.state().get() == MachineState::Paused) {
            Some(machine) => match machine.resume() {
                Ok(()) => {
                    let thawed = live.vsock.as_ref().map(|vsock| cell.turns().thaw_owed(vsock));
                    if let Some(Err(e)) = thawed {
                        tracing::warn!(instance = %cell.id, error = chain(&e), "its file systems may stand still");
                    }
                    Ok(())
                }
                Err(e) => Err(self.not_resumed(cell, live, e)),
            },
            None => Ok(()),
        }
    }

    /// What was saved of an instance, in the open.
    fn saved_machine(&self, id: InstanceId, saved: &SavedRecord) -> Result<SavedMachine> {
        let path = self.paths.saved_machine(id);
        let failed = |e| Error::io(e, format!("cannot read {}", path.display()));
        let corrupt = |what| Error::new(ErrorKind::Corrupt, format!("{} {what}", path.display()));
        let file = match path.symlink_metadata() {
            Ok(found) if found.is_dir() => {
                let broken = |e| Error::storage(e, format!("cannot read {}", path.display()));
                let volume = match Volume::open(&path, &self.blocks) {
                    Err(e) if e.kind() == BlockErrorKind::NotFound => return Err(corrupt("is gone")),
                    opened => opened.map_err(broken)?,
                };
                let file = memory_file().map_err(failed)?;
                file.set_len(volume.size()).map_err(failed)?;
                let clone = file.try_clone().map_err(failed)?;
                let to = RawFile::from_file(clone, false).map_err(broken)?.into_disk();
                copy(&volume.disk(), &to).map_err(broken)?;
                file.set_len(saved.len.min(volume.size())).map_err(failed)?;
                file
            }
            Ok(_) => File::open(&path).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(corrupt("is gone")),
            Err(e) => return Err(failed(e)),
        };
        let machine = SavedMachine::new(file).map_err(failed)?;
        match machine.len() == saved.len {
            true => Ok(machine),
            false => Err(corrupt("is not as long as it was")),
        }
    }

    /// Removes what was saved of an instance, if anything was. What cannot be removed is when the region is opened.
    pub(crate) fn remove_saved(&self, id: InstanceId) {
        match remove_any(&self.paths.saved_machine(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(instance = %id, error = chain(&e), "cannot remove a saved machine");
            }
            _ => {}
        }
    }
}

fn save_open(machine: &dyn Machine, path: &Path) -> Result<u64> {
    let failed = |e| Error::io(e, format!("cannot write {}", path.display()));
    let new = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = new.map_err(failed)?;
    machine.save(&file).map_err(|e| Error::machine(e, "cannot save the machine"))?;
    file.sync_all().map_err(failed)?;
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)?;
    Ok(file.metadata().map_err(failed)?.len())
}

fn save_encrypted(machine: &dyn Machine, path: &Path, key: &EncryptionKey) -> Result<u64> {
    let failed = |e| Error::io(e, "cannot keep a saved machine in memory");
    let file = memory_file().map_err(failed)?;
    machine.save(&file).map_err(|e| Error::machine(e, "cannot save the machine"))?;
    let len = file.metadata().map_err(failed)?.len();
    let size = len.next_multiple_of(BLOCK).max(BLOCK);
    file.set_len(size).map_err(failed)?;
    let write = || {
        let volume = VolumeOptions::new().encrypt(key).create_unsynced(path, None, size)?;
        copy(&RawFile::from_file(file, true)?.into_disk(), &volume.disk())?;
        volume.disk().flush()?;
        volume.sync_created()
    };
    write().map_err(|e| Error::storage(e, format!("cannot write {}", path.display())))?;
    Ok(len)
}

/// Copies all but the holes to a disk that is empty.
fn copy(from: &Disk, to: &Disk) -> storage_block::Result<()> {
    let (mut part, mut at) = (Vec::new(), 0);
    while let Some(data) = from.next_data(at)? {
        let len = (data.end - data.start).min(PART);
        part.resize(usize::try_from(len).unwrap_or_default(), 0);
        from.read_at(&mut part, data.start)?;
        to.write_at(&part, data.start)?;
        at = data.start + len;
    }
    Ok(())
}

//! An instance: the handle that users hold, and what stands behind it.

use std::fmt;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ami_core::{AccountId, AnyAmi, InstanceId};
use storage_block::{Limiter, Volume};

use crate::capacity::Claim;
use crate::console::Console;
use crate::description::{Attachment, InstanceDescription, StateReason};
use crate::error::chain;
use crate::images::CreatedImage;
use crate::machine::{DiskSpec, Machine};
use crate::record::InstanceRecord;
use crate::region::Owner;
use crate::status::Boot;
use crate::supervisor::Message;
use crate::vsock::Vsock;
use crate::watch::{Publisher, Watch};
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

/// An instance: an object made from an AMI. Cheap to clone; all clones are the same instance.
///
/// It lives in its region, not in this handle: dropping the handle changes nothing.
///
/// ```
/// use std::time::{Duration, Instant};
/// use ami_core::{Ami, X86_64};
/// use instance_core::{DirectBoot, ImageSource, InstanceState, LaunchSpec, Region};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
/// use storage_block::MemoryDisk;
///
/// let dir = tempfile::tempdir()?;
/// let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let kernel = instance_core::testing::tiny_elf();
/// let source = ImageSource::new(&disk).boot(DirectBoot::new(kernel, None, ""));
/// let ami = region.register_image(Ami::<X86_64>::builder("first"), source)?;
///
/// let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// assert_eq!(instance.state(), InstanceState::Running);
/// assert_eq!(region.instance(instance.id())?.describe(), instance.describe());
/// assert_eq!(instance.image()?, ami);
///
/// let deadline = Instant::now() + Duration::from_secs(10);
/// instance.console().reader().wait_for("GUEST READY", deadline)?;
/// instance.console().write_all(b"poweroff\n", deadline)?;
/// instance.wait_for(InstanceState::Stopped, deadline)?;
/// instance.start()?; // from its root volume as the guest left it
/// instance.reboot()?;
/// assert!(instance.watch().wait(deadline, |now| now.state == InstanceState::Running).is_ok());
/// instance.terminate()?;
/// assert_eq!(instance.state(), InstanceState::Terminated);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Instance {
    region: Arc<Owner>,
    cell: Arc<Cell>,
}

impl Instance {
    pub(crate) fn new(region: Arc<Owner>, cell: Arc<Cell>) -> Self {
        Self { region, cell }
    }

    pub(crate) fn parts(&self) -> (&Owner, &Cell) {
        (&self.region, &self.cell)
    }

    /// Its id.
    pub fn id(&self) -> InstanceId {
        self.cell.id
    }

    /// Its state now.
    pub fn state(&self) -> InstanceState {
        self.describe().state
    }

    /// All that is known of it.
    pub fn describe(&self) -> InstanceDescription {
        self.cell.description.get()
    }

    /// Its description, to wait for: by blocking with a deadline or as a future.
    pub fn watch(&self) -> Watch<InstanceDescription> {
        self.cell.description.watch()
    }

    /// Blocks until it is in `state`.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) if it is in another one at the
    /// deadline.
    pub fn wait_for(&self, state: InstanceState, deadline: Instant) -> Result<()> {
        match self.watch().wait(deadline, |d| d.state == state) {
            Ok(_) => Ok(()),
            Err(d) => {
                let what = format!("{} is {}, not {state}, at the deadline", d.id, d.state);
                Err(Error::new(ErrorKind::IncorrectInstanceState, what))
            }
        }
    }

    /// Its serial console. It stays the same over stops and reboots.
    pub fn console(&self) -> Console {
        self.cell.console.clone()
    }

    /// Stops it: presses the power button, waits up to `patience` for the guest to power off, and
    /// then ends the machine. A patience of zero, or a hypervisor without a power button, ends it at
    /// once. Its volumes are kept. Does nothing to one that is stopped. While this waits, others may
    /// [terminate](Self::terminate) it, or stop it with less patience.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState), also if it was terminated
    /// meanwhile, [`OperationNotPermitted`](ErrorKind::OperationNotPermitted) if it is protected against
    /// being stopped, or what the host met.
    pub fn stop(&self, patience: Duration) -> Result<()> {
        self.region.stop(&self.cell, patience)
    }

    /// Starts it again, from its root volume as it is now, or where it [hibernated](Self::hibernate). Does nothing to
    /// one that runs. If what it had saved is of no use here, it boots, and the reason of its state says so; where the
    /// host alone fails, what it had saved is kept.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) unless it is stopped;
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity) if the host cannot hold it now;
    /// [`NotBootable`](ErrorKind::NotBootable) if its root volume no longer holds a kernel, after
    /// which it is stopped again; or what the host met.
    pub fn start(&self) -> Result<()> {
        self.region.start(&self.cell)
    }

    /// Resets it: its machine ends at once and a new one boots from the root volume. What the guest
    /// had not written to its disks is lost.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start), but the instance must be running; it is stopped if no new machine
    /// can be made.
    pub fn reboot(&self) -> Result<()> {
        self.region.reboot(&self.cell)
    }

    /// Terminates it: its machine ends at once, and the volumes that go with it are removed. Does
    /// nothing to one that is terminated.
    ///
    /// # Errors
    ///
    /// [`OperationNotPermitted`](ErrorKind::OperationNotPermitted) if it is protected against being terminated
    /// or stopped, or what the host met.
    pub fn terminate(&self) -> Result<()> {
        self.region.terminate(&self.cell)
    }

    /// Makes an AMI of it, as it is at one instant: all its volumes, taken while its processors
    /// stand still (`CreateImage` with `NoReboot`). What the guest holds in its page cache is not on
    /// its volumes; have it `sync` first. The AMI that it was made from need not be registered any more.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) unless it is running or
    /// stopped; [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate), or
    /// [`InvalidImage`](ErrorKind::InvalidImage) for a name that breaks the rule for names;
    /// [`NotBootable`](ErrorKind::NotBootable) if its root volume no longer holds a kernel; or what
    /// the host met. Nothing is then left of the image, and the instance goes on; only one whose
    /// machine cannot be [resumed](crate::machine::Machine::resume) is stopped.
    pub fn create_image(&self, name: &str) -> Result<CreatedImage> {
        self.region.create_image(&self.cell, name)
    }

    /// The host's end of the streams of its machine, by which this process and a program in the guest talk without a
    /// network. Each machine has its own: after a reboot or a start it is asked for again, and what was listened to
    /// by the one before is no more.
    ///
    /// ```no_run
    /// # fn demo(server: &instance_core::Instance) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::io::Read;
    /// use std::time::{Duration, Instant};
    ///
    /// // In a region that was opened with `RegionOptions::vsock`.
    /// let agent = server.vsock()?.listen(5000)?; // in the guest: socat - VSOCK-CONNECT:2:5000
    /// let mut report = String::new();
    /// agent.accept(Instant::now() + Duration::from_secs(60))?.read_to_string(&mut report)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Unsupported`](ErrorKind::Unsupported) in a region that was opened without [streams](crate::RegionOptions::vsock),
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) for an instance without a machine.
    pub fn vsock(&self) -> Result<Vsock> {
        if !self.region.vsock {
            let what = "the region was opened without streams for its machines";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let live = self.cell.hold(self.region.supervisor.sender());
        let no_machine = || {
            let what = format!("{} is {}, and has no machine", self.id(), live.record.description.state);
            Error::new(ErrorKind::IncorrectInstanceState, what)
        };
        live.vsock.clone().ok_or_else(no_machine)
    }

    /// The AMI that it was made from, if that is still registered.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what reading the state store met.
    pub fn image(&self) -> Result<AnyAmi> {
        Ok(self.region.image(self.describe().image_id)?.image.ami().clone())
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("id", &self.id())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// What all handles of an instance share.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) id: InstanceId,
    pub(crate) owner: AccountId,
    pub(crate) console: Console,
    pub(crate) description: Publisher<InstanceDescription>,
    live: Mutex<Live>,
    /// What is known of its machine, for status checks, which wait for nothing that is done to it.
    boot: Mutex<Option<Boot>>,
    /// When it was terminated, if it was.
    terminated: Mutex<Option<Instant>>,
}

/// What changes, under the lock that every action on the instance holds.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) record: InstanceRecord,
    /// The machine, before the volumes: it is dropped first.
    pub(crate) machine: Option<Box<dyn Machine>>,
    /// Its volumes while it has a machine, in the order of its attachments.
    pub(crate) volumes: Vec<Volume>,
    /// What holds its machine's disks to the bandwidth of its type.
    pub(crate) limiters: Vec<Limiter>,
    /// Its instance store while it runs, under the names of the disks.
    pub(crate) instance_store: Vec<DiskSpec>,
    /// The host's end of its machine's streams, if it has a place for them.
    pub(crate) vsock: Option<Vsock>,
    /// What it takes of the host while it has a machine.
    pub(crate) claim: Option<Claim>,
    /// Counts its machines, so that the end of an earlier one is not taken for the end of this.
    pub(crate) generation: u64,
}

impl Cell {
    pub(crate) fn new(record: InstanceRecord) -> Self {
        let description = record.description.clone();
        Self {
            id: description.id,
            owner: description.owner,
            console: Console::new(),
            description: Publisher::new(description),
            live: Mutex::new(Live {
                record,
                machine: None,
                volumes: Vec::new(),
                limiters: Vec::new(),
                instance_store: Vec::new(),
                vsock: None,
                claim: None,
                generation: 0,
            }),
            boot: Mutex::new(None),
            terminated: Mutex::new(None),
        }
    }

    pub(crate) fn boot(&self) -> MutexGuard<'_, Option<Boot>> {
        self.boot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn terminated(&self) -> Option<Instant> {
        *self.terminated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_terminated(&self, at: Instant) {
        *self.terminated.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// Waits for whatever else is done to the instance, then holds it.
    pub(crate) fn hold(&self, ended: Sender<Message>) -> Hold<'_> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        Hold { id: self.id, live: Some(live), ended }
    }

    /// Holds the instance if nothing else is done to it.
    pub(crate) fn try_hold(&self, ended: Sender<Message>) -> Option<Hold<'_>> {
        let live = match self.live.try_lock() {
            Ok(live) => live,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Hold { id: self.id, live: Some(live), ended })
    }

    /// Lets go of machine and volumes, when the region is closed.
    pub(crate) fn release(&self) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = live.end_machine() {
            tracing::error!(instance = %self.id, error = chain(&e), "what an instance had written is lost");
        }
        live.volumes.clear();
    }
}

impl Live {
    /// The record in the next state.
    pub(crate) fn after(&self, by: Transition, reason: Option<StateReason>) -> Result<InstanceRecord> {
        let mut record = self.record.clone();
        let description = &mut record.description;
        let now = description.state;
        description.state = now.after(by).ok_or_else(|| {
            let what = format!("{} is {now}, from which it cannot be {}", description.id, words(by));
            Error::new(ErrorKind::IncorrectInstanceState, what)
        })?;
        description.state_reason = reason;
        // Once its guest goes on, or it ends, what was saved is of no more use.
        if matches!(by, Transition::Started | Transition::Terminate) {
            record.saved = None;
        }
        Ok(record)
    }

    /// Ends the machine and makes durable what its guest has written: a guest is told that a write
    /// is done when the volume has it, and no end of its machine takes that back.
    pub(crate) fn end_machine(&mut self) -> Result<()> {
        self.end_machine_of(|_| true)?;
        self.record.launched = true;
        Ok(())
    }

    /// Makes the volumes durable that its launch made, unless they are known to be.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if !self.record.launched {
            let synced = self.volumes.iter().try_for_each(Volume::sync_created);
            synced.map_err(|e| Error::storage(e, "cannot make a volume durable"))?;
            self.record.launched = true;
        }
        Ok(())
    }

    /// The same for some of the volumes.
    pub(crate) fn end_machine_of(&mut self, keep: impl Fn(&Attachment) -> bool) -> Result<()> {
        self.machine = None;
        let volumes = self.record.description.attachments.iter().zip(&self.volumes);
        let flushed = volumes.filter(|(a, _)| keep(a)).map(|(_, volume)| volume.disk().flush());
        flushed.collect::<Result<(), _>>().map_err(|e| Error::storage(e, "cannot flush a volume"))
    }
}

fn words(by: Transition) -> &'static str {
    match by {
        Transition::Start => "started",
        Transition::Stop => "stopped",
        Transition::Terminate => "terminated",
        _ => "moved on",
    }
}

/// The right to act on an instance.
///
/// While it is held the supervisor leaves the instance alone, so a machine that ends meanwhile is
/// reported again when the hold is given up, as is one whose volumes are not known to be durable.
pub(crate) struct Hold<'a> {
    id: InstanceId,
    live: Option<MutexGuard<'a, Live>>,
    ended: Sender<Message>,
}

impl std::ops::Deref for Hold<'_> {
    type Target = Live;

    fn deref(&self) -> &Live {
        match &self.live {
            Some(live) => live,
            None => unreachable!("only dropping takes the guard"),
        }
    }
}

impl std::ops::DerefMut for Hold<'_> {
    fn deref_mut(&mut self) -> &mut Live {
        match &mut self.live {
            Some(live) => live,
            None => unreachable!("only dropping takes the guard"),
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let watched = self.machine.as_ref().map(|m| (m.state(), self.generation));
        let unsettled = !self.record.launched && !self.volumes.is_empty();
        self.live = None;
        if unsettled {
            let _ = self.ended.send(Message::Launched(self.id));
        }
        // Looked at only after the lock is free: an end after this look finds the supervisor able
        // to act on it.
        if let Some((state, generation)) = watched {
            if state.get().exit_cause().is_some() {
                let _ = self.ended.send(Message::Ended(self.id, generation));
            }
        }
    }
}

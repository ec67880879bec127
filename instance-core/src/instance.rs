//! An instance: the handle that users hold.

mod cell;

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ami_core::{AnyAmi, InstanceId};

pub(crate) use self::cell::{Cell, Hold, Live, PowerOffFor};
use crate::console::Console;
use crate::description::InstanceDescription;
use crate::region::Owner;
use crate::vsock::Vsock;
use crate::watch::Watch;
use crate::{Error, ErrorKind, InstanceState, Result};

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

    /// For who goes on with it in another thread.
    pub(crate) fn shared_cell(&self) -> Arc<Cell> {
        self.cell.clone()
    }

    /// Its id.
    pub fn id(&self) -> InstanceId {
        self.cell.id
    }

    /// Its state now.
    pub fn state(&self) -> InstanceState {
        self.cell.description.get().state
    }

    /// All that is known of it.
    pub fn describe(&self) -> InstanceDescription {
        let description = Arc::unwrap_or_clone(self.cell.description.get());
        description.with_groups_of(self.region.network.as_deref())
    }

    /// Its description, to wait for: by blocking with a deadline or as a future.
    pub fn watch(&self) -> Watch<Arc<InstanceDescription>> {
        self.cell.description.watch()
    }

    /// Blocks until it is in `state`.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) if it is in another one at the
    /// deadline, or, at once, in one from which it does not come into `state` any more: that says why it is in it.
    pub fn wait_for(&self, state: InstanceState, deadline: Instant) -> Result<()> {
        let what = match self.watch().wait(deadline, |d| d.state == state || !d.state.leads_to(state)) {
            Ok(d) if d.state == state => return Ok(()),
            Ok(d) => {
                let why = d.state_reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
                format!("{} is {}{why}, and does not become {state} any more", d.id, d.state)
            }
            Err(d) => format!("{} is {}, not {state}, at the deadline", d.id, d.state),
        };
        Err(Error::new(ErrorKind::IncorrectInstanceState, what))
    }

    /// Its serial console. It stays the same over stops and reboots.
    pub fn console(&self) -> Console {
        self.cell.console.clone()
    }

    /// The public address of the host's by which others reach it, if it has one now: one that it has
    /// [while it runs](crate::LaunchSpec::associate_public_ip_address), or one that stays, which its network has it reached by.
    /// One that is terminated has none, whatever leads to an interface that it had.
    pub fn public_ip(&self) -> Option<Ipv4Addr> {
        let description = self.describe();
        if description.state == InstanceState::Terminated {
            return None;
        }
        self.region.network.as_deref()?.public_ip(description.network.as_ref()?)
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
    /// being stopped, [`Unsupported`](ErrorKind::Unsupported) for one whose root device is instance store, or what the
    /// host met.
    pub fn stop(&self, patience: Duration) -> Result<()> {
        self.region.stop(&self.cell, patience)
    }

    /// Starts it again, from its root volume as it is now, or where it [hibernated](Self::hibernate). Does nothing to
    /// one that runs. If what it had saved is of no use here, it boots, and the reason of its state says so; where the
    /// host alone fails, what it had saved is kept.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) unless it is stopped, and while its root volume is
    /// detached;
    /// [`Unsupported`](ErrorKind::Unsupported) for one whose root device is instance store;
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity) if the host cannot hold it now;
    /// [`InsufficientAddressCapacity`](ErrorKind::InsufficientAddressCapacity) if no public address is left for it;
    /// [`NotBootable`](ErrorKind::NotBootable) if its root volume no longer holds a kernel, after
    /// which it is stopped again; or what the host met.
    pub fn start(&self) -> Result<()> {
        self.region.start(&self.cell).map_err(Error::of_instance)
    }

    /// Resets it: its machine ends at once and a new one boots from the root volume. What the guest
    /// had not written to its disks is lost.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start), but the instance must be running, whatever its root device is, and have its machine: where
    /// one was lost and that could not be written down, it is to be started. It is stopped if no new machine can be made, or
    /// terminated where its root device is instance store.
    pub fn reboot(&self) -> Result<()> {
        self.reboot_within(Duration::ZERO)
    }

    /// Reboots it as EC2 does (`RebootInstances`): the guest is asked to power itself off, which a server does in order, and
    /// what has not ended within `patience` is reset like by [`reboot`](Self::reboot). It is `running` all the while.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, InstanceState, LaunchSpec, Region};
    /// # use std::time::Duration;
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// server.reboot_within(Duration::from_secs(240))?; // as long as EC2 waits
    /// assert_eq!(server.state(), InstanceState::Running);
    /// server.terminate_within(Duration::from_secs(60))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`reboot`](Self::reboot), also if it is stopped or terminated meanwhile.
    pub fn reboot_within(&self, patience: Duration) -> Result<()> {
        self.region.reboot(&self.cell, patience).map_err(Error::of_instance)
    }

    /// Terminates it: its machine ends at once, and the volumes that go with it are removed. Does
    /// nothing to one that is terminated.
    ///
    /// # Errors
    ///
    /// [`OperationNotPermitted`](ErrorKind::OperationNotPermitted) if it is protected against being terminated
    /// or stopped, or what the host met.
    pub fn terminate(&self) -> Result<()> {
        self.region.terminate(&self.cell, Duration::ZERO)
    }

    /// The same, but its guest is asked to power itself off first, and has `patience` for that: a volume that is kept then
    /// has all that the guest had in mind for it.
    ///
    /// # Errors
    ///
    /// As [`terminate`](Self::terminate).
    pub fn terminate_within(&self, patience: Duration) -> Result<()> {
        self.region.terminate(&self.cell, patience)
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
    /// and for a machine that was saved without them and has not booted since;
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) for an instance without a machine.
    pub fn vsock(&self) -> Result<Vsock> {
        if !self.region.vsock {
            let what = "the region was opened without streams for its machines";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let live = self.cell.hold(self.region.supervisor.reports());
        live.vsock.clone().ok_or_else(|| match live.machine {
            Some(_) => {
                let what = format!("the machine of {} was saved without streams; reboot it", self.id());
                Error::new(ErrorKind::Unsupported, what)
            }
            None => {
                let what = format!("{} is {}, and has no machine", self.id(), live.record.description.state);
                Error::new(ErrorKind::IncorrectInstanceState, what)
            }
        })
    }

    /// The AMI that it was made from, if that is still registered.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what reading the state store met.
    pub fn image(&self) -> Result<AnyAmi> {
        Ok(self.region.image(self.cell.description.get().image_id)?.image.ami().clone())
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

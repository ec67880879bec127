//! Status checks: whether an instance's machine is there, and whether its guest has been heard of
//! (`DescribeInstanceStatus`).
//!
//! What is checked is what is known without asking the guest anything: how its machine is, and what it has written to
//! its console since that machine began. [`InstanceStatus`] says what follows from it, by a pure function.

mod describe;

use std::time::{Duration, Instant};

use ami_core::{InstanceId, Timestamp};
use event_listener::Listener;

pub use self::describe::DescribeInstanceStatus;
use crate::instance::Cell;
use crate::machine::{ExitCause, MachineState};
use crate::watch::Watch;
use crate::{Error, ErrorKind, Instance, InstanceState, Result};

/// How long a guest may be silent before that says that nothing is known of it.
const SILENCE: Duration = Duration::from_secs(5 * 60);

/// What Linux writes before it stands still.
const PANIC: &str = "Kernel panic - not syncing";

/// What a check came to (`SummaryStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// It is well.
    Ok,
    /// It is not.
    Impaired,
    /// It has begun, and will be known soon.
    Initializing,
    /// Nothing is known.
    InsufficientData,
    /// There is nothing to check.
    NotApplicable,
}

impl Status {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Impaired => "impaired",
            Self::Initializing => "initializing",
            Self::InsufficientData => "insufficient-data",
            Self::NotApplicable => "not-applicable",
        }
    }

    /// What EC2 says of the one check that it has, `reachability`; nothing where there is nothing to check.
    pub const fn reachability(self) -> Option<&'static str> {
        match self {
            Self::Ok => Some("passed"),
            Self::Impaired => Some("failed"),
            Self::Initializing => Some("initializing"),
            Self::InsufficientData => Some("insufficient-data"),
            Self::NotApplicable => None,
        }
    }
}

/// What the status checks of an instance say.
///
/// | State | Machine | Console since it began | System | Instance |
/// |---|---|---|---|---|
/// | pending | | | initializing | initializing |
/// | running | being made again | | initializing | initializing |
/// | running | there | nothing yet | ok | initializing |
/// | running | there | nothing for five minutes | ok | insufficient-data |
/// | running | there, woken from hibernation | nothing yet | ok | ok |
/// | running | there | something | ok | ok |
/// | running | there | a kernel panic of Linux's | ok | impaired |
/// | running | the guest has ended it | | ok | insufficient-data |
/// | running | the guest has crashed it | | ok | impaired |
/// | running | it has failed | | impaired | insufficient-data |
/// | other | | | not-applicable | not-applicable |
///
/// A guest that says nothing on its console is not known to be well, however well it is; and one that writes of a panic
/// is taken at its word. Nothing is sent to it.
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
/// use std::time::{Duration, Instant};
/// use instance_core::{DescribeInstanceStatus, Status};
///
/// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// server.wait_until_status_ok(Instant::now() + Duration::from_secs(60))?;
/// assert_eq!((server.status().system, server.status().instance), (Status::Ok, Status::Ok));
/// server.stop(Duration::from_secs(60))?;
/// let running = region.describe_instance_status(&DescribeInstanceStatus::new())?;
/// assert!(running.items.is_empty(), "only those that run, unless all are asked for");
/// let all = region.describe_instance_status(&DescribeInstanceStatus::new().include_all_instances(true))?;
/// assert_eq!(all.items[0].instance, Status::NotApplicable);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InstanceStatus {
    /// Whose.
    pub instance_id: InstanceId,
    /// Its state.
    pub state: InstanceState,
    /// Whether its machine is there (`SystemStatus`).
    pub system: Status,
    /// Whether its guest has been heard of and stands (`InstanceStatus`).
    pub instance: Status,
    /// Since when a check has been seen to fail, if one has.
    pub impaired_since: Option<Timestamp>,
}

/// What is known of an instance's machine.
#[derive(Debug)]
pub(crate) struct Boot {
    /// How it is, once it has been made.
    pub(crate) machine: Option<Watch<MachineState>>,
    begun: Instant,
    /// How much had been written to the console before.
    mark: u64,
    /// It went on where it hibernated, and had been heard of before.
    woken: bool,
    impaired_since: Option<Timestamp>,
}

/// What a status follows from.
#[derive(Debug, Clone)]
struct Facts {
    state: InstanceState,
    machine: Option<MachineState>,
    silent_for: Option<Duration>,
    panicked: bool,
}

fn assess(facts: &Facts) -> (Status, Status) {
    use Status::{Impaired, Initializing, InsufficientData, NotApplicable, Ok};
    match (facts.state, &facts.machine) {
        (InstanceState::Pending, _) | (InstanceState::Running, None) => (Initializing, Initializing),
        (InstanceState::Running, Some(MachineState::Exited(ExitCause::PowerOff | ExitCause::Reset))) => {
            (Ok, InsufficientData)
        }
        (InstanceState::Running, Some(MachineState::Exited(cause))) if cause.is_guest_crash() => {
            (Ok, Impaired)
        }
        (InstanceState::Running, Some(MachineState::Exited(_))) => (Impaired, InsufficientData),
        (InstanceState::Running, Some(_)) => match facts.silent_for {
            _ if facts.panicked => (Ok, Impaired),
            None => (Ok, Ok),
            Some(time) if time < SILENCE => (Ok, Initializing),
            Some(_) => (Ok, InsufficientData),
        },
        _ => (NotApplicable, NotApplicable),
    }
}

impl Cell {
    /// A machine is about to be made: what was known of the one before is of no more use.
    pub(crate) fn begin_boot(&self) {
        let (begun, mark) = (Instant::now(), self.console.written());
        *self.boot() = Some(Boot { machine: None, begun, mark, woken: false, impaired_since: None });
    }

    /// A machine goes on that was there before: nobody waits for its guest to be up.
    pub(crate) fn woken(&self, machine: Watch<MachineState>) {
        self.begin_boot();
        if let Some(boot) = &mut *self.boot() {
            boot.woken = true;
        }
        self.booted(machine);
    }

    /// It is there.
    pub(crate) fn booted(&self, machine: Watch<MachineState>) {
        if let Some(boot) = &mut *self.boot() {
            boot.machine = Some(machine);
        }
        self.console.wake_readers();
    }

    fn status(&self) -> InstanceStatus {
        self.status_at(Instant::now())
    }

    fn status_at(&self, now: Instant) -> InstanceStatus {
        let state = self.description.get().state;
        let mut boot = self.boot();
        let facts = Facts {
            state,
            machine: boot.as_ref().and_then(|boot| boot.machine.as_ref()).map(Watch::get),
            silent_for: boot.as_ref().and_then(|boot| {
                (self.console.written() == boot.mark && !boot.woken)
                    .then(|| now.saturating_duration_since(boot.begun))
            }),
            panicked: boot.as_ref().is_some_and(|boot| self.console.has_written(PANIC, boot.mark)),
        };
        let (system, instance) = assess(&facts);
        let fails = [system, instance].contains(&Status::Impaired);
        let impaired_since = boot.as_mut().and_then(|boot| {
            boot.impaired_since = fails.then(|| boot.impaired_since.unwrap_or_else(Timestamp::now));
            boot.impaired_since
        });
        InstanceStatus { instance_id: self.id, state, system, instance, impaired_since }
    }

    /// When a guest that stays silent is no longer waited for.
    fn end_of_silence(&self) -> Option<Instant> {
        let end = self.boot().as_ref()?.begun + SILENCE;
        (end > Instant::now()).then_some(end)
    }
}

impl Instance {
    /// What its status checks say now.
    pub fn status(&self) -> InstanceStatus {
        self.parts().1.status()
    }

    /// Blocks until `found` holds of what its status checks say, and gives that; or what they say at the deadline.
    ///
    /// # Errors
    ///
    /// What they say at the deadline, if `found` does not hold of that.
    pub fn wait_for_status(
        &self,
        deadline: Instant,
        mut found: impl FnMut(&InstanceStatus) -> bool,
    ) -> Result<InstanceStatus, InstanceStatus> {
        let cell = self.parts().1;
        loop {
            let news = cell.console.news();
            let status = cell.status();
            if found(&status) {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(status);
            }
            let until = cell.end_of_silence().map_or(deadline, |end| end.min(deadline));
            news.wait_deadline(until);
        }
    }

    /// The same as a future of no particular runtime. It does not end by itself when a guest has been silent for too
    /// long: that is time's news, which a future that has no timer is not told.
    pub async fn until_status(&self, mut found: impl FnMut(&InstanceStatus) -> bool) -> InstanceStatus {
        let cell = self.parts().1;
        loop {
            let news = cell.console.news();
            let status = cell.status();
            if found(&status) {
                return status;
            }
            news.await;
        }
    }

    /// Blocks until both its checks are ok (the waiters `InstanceStatusOk` and `SystemStatusOk`).
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) if they are not at the deadline, or before it if it
    /// is neither pending nor running.
    pub fn wait_until_status_ok(&self, deadline: Instant) -> Result<()> {
        let is_ok = |status: &InstanceStatus| (status.system, status.instance) == (Status::Ok, Status::Ok);
        let never = |status: &InstanceStatus| status.system == Status::NotApplicable;
        let status = match self.wait_for_status(deadline, |status| is_ok(status) || never(status)) {
            Ok(status) if is_ok(&status) => return Ok(()),
            Ok(status) | Err(status) => status,
        };
        let InstanceStatus { instance_id, state, system, instance, .. } = status;
        let (system, instance) = (system.as_str(), instance.as_str());
        let what = format!("{instance_id} is {state}; its system is {system} and its instance {instance}");
        Err(Error::new(ErrorKind::IncorrectInstanceState, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeHypervisor, tiny_elf};
    use crate::{DirectBoot, ImageSource, LaunchSpec, Region};
    use ami_core::{Ami, X86_64};

    #[test]
    fn the_table_of_the_documentation() {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        let running = Some(MachineState::Running);
        let exited = |cause| Some(MachineState::Exited(cause));
        let off = exited(ExitCause::PowerOff);
        let (soon, late) = (Some(SILENCE - Duration::from_millis(1)), Some(SILENCE));
        let table = [
            (Pending, None, soon, false, "initializing", "initializing"),
            (Running, None, soon, false, "initializing", "initializing"),
            (Running, running.clone(), soon, false, "ok", "initializing"),
            (Running, running.clone(), late, false, "ok", "insufficient-data"),
            (Running, running.clone(), None, false, "ok", "ok"),
            (Running, Some(MachineState::Paused), None, false, "ok", "ok"),
            (Running, running.clone(), None, true, "ok", "impaired"),
            (Running, off.clone(), None, false, "ok", "insufficient-data"),
            (Running, exited(ExitCause::Reset), None, false, "ok", "insufficient-data"),
            (Running, exited(ExitCause::TripleFault(None)), None, false, "ok", "impaired"),
            (Running, exited(ExitCause::Panic), None, false, "ok", "impaired"),
            (Running, exited(ExitCause::Killed), None, true, "impaired", "insufficient-data"),
            (
                Running,
                exited(ExitCause::HostFailure("?".to_owned())),
                soon,
                false,
                "impaired",
                "insufficient-data",
            ),
        ];
        let ended = [Stopping, Stopped, ShuttingDown, Terminated]
            .map(|state| (state, off.clone(), None, true, "not-applicable", "not-applicable"));
        for (state, machine, silent_for, panicked, system, instance) in table.into_iter().chain(ended) {
            let facts = Facts { state, machine, silent_for, panicked };
            let (found_system, found_instance) = assess(&facts);
            assert_eq!((found_system.as_str(), found_instance.as_str()), (system, instance), "{facts:?}");
        }
    }

    #[test]
    fn a_guest_that_panics_is_impaired_until_it_boots_again() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let disk = storage_block::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = region.register_image(Ami::<X86_64>::builder("base"), source).unwrap();
        let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
        let soon = || Instant::now() + Duration::from_secs(20);
        server.wait_until_status_ok(soon()).unwrap();
        let port = server.console().port();
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| server.wait_for_status(soon(), |s| s.instance == Status::Impaired));
            port.write_output(b"[    1.0] Kernel panic - not");
            port.write_output(b" syncing: Attempted to kill init!\n");
            waiting.join().unwrap().unwrap()
        });
        let since = waiting.impaired_since.unwrap();
        assert_eq!(server.status().impaired_since, Some(since), "it is the same failure");
        server.reboot().unwrap();
        server.wait_until_status_ok(soon()).unwrap();
        assert_eq!(server.status().impaired_since, None);

        // One that says nothing is not known to be well, and in the end not known at all.
        let (_, cell) = server.parts();
        cell.begin_boot();
        cell.booted(crate::watch::Publisher::new(MachineState::Running).watch());
        assert_eq!(cell.status().instance, Status::Initializing);
        assert_eq!(cell.status_at(Instant::now() + SILENCE).instance, Status::InsufficientData);
        server.stop(Duration::ZERO).unwrap();
        let refused = server.wait_until_status_ok(soon()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::IncorrectInstanceState);
    }
}

//! The fake machine, whose thread does what its guest does.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::MAX_DISKS;
use super::guest::{FakeGuest, FakePort};
use super::memory::Memory;
use super::streams::FakeStreams;
use crate::console::ConsolePort;
use crate::machine::{
    Detach, DiskSpec, ExitCause, Machine, MachineError, MachineErrorKind, MachineState, NetSpec,
};
use crate::watch::{Publisher, Watch};

/// What wakes the machine's thread.
#[derive(Debug, Default)]
pub(super) struct Signals {
    waiting: Mutex<bool>,
    changed: Condvar,
}

impl Signals {
    pub(super) fn raise(&self) {
        *lock(&self.waiting) = true;
        self.changed.notify_all();
    }

    pub(super) fn wait(&self) {
        let mut waiting = lock(&self.waiting);
        while !*waiting {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting = false;
    }
}

#[derive(Debug)]
pub(super) struct FakeMachine {
    state: Arc<Publisher<MachineState>>,
    signals: Arc<Signals>,
    power_button: Arc<AtomicBool>,
    console: ConsolePort,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Held by the guest while it serves a command, so that pausing waits for it.
    busy: Arc<Mutex<()>>,
    disks: Arc<Mutex<Vec<DiskSpec>>>,
    /// Whether the first disk is one of the specification, and stays.
    has_root: bool,
    memory: Arc<Mutex<Memory>>,
    /// The network ports, until the guest has them.
    nets: Mutex<Vec<NetSpec>>,
    /// The same for streams.
    streams: Mutex<Option<FakeStreams>>,
}

impl FakeMachine {
    pub(super) fn new(
        state: MachineState,
        memory: Memory,
        disks: Vec<DiskSpec>,
        (nets, streams): (Vec<NetSpec>, Option<FakeStreams>),
        console: ConsolePort,
    ) -> Self {
        Self {
            has_root: !disks.is_empty(),
            disks: Arc::new(Mutex::new(disks)),
            state: Arc::new(Publisher::new(state)),
            signals: Arc::default(),
            power_button: Arc::default(),
            console,
            thread: Mutex::new(None),
            busy: Arc::default(),
            memory: Arc::new(Mutex::new(memory)),
            nets: Mutex::new(nets),
            streams: Mutex::new(streams),
        }
    }

    /// Starts the guest's thread, which does what the machine's state says.
    pub(super) fn run_guest(&self) -> Result<(), MachineError> {
        let signals = self.signals.clone();
        self.console.set_input_notifier(Some(Arc::new(move || signals.raise())));
        let nets = std::mem::take(&mut *lock(&self.nets));
        let guest = FakeGuest {
            state: self.state.clone(),
            signals: self.signals.clone(),
            power_button: self.power_button.clone(),
            busy: self.busy.clone(),
            console: self.console.clone(),
            disks: self.disks.clone(),
            memory: self.memory.clone(),
            nets: nets.into_iter().map(FakePort).collect(),
            streams: lock(&self.streams).take(),
        };
        guest.take_up_nets();
        guest.take_up_streams();
        let spawned = std::thread::Builder::new().name("fake-machine".to_owned()).spawn(move || guest.run());
        *lock(&self.thread) = Some(spawned.map_err(|e| {
            MachineError::new(MachineErrorKind::Host, "cannot start the machine's thread").with_source(e)
        })?);
        Ok(())
    }

    fn go(&self, action: &str, from: MachineState, to: MachineState) -> Result<(), MachineError> {
        if self.state.update(|s| {
            *s == from && {
                *s = to;
                true
            }
        }) {
            self.signals.raise();
            Ok(())
        } else {
            Err(MachineError::wrong_state(action, &self.state.get()))
        }
    }
}

impl FakeMachine {
    /// The disks of a machine that is running or paused.
    fn live_disks(&self, action: &str) -> Result<MutexGuard<'_, Vec<DiskSpec>>, MachineError> {
        let disks = lock(&self.disks);
        match self.state.get() {
            MachineState::Running | MachineState::Paused => Ok(disks),
            state => Err(MachineError::wrong_state(action, &state)),
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in `disks` the one with this serial number is.
fn find(disks: &[DiskSpec], serial: &str) -> Result<usize, MachineError> {
    disks.iter().position(|disk| disk.serial == serial).ok_or_else(|| MachineError::no_such_disk(serial))
}

impl Machine for FakeMachine {
    fn state(&self) -> Watch<MachineState> {
        self.state.watch()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.go("start", MachineState::Created, MachineState::Running)?;
        self.run_guest()
    }

    fn pause(&self) -> Result<(), MachineError> {
        let _idle = lock(&self.busy);
        self.go("pause", MachineState::Running, MachineState::Paused)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.go("resume", MachineState::Paused, MachineState::Running)
    }

    fn power_button(&self) -> Result<(), MachineError> {
        if self.state.get() != MachineState::Running {
            return Err(MachineError::wrong_state("press the power button of", &self.state.get()));
        }
        self.power_button.store(true, Ordering::SeqCst);
        self.signals.raise();
        Ok(())
    }

    fn attach_disk(&self, disk: DiskSpec) -> Result<(), MachineError> {
        disk.check()?;
        let mut disks = self.live_disks("attach a disk to")?;
        if find(&disks, &disk.serial).is_ok() {
            return Err(MachineError::disk_exists(&disk.serial));
        }
        if disks.len() >= MAX_DISKS {
            let what = format!("a fake machine has at most {MAX_DISKS} disks");
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        disks.push(disk);
        Ok(())
    }

    fn detach_disk(&self, serial: &str, how: Detach) -> Result<(), MachineError> {
        let action = "detach a disk from";
        loop {
            // A command that the guest serves may use the disk.
            let busy = lock(&self.busy);
            let mut disks = self.live_disks(action)?;
            let n = find(&disks, serial)?;
            if n == 0 && self.has_root {
                let what = format!("disk {serial:?} is the root disk, which stays");
                return Err(MachineError::new(MachineErrorKind::Unsupported, what));
            }
            let until = match how {
                Detach::Ask { until } if self.state.get() == MachineState::Paused => until,
                _ => {
                    disks.remove(n);
                    return Ok(());
                }
            };
            drop((disks, busy));
            if self.state.watch().wait(until, |state| *state != MachineState::Paused).is_err() {
                return Err(MachineError::held(serial));
            }
        }
    }

    fn disk_grown(&self, serial: &str) -> Result<(), MachineError> {
        // The guest asks the disk for its size every time.
        find(&self.live_disks("grow a disk of")?, serial).map(drop)
    }

    fn save(&self, to: &File) -> Result<(), MachineError> {
        let _idle = lock(&self.busy);
        match self.state.get() {
            MachineState::Paused => lock(&self.memory).save(&lock(&self.disks), to),
            state => Err(MachineError::wrong_state("save", &state)),
        }
    }

    fn reset(&self) -> Result<(), MachineError> {
        let reset = self.state.update(|state| {
            let lives = matches!(state, MachineState::Running | MachineState::Paused);
            if lives {
                *state = MachineState::Exited(ExitCause::Reset);
            }
            lives
        });
        if !reset {
            return Err(MachineError::wrong_state("reset", &self.state.get()));
        }
        self.kill();
        Ok(())
    }

    fn kill(&self) {
        exit(&self.state, ExitCause::Killed);
        self.signals.raise();
        if let Some(thread) = lock(&self.thread).take() {
            // A guest that panicked has nothing left to end.
            let _ = thread.join();
        }
        lock(&self.nets).clear();
        *lock(&self.streams) = None;
        lock(&self.disks).clear();
        self.console.set_input_notifier(None);
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(super) fn exit(state: &Publisher<MachineState>, cause: ExitCause) {
    state.update(|s| {
        let alive = s.exit_cause().is_none();
        if alive {
            *s = MachineState::Exited(cause);
        }
        alive
    });
}

//! A machine: a handle to its supervisor.

use std::os::unix::net::UnixStream;
use std::process::{Command as Program, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use instance_core::machine::{ExitCause, Machine, MachineError, MachineErrorKind, MachineSpec, MachineState};
use instance_core::watch::Watch;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::Qemu;
use crate::arguments::{Endpoints, arguments};
use crate::child::Inherited;
use crate::disks::Disks;
use crate::qmp::Command;
use crate::shared::Shared;
use crate::supervisor::{Launch, supervise};

/// A child process and the thread that keeps it.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    name: String,
    shared: Arc<Shared>,
    /// Held while a state change is asked for, so that each finds the state that it was checked against.
    actions: Mutex<()>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    supervisor_id: ThreadId,
}

impl QemuMachine {
    /// Starts the child, with the guest's processors standing still, and returns when it takes commands.
    pub(crate) fn create(qemu: &Qemu, spec: MachineSpec) -> Result<Self, MachineError> {
        let (shared, launch) = prepare(qemu, &spec).map_err(|error| match error {
            Refused::Machine(error) => error,
            Refused::Host(source) => {
                let what = format!("cannot prepare machine {}", spec.name);
                MachineError::new(MachineErrorKind::Host, what).with_source(source)
            }
        })?;
        let (ready, answer) = sync_channel(1);
        let for_supervisor = shared.clone();
        let supervisor = thread::Builder::new()
            .name(thread_name(&spec.name))
            .spawn(move || supervise(launch, &for_supervisor, ready))
            .map_err(|source| {
                MachineError::new(MachineErrorKind::Host, "cannot start a thread").with_source(source)
            })?;
        // Dropped on every way out below, which ends the child and the thread.
        let machine = Self {
            name: spec.name,
            shared,
            actions: Mutex::default(),
            supervisor_id: supervisor.thread().id(),
            supervisor: Mutex::new(Some(supervisor)),
        };
        match answer.recv_timeout(qemu.start_within) {
            Ok(Ok(())) => Ok(machine),
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => {
                machine.kill();
                let late = MachineError::new(
                    MachineErrorKind::Host,
                    format!("QEMU took no commands within {:?}", qemu.start_within),
                );
                // What it said before it was killed.
                Err(match answer.try_recv() {
                    Ok(Err(said)) => late.with_source(said),
                    _ => late,
                })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(MachineError::new(MachineErrorKind::Host, "the thread that keeps QEMU failed"))
            }
        }
    }

    /// Gives `command` if the machine is in one of the states `from`.
    fn act(&self, action: &str, from: &[MachineState], command: Command) -> Result<(), MachineError> {
        let _one_at_a_time = lock(&self.actions);
        let state = self.shared.state.get();
        if !from.contains(&state) {
            return Err(MachineError::wrong_state(action, &state));
        }
        if command == Command::Stop && self.shared.is_pending(command) {
            let what = "QEMU has not answered the last `stop` yet";
            return Err(MachineError::new(MachineErrorKind::Host, what));
        }
        tracing::debug!(machine = %self.name, action);
        self.shared.execute(action, command)
    }
}

impl Machine for QemuMachine {
    fn state(&self) -> Watch<MachineState> {
        self.shared.state.watch()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.act("start", &[MachineState::Created], Command::Continue)
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.act("pause", &[MachineState::Running], Command::Stop)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.act("resume", &[MachineState::Paused], Command::Continue)
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.act("press the power button of", &[MachineState::Running], Command::Powerdown)
    }

    fn kill(&self) {
        self.shared.kill();
        // A watcher's hook runs in the supervisor, which cannot wait for itself.
        if thread::current().id() == self.supervisor_id {
            return;
        }
        // Held while joining, so that whoever else kills waits as well.
        let mut supervisor = lock(&self.supervisor);
        let panicked = supervisor.take().is_some_and(|thread| thread.join().is_err());
        if panicked {
            // A watcher's hook panicked in it. Its child went with it.
            let cause = ExitCause::HostFailure("the thread that keeps QEMU panicked".to_owned());
            self.shared.state.update(|state| {
                let ended = state.exit_cause().is_some();
                if !ended {
                    *state = MachineState::Exited(cause);
                }
                !ended
            });
        }
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

enum Refused {
    Machine(MachineError),
    Host(std::io::Error),
}

impl From<std::io::Error> for Refused {
    fn from(source: std::io::Error) -> Self {
        Self::Host(source)
    }
}

impl From<rustix::io::Errno> for Refused {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Host(errno.into())
    }
}

/// Everything that the child needs, on both sides.
fn prepare(qemu: &Qemu, spec: &MachineSpec) -> Result<(Arc<Shared>, Launch), Refused> {
    let (control, qmp) = socket_pair()?;
    let (console, serial) = socket_pair()?;
    let (log, log_end) = pipe_with(PipeFlags::CLOEXEC)?;
    let kernel = Inherited::new(spec.boot.kernel.file())?;
    let initrd = spec.boot.initrd.as_ref().map(|file| Inherited::new(file.file())).transpose()?;
    let log_end = Inherited::new(log_end)?;
    let (disks, connections) = Disks::serve(&spec.disks, &spec.runtime_dir).map_err(Refused::Machine)?;

    let endpoints = Endpoints {
        qmp: qmp.number(),
        console: serial.number(),
        log: log_end.path(),
        kernel: kernel.path(),
        initrd: initrd.as_ref().map(Inherited::path),
        disks: connections.iter().map(Inherited::number).collect(),
    };
    let mut program = Program::new(&qemu.program);
    program
        .args(arguments(spec, qemu.accelerator, qemu.sandbox, &endpoints))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let inherited = [qmp, serial, log_end, kernel].into_iter().chain(initrd).chain(connections).collect();
    let port = spec.console.clone();
    let shared = Shared::new(control, qemu.answer_within)?;
    Ok((Arc::new(shared), Launch { program, inherited, console, log, port, disks }))
}

/// A connection: our end, and the child's.
fn socket_pair() -> std::io::Result<(UnixStream, Inherited)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours, Inherited::new(theirs)?))
}

/// At most the 15 bytes that the kernel keeps of a thread's name.
fn thread_name(machine: &str) -> String {
    let id: String = machine.chars().filter(char::is_ascii_graphic).take(10).collect();
    format!("qemu-{id}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a QEMU may take until it takes commands, unless told otherwise.
pub(crate) const START_WITHIN: Duration = Duration::from_secs(30);

/// How long an answer may take, unless told otherwise. Only `stop` takes its time: it waits for the disks.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(30);

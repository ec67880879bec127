//! A machine: a handle to its supervisor.

use std::os::unix::net::UnixStream;
use std::process::{Command as Program, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use instance_core::machine::{
    Detach, DiskSpec, ExitCause, Machine, MachineError, MachineErrorKind, MachineSpec, MachineState,
};
use instance_core::watch::Watch;
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::json;

use crate::Qemu;
use crate::arguments::{Endpoints, arguments, blockdev, connection as connection_node, device, raw};
use crate::child::Inherited;
use crate::disks::{Disks, Name};
use crate::nets::Nets;
use crate::qmp::Command;
use crate::shared::Shared;
use crate::supervisor::{Launch, supervise};

/// A child process and the thread that keeps it.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    name: String,
    shared: Arc<Shared>,
    disks: Arc<Disks>,
    /// Held while a disk is plugged in, asked for or grown, so that each is in one state.
    plugging: Mutex<()>,
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
        let disks = launch.disks.clone();
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
            disks,
            plugging: Mutex::default(),
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

impl QemuMachine {
    /// Checks that disks may come and go. Until the guard is dropped no other does.
    fn begin_plugging(&self, action: &str) -> Result<MutexGuard<'_, ()>, MachineError> {
        let guard = lock(&self.plugging);
        match self.shared.state.get() {
            MachineState::Running | MachineState::Paused => {}
            state => return Err(MachineError::wrong_state(action, &state)),
        }
        tracing::debug!(machine = %self.name, action);
        Ok(guard)
    }

    /// Gives QEMU a connection under the name of its node.
    fn give_fd(&self, action: &str, node: &str, connection: UnixStream) -> Result<(), MachineError> {
        self.shared.execute(action, (Command::GetFd, json!({ "fdname": node }), connection.into()))
    }

    fn plug(&self, name: Name, disk: &DiskSpec, connection: UnixStream) -> Result<(), MachineError> {
        let action = "attach a disk to";
        let (node, read_only) = (name.connection(), disk.disk.read_only());
        self.give_fd(action, &node, connection)?;
        self.shared.execute(action, (Command::BlockdevAdd, blockdev(name, read_only, &node)))?;
        self.shared.execute(action, (Command::DeviceAdd, device(name, &disk.serial))).inspect_err(|_| {
            // Fails where the machine has ended, and the node with it.
            let _ = self.shared.send((Command::BlockdevDel, json!({ "node-name": name.device() })), None);
        })
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

    fn attach_disk(&self, disk: DiskSpec) -> Result<(), MachineError> {
        disk.check()?;
        let _one_at_a_time = self.begin_plugging("attach a disk to")?;
        let (name, connection) = self.disks.add(&disk)?;
        let plugged = self.plug(name, &disk, connection);
        if plugged.is_err() {
            self.disks.gone(&name.device());
        }
        plugged
    }

    fn detach_disk(&self, serial: &str, how: Detach) -> Result<(), MachineError> {
        let action = "detach a disk from";
        let plugging = self.begin_plugging(action)?;
        let found = self.disks.find(serial)?;
        let name = found.name;
        if name.slot.is_none() {
            let what = format!("disk {serial:?} is the root disk, which stays");
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        if how == Detach::Force {
            drop(found.disk);
            self.disks.sever(name);
        }
        let asked = self.shared.execute(action, (Command::DeviceDel, json!({ "id": name.device() })));
        match asked {
            // It has been asked already, and QEMU does not ask twice within some seconds; or has let go now.
            Err(error) if found.asked && error.kind() == MachineErrorKind::Host => {}
            asked => asked?,
        }
        self.disks.asked(name);
        drop(plugging);
        let Detach::Ask { until } = how else { return Ok(()) };
        match self.disks.wait_until_gone(name, until)? {
            true => Ok(()),
            false => Err(MachineError::held(serial)),
        }
    }

    fn disk_grown(&self, serial: &str) -> Result<(), MachineError> {
        let action = "grow a disk of";
        let _one_at_a_time = self.begin_plugging(action)?;
        let found = self.disks.find(serial)?;
        let (name, server, connection) = self.disks.connect_again(&found)?;
        let (node, read_only) = (name.connection(), found.disk.read_only());
        self.give_fd(action, &node, connection)?;
        self.shared.execute(action, (Command::BlockdevAdd, connection_node(name, read_only, &node)))?;
        let options = json!({ "options": [raw(name, read_only, node.clone().into())] });
        if let Err(error) = self.shared.execute(action, (Command::BlockdevReopen, options)) {
            // Fails only where QEMU did it after all, too late; then the connection stays without a server.
            let _ = self.shared.execute(action, (Command::BlockdevDel, json!({ "node-name": node })));
            return Err(error);
        }
        let size = found.disk.size();
        self.disks.switch(name, found.disk, server);
        // Of the first connection's node nothing is left; a later one has to be removed.
        let before = found.name.connection();
        let _ = self.shared.execute(action, (Command::BlockdevDel, json!({ "node-name": before })));
        let resize = json!({ "node-name": name.device(), "size": size });
        self.shared.execute(action, (Command::BlockResize, resize))
    }

    fn reset(&self) -> Result<(), MachineError> {
        let wrong_state = |state: &MachineState| MachineError::wrong_state("reset", state);
        match self.shared.state.get() {
            MachineState::Running | MachineState::Paused => self.end(ExitCause::Reset),
            state => return Err(wrong_state(&state)),
        }
        // The guest may have been faster, by its own end. Of a hook's call nothing has come yet.
        match self.shared.state.get() {
            state @ MachineState::Exited(_) if state.exit_cause() != Some(&ExitCause::Reset) => {
                Err(wrong_state(&state))
            }
            _ => Ok(()),
        }
    }

    fn kill(&self) {
        self.end(ExitCause::Killed);
    }
}

impl QemuMachine {
    /// Ends the child and gives back its thread; the first cause stays.
    fn end(&self, cause: ExitCause) {
        self.shared.end(cause);
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
    let (nets, ports) = Nets::plug(&spec.nets, &spec.name)?;
    let (disks, connections) = Disks::serve(&spec.disks, &spec.runtime_dir).map_err(Refused::Machine)?;

    let endpoints = Endpoints {
        qmp: qmp.number(),
        console: serial.number(),
        log: log_end.path(),
        kernel: kernel.path(),
        initrd: initrd.as_ref().map(Inherited::path),
        disks: connections.iter().map(|(name, fd)| (*name, fd.number())).collect(),
        nets: ports.iter().map(Inherited::number).collect(),
    };
    let mut program = Program::new(&qemu.program);
    program
        .args(arguments(spec, qemu.accelerator, qemu.sandbox, &endpoints))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let inherited = [qmp, serial, log_end, kernel].into_iter().chain(initrd);
    let inherited = inherited.chain(connections.into_iter().map(|(_, fd)| fd)).chain(ports).collect();
    let port = spec.console.clone();
    let shared = Shared::new(control, qemu.answer_within)?;
    Ok((Arc::new(shared), Launch { program, inherited, console, log, port, disks: Arc::new(disks), nets }))
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

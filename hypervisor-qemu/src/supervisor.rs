//! The one thread of a machine: it starts the child, listens to it, and reaps it.
//!
//! It must start the child itself, because the kernel ties the child's death to the thread that forked
//! it. It blocks nowhere but in `poll`, and where a disk that has gone is closed, which nobody uses any more.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command as Program, ExitStatus};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use instance_core::console::ConsolePort;
use instance_core::machine::{MachineError, MachineErrorKind, MachineState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::json;

use crate::child::{Inherited, Process};
use crate::disks::Disks;
use crate::exit::Evidence;
use crate::nets::Nets;
use crate::qmp::{Command, Decoder, Message};
use crate::shared::{Answer, Request, Shared};

/// How long QEMU may take from saying that it ends, or from falling silent, until it has ended.
const EXIT_WITHIN: Duration = Duration::from_secs(5);

/// How much is read from a descriptor at a time.
const CHUNK: usize = 16 * 1024;

/// How many chunks are read from each descriptor of a child that has ended, in case something else
/// holds the other end and goes on writing.
const LAST_CHUNKS: usize = 64;

/// Everything that a child is started with.
pub(crate) struct Launch {
    pub(crate) program: Program,
    pub(crate) inherited: Vec<Inherited>,
    /// Our ends.
    pub(crate) console: UnixStream,
    pub(crate) log: OwnedFd,
    pub(crate) port: ConsolePort,
    /// Serves the disks; closed when the child is gone.
    pub(crate) disks: Arc<Disks>,
    /// Carries frames; dropped when the child is gone.
    pub(crate) nets: Nets,
}

/// The life of a machine, from start to end of its child. Tells `ready` when QEMU takes commands, or
/// why it does not.
pub(crate) fn supervise(launch: Launch, shared: &Arc<Shared>, ready: SyncSender<Result<(), MachineError>>) {
    let Launch { program, inherited, console, log, port, disks, nets } = launch;
    let started = Process::spawn(program, inherited).and_then(|mut process| {
        let pidfd = pidfd_open(process.pid()?, PidfdFlags::empty())?;
        let stderr = process.take_stderr();
        Ok((process, pidfd, stderr))
    });
    let (mut process, pidfd, stderr) = match started {
        Ok(started) => started,
        Err(source) => {
            disks.close();
            shared.close();
            let kind = match source.kind() {
                io::ErrorKind::NotFound => MachineErrorKind::Missing,
                _ => MachineErrorKind::Host,
            };
            let error = MachineError::new(kind, "cannot start QEMU").with_source(source);
            // Whoever waited may have given up.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let mut supervisor = Supervisor {
        shared: shared.clone(),
        disks: disks.clone(),
        port,
        control: Some(Decoder::default()),
        console: Some(console),
        log: Some(log),
        stderr,
        typed: Vec::new(),
        attached: false,
        evidence: Evidence::default(),
        ready: Some(ready),
        end_by: None,
        suspicion: None,
    };
    supervisor.listen_until_the_end(&mut process, &pidfd);
    let status = process.wait().ok();
    supervisor.read_what_is_left();
    // Returns when no request is under way any more.
    disks.close();
    drop(nets);
    supervisor.finish(status);
}

/// What there is to listen to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Exit,
    Wake,
    Control,
    Console,
    Stderr,
    Log,
}

struct Supervisor {
    shared: Arc<Shared>,
    disks: Arc<Disks>,
    port: ConsolePort,
    /// Decodes the QMP socket, until QEMU closes it.
    control: Option<Decoder>,
    console: Option<UnixStream>,
    log: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Console input that QEMU has not taken.
    typed: Vec<u8>,
    /// Whether the console's notifier is ours.
    attached: bool,
    evidence: Evidence,
    /// Whoever waits for QEMU to take commands.
    ready: Option<SyncSender<Result<(), MachineError>>>,
    /// When QEMU is killed if it has not ended.
    end_by: Option<Instant>,
    /// What it is then killed for.
    suspicion: Option<String>,
}

impl Supervisor {
    /// Serves the child until it has ended.
    fn listen_until_the_end(&mut self, process: &mut Process, pidfd: &OwnedFd) {
        loop {
            let overdue = self.end_by.is_some_and(|at| at <= Instant::now());
            if overdue {
                self.evidence.failure = self.suspicion.take();
                self.end_by = None;
            }
            if overdue || self.shared.asked_to_end().is_some() {
                process.kill();
            }
            self.take_typed();
            let sources = match self.wait(Some(pidfd.as_fd()), None) {
                Ok(sources) => sources,
                Err(errno) => {
                    self.evidence.failure = Some(format!("cannot wait for QEMU: {errno}"));
                    process.kill();
                    return;
                }
            };
            for source in sources {
                match source {
                    Source::Exit => return,
                    Source::Wake => self.shared.wake.clear(),
                    _ => {
                        self.read(source);
                    }
                }
            }
        }
    }

    /// Reads what the child had written before it ended.
    fn read_what_is_left(&mut self) {
        self.typed.clear();
        for _ in 0..LAST_CHUNKS {
            let nothing = Timespec { tv_sec: 0, tv_nsec: 0 };
            let Ok(sources) = self.wait(None, Some(nothing)) else { return };
            let mut read = false;
            for source in sources {
                read |= self.read(source);
            }
            if !read {
                return;
            }
        }
    }

    /// Publishes the end of the machine, whose child ended with `status`.
    fn finish(&mut self, status: Option<ExitStatus>) {
        if self.attached {
            self.port.set_input_notifier(None);
        }
        let cause = self.evidence.cause(self.shared.asked_to_end(), status);
        tracing::debug!(%cause, "machine ended");
        self.shared.state.update(|state| {
            *state = MachineState::Exited(cause);
            true
        });
        self.shared.close();
        if let Some(ready) = self.ready.take() {
            let kind = match self.evidence.is_about_boot_files() {
                true => MachineErrorKind::Boot,
                false => MachineErrorKind::Host,
            };
            let what = format!("QEMU did not start: {}", self.evidence.failure(status));
            let _ = ready.send(Err(MachineError::new(kind, what)));
        }
    }

    /// Waits until there is something to do, and says what. `pidfd` is the child's, while it is not
    /// known to have ended.
    fn wait(&self, pidfd: Option<BorrowedFd<'_>>, timeout: Option<Timespec>) -> Result<Vec<Source>, Errno> {
        let timeout = timeout.or_else(|| {
            let left = self.end_by?.saturating_duration_since(Instant::now());
            Timespec::try_from(left).ok()
        });
        let mut sources = vec![Source::Wake];
        let mut fds = vec![PollFd::new(&self.shared.wake.0, PollFlags::IN)];
        if let Some(pidfd) = pidfd {
            sources.push(Source::Exit);
            fds.push(PollFd::from_borrowed_fd(pidfd, PollFlags::IN));
        }
        if self.control.is_some() {
            sources.push(Source::Control);
            fds.push(PollFd::new(&self.shared.control, PollFlags::IN));
        }
        if let Some(console) = &self.console {
            let wanted = if self.typed.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            sources.push(Source::Console);
            fds.push(PollFd::new(console, wanted));
        }
        for (source, fd) in [(Source::Stderr, &self.stderr), (Source::Log, &self.log)] {
            if let Some(fd) = fd {
                sources.push(source);
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let happened = |(source, fd): (Source, &PollFd<'_>)| (!fd.revents().is_empty()).then_some(source);
        Ok(sources.into_iter().zip(&fds).filter_map(happened).collect())
    }

    /// Reads once from a source that `poll` named; says whether there was anything.
    fn read(&mut self, source: Source) -> bool {
        let mut buf = [0; CHUNK];
        match source {
            Source::Exit | Source::Wake => false,
            Source::Control => match recv(&self.shared.control, &mut buf) {
                Some(0) => {
                    self.control = None;
                    self.end_soon("QEMU closed its control channel");
                    false
                }
                Some(len) => {
                    self.take_messages(&buf[..len]);
                    true
                }
                None => false,
            },
            Source::Console => match self.console.as_ref().and_then(|c| recv(c, &mut buf)) {
                Some(0) => {
                    self.console = None;
                    false
                }
                Some(len) => {
                    self.port.write_output(&buf[..len]);
                    true
                }
                None => false,
            },
            Source::Stderr => match read_pipe(&mut self.stderr, &mut buf) {
                0 => false,
                len => {
                    self.evidence.stderr.push(&buf[..len]);
                    true
                }
            },
            Source::Log => match read_pipe(&mut self.log, &mut buf) {
                0 => false,
                len => {
                    self.evidence.triple_fault.push(&buf[..len]);
                    true
                }
            },
        }
    }

    /// Hands what was typed at the console to QEMU, as far as it takes it.
    fn take_typed(&mut self) {
        let Some(console) = &self.console else { return };
        if !self.attached {
            return;
        }
        loop {
            if self.typed.is_empty() {
                let mut buf = [0; 4096];
                let len = self.port.read_input(&mut buf);
                self.typed.extend_from_slice(&buf[..len]);
            }
            if self.typed.is_empty() {
                return;
            }
            match send(console, &self.typed, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.typed.drain(..sent)),
                // There is room again when `poll` says so.
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.console = None;
                    self.typed.clear();
                    return;
                }
            }
        }
    }

    fn take_messages(&mut self, bytes: &[u8]) {
        let Some(mut decoder) = self.control.take() else { return };
        match decoder.push(bytes, |message| self.take_message(message)) {
            Ok(()) => self.control = Some(decoder),
            Err(error) => {
                self.end_now(error.to_string());
            }
        }
    }

    fn take_message(&mut self, message: Message) {
        match message {
            Message::Greeting => self.give(Command::Capabilities),
            Message::Resumed => self.resumed(),
            Message::Stopped => {
                // Part of `pause`, whose answer says that the disks have come to rest as well; or QEMU
                // stopped the guest by itself, and is asked why.
                if !self.shared.is_pending(Command::Stop) {
                    self.give(Command::Status);
                }
            }
            Message::DeviceDeleted { device } => self.device_gone(&device),
            Message::Shutdown { reason } => {
                self.evidence.shutdown = Some(reason);
                self.end_by.get_or_insert(Instant::now() + EXIT_WITHIN);
            }
            Message::Answer { id, result } => match self.shared.answered(id, &result) {
                Ok(Some(pending)) => {
                    self.take_answer(pending.command, &result);
                    if let Some(caller) = pending.caller {
                        // It waits, unless it panicked.
                        let _ = caller.send(result);
                    }
                }
                Ok(None) => {}
                Err(error) => self.end_soon(&error.to_string()),
            },
            Message::Other => {}
        }
    }

    /// Gives up the disk of a device that is gone, whose requests have ended with it.
    fn device_gone(&mut self, device: &str) {
        let Some(name) = self.disks.gone(device) else { return };
        // The connection's node goes with the device's, but for one that came later, which is refused before.
        for node in [name.device(), name.connection()] {
            self.give((Command::BlockdevDel, json!({ "node-name": node })));
        }
    }

    fn take_answer(&mut self, command: Command, answer: &Answer) {
        match (command, answer) {
            (Command::Capabilities, Ok(_)) => {
                if let Some(ready) = self.ready.take() {
                    let _ = ready.send(Ok(()));
                }
            }
            (Command::Continue, Ok(_)) => self.resumed(),
            (Command::Stop, Ok(_)) => self.paused(),
            (Command::Status, Ok(status)) => match status["status"].as_str() {
                Some("internal-error") => {
                    self.end_now("QEMU could not go on running the guest's processor".to_owned());
                }
                Some("running") => {}
                _ => self.paused(),
            },
            (Command::Capabilities | Command::Status, Err(why)) => {
                self.end_soon(&format!("QEMU refused `{}`: {why}", command.name()));
            }
            _ => {}
        }
    }

    fn resumed(&mut self) {
        let running = |state: &mut MachineState| {
            let was_still = matches!(state, MachineState::Created | MachineState::Paused);
            if was_still {
                *state = MachineState::Running;
            }
            was_still
        };
        if !self.attached {
            self.attached = true;
            let wake = self.shared.wake.clone();
            self.port.set_input_notifier(Some(Arc::new(move || wake.wake())));
        }
        self.shared.state.update(running);
    }

    fn paused(&mut self) {
        self.shared.state.update(|state| {
            let was_running = *state == MachineState::Running;
            if was_running {
                *state = MachineState::Paused;
            }
            was_running
        });
    }

    fn give(&mut self, request: impl Into<Request>) {
        if let Err(error) = self.shared.send(request, None) {
            self.end_soon(&error.to_string());
        }
    }

    fn end_now(&mut self, failure: String) {
        self.suspicion = Some(failure);
        self.end_by = Some(Instant::now());
    }

    /// Something is wrong, and QEMU may be about to end for a better reason: it gets a moment.
    fn end_soon(&mut self, failure: &str) {
        if self.end_by.is_none() {
            self.suspicion = Some(failure.to_owned());
            self.end_by = Some(Instant::now() + EXIT_WITHIN);
        }
    }
}

/// Reads what is there, without waiting; `Some(0)` is the end.
fn recv(socket: &UnixStream, buf: &mut [u8]) -> Option<usize> {
    match rustix::net::recv(socket, buf, rustix::net::RecvFlags::DONTWAIT) {
        Ok((len, _)) => Some(len),
        Err(Errno::AGAIN | Errno::INTR) => None,
        // A reset connection is at its end, too.
        Err(_) => Some(0),
    }
}

/// Reads from a pipe that `poll` named, so it does not wait. At its end it is closed.
fn read_pipe(pipe: &mut Option<OwnedFd>, buf: &mut [u8]) -> usize {
    let Some(fd) = pipe else { return 0 };
    match rustix::io::read(&*fd, buf) {
        Err(Errno::INTR) => 0,
        Ok(len) if len > 0 => len,
        _ => {
            *pipe = None;
            0
        }
    }
}

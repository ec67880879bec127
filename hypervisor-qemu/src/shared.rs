//! What the callers of a machine and its supervisor share: the state, and commands under way.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use instance_core::machine::{ExitCause, MachineError, MachineErrorKind, MachineState};
use instance_core::watch::Publisher;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::qmp::Command;

/// The most commands under way at once, so that a QEMU that answers nothing does not collect them.
const MAX_PENDING: usize = 64;

/// What QEMU answered, or why it refused.
pub(crate) type Answer = Result<Value, String>;

/// A command with what comes with it.
#[derive(Debug)]
pub(crate) struct Request {
    command: Command,
    arguments: Option<Value>,
    fd: Option<OwnedFd>,
}

impl From<Command> for Request {
    fn from(command: Command) -> Self {
        Self { command, arguments: None, fd: None }
    }
}

impl From<(Command, Value)> for Request {
    fn from((command, arguments): (Command, Value)) -> Self {
        Self { command, arguments: Some(arguments), fd: None }
    }
}

impl From<(Command, Value, OwnedFd)> for Request {
    fn from((command, arguments, fd): (Command, Value, OwnedFd)) -> Self {
        Self { command, arguments: Some(arguments), fd: Some(fd) }
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: Publisher<MachineState>,
    /// Our end of the QMP socket. Callers write to it, under the lock on `requests`; the supervisor
    /// reads from it.
    pub(crate) control: UnixStream,
    /// Wakes the supervisor.
    pub(crate) wake: Arc<Waker>,
    requests: Mutex<Requests>,
    /// What the end of the child was asked for as, first.
    asked_to_end: OnceLock<ExitCause>,
    /// How long an answer of QEMU's is waited for.
    answer_within: Duration,
}

#[derive(Debug, Default)]
struct Requests {
    closed: bool,
    last_id: u64,
    pending: Vec<Pending>,
}

/// A command that QEMU has not answered.
#[derive(Debug)]
pub(crate) struct Pending {
    id: u64,
    pub(crate) command: Command,
    /// Whoever waits for the answer. `None` where it is the supervisor itself, or nobody any more.
    pub(crate) caller: Option<SyncSender<Answer>>,
}

impl Shared {
    pub(crate) fn new(control: UnixStream, answer_within: Duration) -> std::io::Result<Self> {
        Ok(Self {
            state: Publisher::new(MachineState::Created),
            control,
            wake: Arc::new(Waker::new()?),
            requests: Mutex::default(),
            asked_to_end: OnceLock::new(),
            answer_within,
        })
    }

    /// Asks for the end of the child, which is the machine's for this cause unless the guest is faster; the first one
    /// stays.
    pub(crate) fn end(&self, cause: ExitCause) {
        let _ = self.asked_to_end.set(cause);
        self.wake.wake();
    }

    /// For which cause its [`end`](Self::end) was asked for, if it was.
    pub(crate) fn asked_to_end(&self) -> Option<&ExitCause> {
        self.asked_to_end.get()
    }

    /// Gives a command, in order to `action`, and waits for its answer.
    pub(crate) fn execute(&self, action: &str, request: impl Into<Request>) -> Result<(), MachineError> {
        let (caller, answer) = sync_channel(1);
        let request = request.into();
        let command = request.command;
        let id = self.send(request, Some(caller))?;
        let failed = |what: String| Err(MachineError::new(MachineErrorKind::Host, what));
        let mut answered = answer.recv_timeout(self.answer_within);
        if answered == Err(RecvTimeoutError::Timeout) && !self.give_up(id) {
            // It has come just now.
            answered = answer.recv().map_err(RecvTimeoutError::from);
        }
        match answered {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(why)) => failed(format!("QEMU refused `{}`: {why}", command.name())),
            Err(RecvTimeoutError::Timeout) => {
                let limit = self.answer_within;
                failed(format!("QEMU did not answer `{}` within {limit:?}", command.name()))
            }
            Err(RecvTimeoutError::Disconnected) => Err(MachineError::wrong_state(action, &self.state.get())),
        }
    }

    /// Leaves the answer to the command under `id` to the supervisor; says whether it is still to come.
    fn give_up(&self, id: u64) -> bool {
        let mut requests = self.requests();
        let given_up = requests.pending.iter_mut().find(|p| p.id == id);
        given_up.map(|p| p.caller = None).is_some()
    }

    /// Gives a command, whose answer comes to the supervisor, and returns its id.
    pub(crate) fn send(
        &self,
        request: impl Into<Request>,
        caller: Option<SyncSender<Answer>>,
    ) -> Result<u64, MachineError> {
        self.send_with(&mut self.requests(), request.into(), caller)
    }

    fn send_with(
        &self,
        requests: &mut Requests,
        request: Request,
        caller: Option<SyncSender<Answer>>,
    ) -> Result<u64, MachineError> {
        let command = request.command;
        if requests.closed {
            return Err(MachineError::wrong_state(command.name(), &self.state.get()));
        }
        let failed = |why: &str| {
            let what = format!("cannot give QEMU the command `{}`: {why}", command.name());
            Err(MachineError::new(MachineErrorKind::Host, what))
        };
        if requests.pending.len() >= MAX_PENDING {
            return failed("it has left many unanswered");
        }
        requests.last_id += 1;
        let id = requests.last_id;
        let line = command.line(id, request.arguments.as_ref());
        match send_line(&self.control, line.as_bytes(), request.fd.as_ref()) {
            Ok(sent) if sent == line.len() => {
                requests.pending.push(Pending { id, command, caller });
                Ok(id)
            }
            // With part of a line sent, no other can follow.
            Ok(_) => {
                requests.closed = true;
                failed("it does not read them")
            }
            Err(Errno::AGAIN) => failed("it does not read them"),
            // One that was ended meanwhile hears nothing any more.
            Err(errno) => match self.asked_to_end() {
                Some(cause) => {
                    Err(MachineError::wrong_state(command.name(), &MachineState::Exited(cause.clone())))
                }
                None => failed(&errno.to_string()),
            },
        }
    }

    /// The command that an answer under `id` belongs to, which is then under way no longer.
    ///
    /// Whoever gave up a `stop` that was done was told that it failed, so the guest is to run: `cont` is
    /// on its way before another `stop` can be.
    pub(crate) fn answered(&self, id: u64, answer: &Answer) -> Result<Option<Pending>, MachineError> {
        let mut requests = self.requests();
        let Some(at) = requests.pending.iter().position(|p| p.id == id) else { return Ok(None) };
        let pending = requests.pending.swap_remove(at);
        if pending.command == Command::Stop && pending.caller.is_none() && answer.is_ok() {
            self.send_with(&mut requests, Command::Continue.into(), None)?;
        }
        Ok(Some(pending))
    }

    /// Whether such a command is under way.
    pub(crate) fn is_pending(&self, command: Command) -> bool {
        self.requests().pending.iter().any(|p| p.command == command)
    }

    /// Takes no more commands, and lets go those who wait for an answer.
    pub(crate) fn close(&self) {
        let mut requests = self.requests();
        requests.closed = true;
        requests.pending.clear();
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a line, with a descriptor if one comes with it.
fn send_line(socket: &UnixStream, line: &[u8], fd: Option<&OwnedFd>) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(line)], &mut ancillary, flags)
}

/// Wakes a thread that polls, without ever blocking the one that wakes it.
#[derive(Debug)]
pub(crate) struct Waker(pub(crate) OwnedFd);

impl Waker {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn wake(&self) {
        // It fails only where the counter is full, and then the thread is about to wake.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        // It fails only where nobody woke it.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

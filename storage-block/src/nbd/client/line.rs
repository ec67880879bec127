//! One connection that many threads use: each sends its request and waits for the reply to it.
//!
//! There is no thread of its own. One of those that wait receives; when what comes is for another, that one is
//! woken and receives it, straight to where it is wanted.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::reply::{Expected, Head, Source};
use crate::nbd::channel::Channel;
use crate::nbd::proto::{Command, Request};
use crate::store::lock;
use crate::{Error, ErrorKind, Result};

/// Requests that are on their way at the same time; whoever comes with more waits.
const IN_FLIGHT: usize = 64;
/// What is received at once, at most, where it is not known what comes.
const ROOM: usize = 32 << 10;

#[derive(Debug)]
pub(super) struct Line {
    channel: Channel,
    /// How long it may take until a request is answered.
    patience: Duration,
    sending: Mutex<()>,
    input: Mutex<Input>,
    state: Mutex<State>,
    /// There are fewer requests on their way than there may be.
    room: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Why nothing will come any more.
    dead: Option<(ErrorKind, String)>,
    /// A thread receives, or has been told to.
    receiving: bool,
    last: u64,
    waiting: BTreeMap<u64, Waiting>,
}

/// A request that was sent, or is being sent.
#[derive(Debug, Default)]
struct Waiting {
    wake: Arc<Condvar>,
    /// It was sent, and its thread waits to be woken.
    asleep: bool,
    /// What its thread has to go on receiving with.
    head: Option<Head>,
}

impl Line {
    pub(super) fn new(channel: Channel, patience: Duration) -> Self {
        Self {
            channel,
            patience,
            sending: Mutex::default(),
            input: Mutex::new(Input { room: vec![0; ROOM].into(), start: 0, end: 0 }),
            state: Mutex::default(),
            room: Condvar::new(),
        }
    }

    /// Sends a request, with what it brings along, and waits for all of its reply. The inner result is the
    /// server's error number.
    pub(super) fn call(
        &self,
        flags: u16,
        (offset, len): (u64, u32),
        data: &[u8],
        expected: &mut Expected<'_>,
    ) -> Result<Result<(), u32>> {
        let handle = self.enter()?;
        let deadline = Instant::now() + self.patience;
        let request = Request { flags, command: expected.command, handle, offset, len };
        let sent = {
            let _sending = lock(&self.sending);
            self.channel.send(&request.encode(), data)
        };
        if let Err(error) = sent {
            self.die(&super::handshake::lost(error));
        }
        let done = self.wait(handle, deadline, expected);
        let mut state = lock(&self.state);
        state.waiting.remove(&handle);
        self.room.notify_one();
        if !state.receiving {
            // Somebody has to.
            if let Some(waiting) = state.waiting.values().find(|waiting| waiting.asleep) {
                waiting.wake.notify_one();
            }
        }
        done
    }

    fn enter(&self) -> Result<u64> {
        let mut state = lock(&self.state);
        while state.dead.is_none() && state.waiting.len() >= IN_FLIGHT {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.alive()?;
        state.last += 1;
        let handle = state.last;
        state.waiting.insert(handle, Waiting::default());
        Ok(handle)
    }

    fn wait(&self, handle: u64, deadline: Instant, expected: &mut Expected<'_>) -> Result<Result<(), u32>> {
        let mut state = lock(&self.state);
        loop {
            state.alive()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                let late = super::handshake::lost(io::ErrorKind::TimedOut.into());
                self.die(&late);
                return Err(late);
            }
            let receiving = state.receiving;
            let Some(waiting) = state.waiting.get_mut(&handle) else {
                return Err(Error::new(ErrorKind::Io, "an NBD request has been lost"));
            };
            if let Some(head) = waiting.head.take() {
                drop(state);
                let taken = expected.take(head, &mut Receiver::new(self, deadline));
                let taken = taken.inspect_err(|error| self.die(error))?;
                state = lock(&self.state);
                state.receiving = false;
                if let Some(done) = taken {
                    return Ok(done);
                }
            } else if receiving {
                waiting.asleep = true;
                let wake = Arc::clone(&waiting.wake);
                state = wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                if let Some(waiting) = state.waiting.get_mut(&handle) {
                    waiting.asleep = false;
                }
            } else {
                state.receiving = true;
                drop(state);
                let head = Head::receive(&mut Receiver::new(self, deadline));
                let head = head.inspect_err(|error| self.die(error))?;
                state = lock(&self.state);
                let Some(waiting) = state.waiting.get_mut(&head.handle) else {
                    drop(state);
                    let lie = Error::new(ErrorKind::Protocol, "the NBD server answers what nobody has asked");
                    self.die(&lie);
                    return Err(lie);
                };
                waiting.head = Some(head);
                waiting.wake.notify_one();
            }
        }
    }

    /// Wakes all who wait, for nothing.
    fn die(&self, error: &Error) {
        let mut state = lock(&self.state);
        let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
        state.dead.get_or_insert((error.kind(), format!("{error}{source}")));
        for waiting in state.waiting.values() {
            waiting.wake.notify_one();
        }
        self.room.notify_all();
        self.channel.shut_down();
    }

    /// Says good-bye, without waiting for anybody.
    pub(super) fn close(&mut self) {
        if lock(&self.state).dead.is_none() && self.channel.unlimit(None, Some(FAREWELL)).is_ok() {
            let request = Request { flags: 0, command: Command::Disconnect, handle: 0, offset: 0, len: 0 };
            let _ = self.channel.send(&request.encode(), &[]);
        }
        self.channel.shut_down();
    }
}

/// A server that takes no good-bye in this time does without.
const FAREWELL: Duration = Duration::from_millis(20);

impl State {
    fn alive(&self) -> Result<()> {
        match &self.dead {
            None => Ok(()),
            Some((kind, why)) => Err(Error::new(*kind, why.clone())),
        }
    }
}

/// What was received and belongs to what comes next.
#[derive(Debug)]
struct Input {
    room: Box<[u8]>,
    start: usize,
    end: usize,
}

/// The input while one thread receives.
struct Receiver<'l> {
    channel: &'l Channel,
    input: std::sync::MutexGuard<'l, Input>,
    deadline: Instant,
}

impl<'l> Receiver<'l> {
    fn new(line: &'l Line, deadline: Instant) -> Self {
        Self { channel: &line.channel, input: lock(&line.input), deadline }
    }

    /// The socket has the same patience with each single byte, which alone would be too much.
    fn receive(channel: &Channel, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        match channel.receive(buf)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            received if received < buf.len() && Instant::now() >= deadline => {
                Err(io::ErrorKind::TimedOut.into())
            }
            received => Ok(received),
        }
    }
}

impl Source for Receiver<'_> {
    fn fill(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        let input = &mut *self.input;
        while !buf.is_empty() {
            if input.start < input.end {
                let len = buf.len().min(input.end - input.start);
                buf[..len].copy_from_slice(&input.room[input.start..input.start + len]);
                input.start += len;
                buf = &mut buf[len..];
            } else if buf.len() >= input.room.len() {
                let received = Self::receive(self.channel, buf, self.deadline)?;
                buf = &mut buf[received..];
            } else {
                input.end = Self::receive(self.channel, &mut input.room, self.deadline)?;
                input.start = 0;
            }
        }
        Ok(())
    }
}

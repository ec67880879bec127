//! The guest's part in an image of an instance that runs: its file systems are flushed and stand still at that instant.
//!
//! The agent is that of QEMU, which distributions have, at a port of the guest's for [streams](crate::vsock). It is asked in
//! its own protocol, of which four commands are used (QEMU, "QEMU Guest Agent Protocol Reference"). There are crates with
//! all of it (`qapi`, `qapi-qga`), which read lines of any length: they are for agents that one trusts.

mod answers;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub(crate) use self::answers::Answers;
use self::answers::{Answer, SENTINEL};
use crate::vsock::{Stream, Vsock};

/// How long it takes at most to find out whether there is an agent. One that is there answers in milliseconds; a guest that
/// has none refuses the stream, and one that is booting says nothing.
const GREETING: Duration = Duration::from_secs(2);
/// How long file systems may take to be flushed: as long as Windows gives those who write, to which EC2 keeps as well.
const FREEZE: Duration = seconds(10);
/// How long file systems stand still at most, whatever keeps the host from taking the volumes: who writes in the guest
/// waits for it.
const HELD: Duration = seconds(10);
/// How long the guest is given to say that its file systems go on. It has been told, and does it when it comes to it.
const THAW: Duration = seconds(5);

/// Less in tests, which wait for it.
const fn seconds(count: u64) -> Duration {
    Duration::from_millis(count * if cfg!(test) { 300 } else { 1000 })
}

const FREEZE_COMMAND: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const THAW_COMMAND: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;

/// File systems of a guest's that stand still. Dropping it has them go on.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// How many they are.
    count: u64,
    release: Option<Sender<()>>,
    thread: Option<JoinHandle<Option<u64>>>,
}

impl Frozen {
    /// Has them go on, and says whether all of them had stood still until this was called.
    pub(crate) fn thaw(mut self) -> bool {
        self.release() == Some(self.count)
    }

    /// Gives how many the agent has found standing still, if nobody had run out of patience.
    fn release(&mut self) -> Option<u64> {
        if let Some(release) = self.release.take() {
            // Whoever has run out of patience does not listen.
            let _ = release.send(());
        }
        self.thread.take()?.join().ok()?
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release();
    }
}

/// Has a guest flush its file systems and let them stand still, if it has an agent at this port. Whatever becomes of who
/// calls, they do not stand still for longer than [`HELD`].
///
/// # Errors
///
/// Why they do not stand still. Where they may do so all the same, because nothing was heard of it in time, the guest has been
/// told to have them go on.
pub(crate) fn freeze(vsock: &Vsock, port: u32) -> io::Result<Frozen> {
    let (tell, told) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let vsock = vsock.clone();
    // It has a thread of its own from the beginning, so that there is one to have them go on.
    let hold = move || {
        let greeted = Agent::greet(&vsock, port);
        let mut agent = match greeted {
            Ok(agent) => agent,
            Err(e) => {
                let _ = tell.send(Err(e));
                return None;
            }
        };
        agent.stream.set_deadline(Some(Instant::now() + FREEZE));
        let frozen = agent.freeze();
        let is_known = frozen.is_ok();
        // Who does not hear it is gone, and has let go of the other channel.
        let _ = tell.send(frozen);
        let late = !is_known || released.recv_timeout(HELD) == Err(RecvTimeoutError::Timeout);
        let thawed = thaw(agent, is_known, &vsock, port);
        if let Err(e) = &thawed {
            tracing::warn!(error = %e, "a guest has not said that its file systems go on");
        }
        thawed.ok().filter(|_| !late)
    };
    let thread = thread::Builder::new().name("guest-agent".to_owned()).spawn(hold)?;
    let gone = |_| Err(io::Error::other("the thread that asks the agent has ended"));
    match told.recv().unwrap_or_else(gone) {
        Ok(count) => Ok(Frozen { count, release: Some(release), thread: Some(thread) }),
        Err(e) => {
            // They go on before anything else is done with the guest.
            let _ = thread.join();
            Err(e)
        }
    }
}

/// Has file systems go on, and gives how many had stood still. What the agent has answered to an earlier command it may still be
/// about to say.
fn thaw(mut agent: Agent<Stream>, is_in_step: bool, vsock: &Vsock, port: u32) -> io::Result<u64> {
    agent.stream.set_deadline(Some(Instant::now() + THAW));
    let thawed = if is_in_step { agent.thaw() } else { agent.thaw_late() };
    // One that is silent has the command, and an answer would be no other on another stream.
    let again = |e: &io::Error| !matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::NotConnected);
    match thawed {
        Err(e) if again(&e) => {
            drop(agent);
            let mut agent = Agent::greet(vsock, port)?;
            agent.stream.set_deadline(Some(Instant::now() + THAW));
            agent.thaw()
        }
        thawed => thawed,
    }
}

/// An agent, at the other end of a stream.
#[derive(Debug)]
pub(crate) struct Agent<S> {
    stream: S,
    answers: Answers,
}

impl Agent<Stream> {
    fn greet(vsock: &Vsock, port: u32) -> io::Result<Self> {
        let deadline = Instant::now() + GREETING;
        let mut agent = Self::new(vsock.connect(port, deadline)?);
        agent.stream.set_deadline(Some(deadline));
        // Its numbers are signed.
        agent.synchronise(RandomState::new().hash_one(()) as u32 >> 1)?;
        Ok(agent)
    }
}

impl<S: Read + Write> Agent<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, answers: Answers::default() }
    }

    /// Begins anew, whatever the agent has half heard, or has still to say.
    pub(crate) fn synchronise(&mut self, id: u32) -> io::Result<()> {
        self.answers = Answers::default();
        let command = format!(r#"{{"execute":"guest-sync-delimited","arguments":{{"id":{id}}}}}"#);
        // Where it has half a command from another, this ends it.
        self.stream.write_all(&[SENTINEL])?;
        self.say(&command)?;
        while !self.answers.has_begun(id)? {
            self.hear()?;
        }
        Ok(())
    }

    /// Gives how many file systems stand still, which is no success if it is none.
    pub(crate) fn freeze(&mut self) -> io::Result<u64> {
        match self.ask(FREEZE_COMMAND)? {
            0 => Err(io::Error::other("the guest has no file system that can stand still")),
            count => Ok(count),
        }
    }

    /// Gives how many file systems had stood still.
    pub(crate) fn thaw(&mut self) -> io::Result<u64> {
        self.ask(THAW_COMMAND)
    }

    /// The same where the agent has not answered yet; it says nothing of how many they were.
    fn thaw_late(&mut self) -> io::Result<u64> {
        self.say(THAW_COMMAND)?;
        self.synchronise(1).map(|()| 0)
    }

    fn ask(&mut self, command: &str) -> io::Result<u64> {
        self.say(command)?;
        loop {
            match self.answers.next()? {
                Some(Answer::Number(number)) => return Ok(number),
                Some(Answer::Refused(why)) => {
                    return Err(io::Error::other(format!("the guest's agent cannot: {why:?}")));
                }
                None => self.hear()?,
            }
        }
    }

    fn say(&mut self, command: &str) -> io::Result<()> {
        self.stream.write_all(format!("{command}\n").as_bytes())
    }

    fn hear(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes)? {
            0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "the guest's agent has ended the stream")),
            count => {
                self.answers.hear(&bytes[..count]);
                Ok(())
            }
        }
    }
}

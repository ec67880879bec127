//! The guest's part in an image of an instance that runs: its file systems are flushed and stand still at that instant.
//!
//! The agent is that of QEMU, which distributions have, at a port of the guest's for [streams](crate::vsock). It is asked in
//! its own protocol, of which four commands are used (QEMU, "QEMU Guest Agent Protocol Reference"). There are crates with
//! all of it (`qapi`, `qapi-qga`), which read lines of any length: they are for agents that one trusts.

mod answers;
#[cfg(test)]
mod tests;
mod turns;

use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use self::answers::Answers;
use self::answers::{Answer, SENTINEL, nonsense};
pub(crate) use self::turns::{Turn, Turns};
use crate::vsock::{Stream, Vsock};

/// How long it takes at most to find out whether there is an agent. One that is there answers in milliseconds; a guest that
/// has none refuses the stream, and one that is booting says nothing.
const GREETING: Duration = Duration::from_secs(2);
/// How long file systems stand still at most, from when the guest is asked to have them do so: as long as they are flushed, who
/// writes waits already. Windows gives those who write as long between the two, to which EC2 keeps as well.
const HELD: Duration = seconds(10);
/// How long the guest is given to say that its file systems go on. It has been told, and does it when it comes to it.
const THAW: Duration = seconds(5);
/// For how long a guest is told again that has not said so, and how long after the time before.
const AGAIN: Duration = seconds(60);
const PAUSE: Duration = seconds(1);

/// Less in tests, which wait for it.
const fn seconds(count: u64) -> Duration {
    Duration::from_millis(count * if cfg!(test) { 300 } else { 1000 })
}

const FREEZE_COMMAND: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const THAW_COMMAND: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;
const STATUS_COMMAND: &str = r#"{"execute":"guest-fsfreeze-status"}"#;

/// File systems of a guest's that stand still. Dropping it has them go on.
#[derive(Debug)]
pub(crate) struct Frozen<'t> {
    /// How many they are.
    count: u64,
    release: Option<Sender<()>>,
    thawed: Receiver<Option<u64>>,
    /// Until the guest was told to go on.
    _turn: Turn<'t>,
}

impl Frozen<'_> {
    /// Has them go on, and says whether all of them had stood still until this was called.
    pub(crate) fn thaw(mut self) -> bool {
        self.release() == Some(self.count)
    }

    /// Gives how many the agent has found standing still, if nobody had run out of patience.
    fn release(&mut self) -> Option<u64> {
        // Whoever has run out of patience does not listen.
        let _ = self.release.take()?.send(());
        self.thawed.recv().ok()?
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// Has a guest flush its file systems and let them stand still, if it has an agent at this port. Whatever becomes of who
/// calls, and of the volumes, it is told to have them go on when [`HELD`] has passed, and again for as long as [`AGAIN`] where it
/// does not say that they do: nobody waits for that.
///
/// # Errors
///
/// Why they do not stand still. Where they may do so all the same, because nothing was heard of it in time, the guest has been
/// told to have them go on.
pub(crate) fn freeze<'t>(turn: Turn<'t>, vsock: &Vsock, port: u32) -> io::Result<Frozen<'t>> {
    let (tell, told) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let (say_thawed, thawed) = mpsc::channel();
    let (turns, vsock) = (turn.turns().clone(), vsock.clone());
    // It has a thread of its own from the beginning, so that there is one to have them go on.
    let hold = move || {
        if !hold(&turns, &vsock, port, &tell, &released, &say_thawed) {
            // Nobody waits for this.
            drop((tell, say_thawed));
            turns.keep_thawing(&vsock, port);
        }
    };
    thread::Builder::new().name("guest-agent".to_owned()).spawn(hold)?;
    let gone = |_| Err(io::Error::other("the thread that asks the agent has ended"));
    let count = told.recv().unwrap_or_else(gone)?;
    Ok(Frozen { count, release: Some(release), thawed, _turn: turn })
}

/// Has file systems stand still until they are released, or for [`HELD`]. Says whether the guest has said that they go on.
fn hold(
    turns: &Arc<Turns>,
    vsock: &Vsock,
    port: u32,
    tell: &Sender<io::Result<u64>>,
    released: &Receiver<()>,
    say_thawed: &Sender<Option<u64>>,
) -> bool {
    // Whoever is told of anything here may be gone, and has let go of the other channel then.
    let greeted = Agent::greet(vsock, port).and_then(|mut agent| match turns.owes(vsock) {
        // It cannot freeze what stands still from another time.
        Some(_) => {
            agent.set_deadline(Instant::now() + THAW);
            agent.thaw().map(|_| agent)
        }
        None => Ok(agent),
    });
    let mut agent = match greeted {
        Ok(agent) => agent,
        Err(e) => {
            let _ = tell.send(Err(e));
            return turns.owes(vsock).is_none();
        }
    };
    let until = Instant::now() + HELD;
    agent.set_deadline(until);
    turns.owe(vsock, port);
    let answer = agent.call(FREEZE_COMMAND);
    let is_refused = matches!(answer, Ok(Answer::Refused(_)));
    let (thawed, late) = match answer.and_then(frozen) {
        Ok(count) => {
            let _ = tell.send(Ok(count));
            let left = until.saturating_duration_since(Instant::now());
            let late = released.recv_timeout(left) == Err(RecvTimeoutError::Timeout);
            (thaw(agent, true, vsock, port), late)
        }
        Err(e) => {
            let status = is_refused.then(|| agent.call(STATUS_COMMAND));
            let thawed = match status {
                // Somebody else's: what this asks for is refused where they stand still, and else undone by the agent.
                Some(Ok(Answer::Text(status))) if status == "frozen" => Ok(0),
                status => thaw(agent, matches!(status, Some(Ok(_))), vsock, port),
            };
            if thawed.is_ok() {
                turns.pay(vsock);
            }
            // They go on before anything else is done with the guest.
            let _ = tell.send(Err(e));
            (thawed, true)
        }
    };
    let is_paid = match &thawed {
        Ok(_) => true,
        Err(e) if e.kind() == ErrorKind::NotConnected => true,
        Err(e) => {
            tracing::warn!(error = %e, "a guest has not said that its file systems go on");
            false
        }
    };
    if is_paid {
        turns.pay(vsock);
    }
    let _ = say_thawed.send(thawed.ok().filter(|_| !late));
    is_paid
}

/// The number that an agent has answered.
fn number(answer: Answer) -> io::Result<u64> {
    match answer {
        Answer::Number(number) => Ok(number),
        Answer::Text(_) => Err(nonsense("the agent's answer is no number")),
        Answer::Refused(why) => Err(io::Error::other(format!("the guest's agent cannot: {why:?}"))),
    }
}

/// How many file systems stand still, which is no success if it is none.
fn frozen(answer: Answer) -> io::Result<u64> {
    match number(answer)? {
        0 => Err(io::Error::other("the guest has no file system that can stand still")),
        count => Ok(count),
    }
}

/// Has file systems go on, and gives how many had stood still. What the agent has answered to an earlier command it may still be
/// about to say.
fn thaw(mut agent: Agent<Stream>, is_in_step: bool, vsock: &Vsock, port: u32) -> io::Result<u64> {
    agent.set_deadline(Instant::now() + THAW);
    let thawed = if is_in_step { agent.thaw() } else { agent.thaw_late() };
    // One that is silent has the command, and is given time to come to it.
    let again = |e: &io::Error| !matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::NotConnected);
    match thawed {
        Err(e) if again(&e) => {
            drop(agent);
            thaw_anew(vsock, port)
        }
        thawed => thawed,
    }
}

/// The same on a stream of its own.
fn thaw_anew(vsock: &Vsock, port: u32) -> io::Result<u64> {
    let mut agent = Agent::greet(vsock, port)?;
    agent.set_deadline(Instant::now() + THAW);
    agent.thaw()
}

/// An agent, at the other end of a stream.
#[derive(Debug)]
pub(crate) struct Agent<S> {
    stream: S,
    answers: Answers,
    /// Until when it is listened to, also where it never stops.
    deadline: Option<Instant>,
}

impl Agent<Stream> {
    fn greet(vsock: &Vsock, port: u32) -> io::Result<Self> {
        let deadline = Instant::now() + GREETING;
        let mut agent = Self::new(vsock.connect(port, deadline)?);
        agent.set_deadline(deadline);
        // Its numbers are signed.
        agent.synchronise(RandomState::new().hash_one(()) as u32 >> 1)?;
        Ok(agent)
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.stream.set_deadline(Some(deadline));
        self.deadline = Some(deadline);
    }
}

impl<S: Read + Write> Agent<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, answers: Answers::default(), deadline: None }
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

    #[cfg(any(test, fuzzing))]
    pub(crate) fn freeze(&mut self) -> io::Result<u64> {
        self.call(FREEZE_COMMAND).and_then(frozen)
    }

    /// Gives how many file systems had stood still.
    pub(crate) fn thaw(&mut self) -> io::Result<u64> {
        self.call(THAW_COMMAND).and_then(number)
    }

    /// The same where the agent has not answered yet; it says nothing of how many they were.
    fn thaw_late(&mut self) -> io::Result<u64> {
        self.say(THAW_COMMAND)?;
        self.synchronise(1).map(|()| 0)
    }

    fn call(&mut self, command: &str) -> io::Result<Answer> {
        self.say(command)?;
        loop {
            match self.answers.next()? {
                Some(answer) => return Ok(answer),
                None => self.hear()?,
            }
        }
    }

    fn say(&mut self, command: &str) -> io::Result<()> {
        self.stream.write_all(format!("{command}\n").as_bytes())
    }

    fn hear(&mut self) -> io::Result<()> {
        // A stream on which there is always something to read does not look.
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(io::Error::new(ErrorKind::TimedOut, "the guest's agent did not answer in time"));
        }
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

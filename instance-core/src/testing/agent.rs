//! QEMU's guest agent, as far as a region asks it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::vsock::{Op, Packet, VsockPort};
use crate::watch::{Publisher, Watch};

/// How many bytes the guest says that it has room for.
const ROOM: u32 = 1 << 20;
/// How many file systems it has.
const FILE_SYSTEMS: u64 = 2;

/// An agent in a [fake guest](super::FakeHypervisor::on_streams), for [`RegionOptions::guest_agent`](crate::RegionOptions::guest_agent).
/// Clones are the same agent, whichever guest it is in.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::tiny_elf;
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec};
/// use instance_core::testing::{FakeAgent, FakeHypervisor};
/// use instance_core::{ImageConsistency, RegionOptions};
///
/// # let dir = tempfile::tempdir()?;
/// let agent = FakeAgent::new(9999);
/// let hypervisor = FakeHypervisor::new().on_streams({
///     let agent = agent.clone();
///     move |port| agent.serve(port)
/// });
/// let region = RegionOptions::new().guest_agent(9999).open(dir.path(), hypervisor)?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// let made = server.create_image("web-2")?;
/// assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
/// let asked = ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
/// assert_eq!(agent.asked().get(), asked);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct FakeAgent(Arc<Shared>);

/// What an agent does at a command, if it is not what it should do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AgentSays {
    /// It says these bytes.
    Bytes(Vec<u8>),
    /// It says these bytes for as long as somebody takes them.
    WithoutEnd(Vec<u8>),
    /// It says nothing.
    Nothing,
    /// It breaks the stream off.
    HangUp,
}

type Behaviour = dyn Fn(&str) -> Option<AgentSays> + Send + Sync;

struct Shared {
    port: u32,
    behaviour: Box<Behaviour>,
    asked: Publisher<Vec<String>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the host's port: what has come of a command.
    streams: BTreeMap<u32, Vec<u8>>,
    /// What is said to it without end.
    endless: BTreeMap<u32, Vec<u8>>,
    /// How many bytes were said to it.
    sent: BTreeMap<u32, u32>,
    frozen: u64,
    /// How many connections it takes no notice of.
    away: u32,
}

impl FakeAgent {
    /// An agent that listens on this port and does what it should.
    pub fn new(port: u32) -> Self {
        Self::behaving(port, |_| None)
    }

    /// One that does what `behaviour` says at a command, if that says anything.
    pub fn behaving(
        port: u32,
        behaviour: impl Fn(&str) -> Option<AgentSays> + Send + Sync + 'static,
    ) -> Self {
        let (behaviour, asked) = (Box::new(behaviour), Publisher::new(Vec::new()));
        Self(Arc::new(Shared { port, behaviour, asked, state: Mutex::default() }))
    }

    /// The commands that it was asked for, in order.
    pub fn asked(&self) -> Watch<Vec<String>> {
        self.0.asked.watch()
    }

    /// How many file systems of the guest stand still.
    pub fn frozen(&self) -> u64 {
        self.state().frozen
    }

    /// Has it be away for the next connections, so many, as one is that is being restarted: the guest refuses them.
    pub fn refuse_next(&self, connections: u32) {
        self.state().away = connections;
    }

    /// Does what there is to do, in the guest whose end of the streams this is.
    pub fn serve(&self, port: &VsockPort) {
        while let Some(Packet { host_port, guest_port, op, buf_alloc, fwd_cnt }) = port.next(usize::MAX) {
            let say = |op: Op| {
                if port.has_room() {
                    if let Op::Data(bytes) = &op {
                        self.sent(host_port, bytes.len());
                    }
                    port.deliver(Packet { host_port, guest_port, op, buf_alloc: ROOM, fwd_cnt: 0 });
                }
            };
            match op {
                Op::Request if guest_port == self.0.port && self.is_there() => {
                    self.state().streams.insert(host_port, Vec::new());
                    say(Op::Response);
                }
                Op::Request => say(Op::Reset),
                Op::Data(bytes) => self.hear(host_port, &bytes).into_iter().for_each(say),
                Op::CreditUpdate => {
                    let more = self.state().endless.get(&host_port).cloned().unwrap_or_default();
                    let has_room = || {
                        let waiting = self.sent(host_port, 0).wrapping_sub(fwd_cnt);
                        waiting as usize + more.len() <= buf_alloc as usize
                    };
                    while !more.is_empty() && has_room() && port.has_room() {
                        say(Op::Data(more.clone()));
                    }
                }
                Op::Shutdown { .. } | Op::Reset => {
                    let mut state = self.state();
                    let known = state.streams.remove(&host_port).is_some();
                    state.endless.remove(&host_port);
                    state.sent.remove(&host_port);
                    drop(state);
                    if known && op != Op::Reset {
                        say(Op::Reset);
                    }
                }
                Op::Response | Op::CreditRequest => {}
            }
        }
    }

    /// Counts what is said, and gives how much that is.
    fn sent(&self, host_port: u32, count: usize) -> u32 {
        let mut state = self.state();
        let sent = state.sent.entry(host_port).or_default();
        *sent = sent.wrapping_add(count as u32);
        *sent
    }

    fn is_there(&self) -> bool {
        let away = &mut self.state().away;
        std::mem::replace(away, away.saturating_sub(1)) == 0
    }

    // Nothing that is done under the lock panics half way.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the host says, and gives what is said to that.
    fn hear(&self, host_port: u32, bytes: &[u8]) -> Vec<Op> {
        let mut answers = Vec::new();
        let mut half = self.state().streams.get_mut(&host_port).map(std::mem::take).unwrap_or_default();
        half.extend(bytes);
        while let Some(end) = half.iter().position(|byte| matches!(byte, b'\n' | 0xff)) {
            let line: Vec<u8> = half.drain(..=end).collect();
            // What comes before a sentinel is of somebody who has gone.
            if line.ends_with(b"\n") {
                answers.extend(self.answer(host_port, &line));
            }
        }
        if let Some(stream) = self.state().streams.get_mut(&host_port) {
            *stream = half;
        }
        answers
    }

    fn answer(&self, host_port: u32, line: &[u8]) -> Option<Op> {
        let command: Value = serde_json::from_slice(line).unwrap_or_default();
        let name = command["execute"].as_str().unwrap_or_default();
        // Who says something else, or nothing, may have done it all the same; who hangs up has not, nor who says that it cannot.
        let says = (self.0.behaviour)(name);
        let usual = match &says {
            Some(AgentSays::HangUp) => Vec::new(),
            Some(AgentSays::Bytes(bytes)) if bytes.starts_with(b"{\"error\"") => Vec::new(),
            _ => self.obey(name, &command["arguments"]["id"]),
        };
        let says = says.unwrap_or(AgentSays::Bytes(usual));
        self.0.asked.update(|asked| {
            asked.push(name.to_owned());
            true
        });
        match says {
            AgentSays::Bytes(bytes) => Some(Op::Data(bytes)),
            AgentSays::WithoutEnd(bytes) => {
                self.state().endless.insert(host_port, bytes.clone());
                Some(Op::Data(bytes))
            }
            AgentSays::Nothing => None,
            AgentSays::HangUp => {
                self.state().streams.remove(&host_port);
                Some(Op::Reset)
            }
        }
    }

    /// Does what a command says, and gives what is to be said to that.
    fn obey(&self, command: &str, id: &Value) -> Vec<u8> {
        let mut state = self.state();
        let number = |number: u64| format!("{{\"return\": {number}}}\n").into_bytes();
        match command {
            "guest-sync-delimited" => [&[0xff], &*number(id.as_u64().unwrap_or_default())].concat(),
            "guest-fsfreeze-freeze" if state.frozen == 0 => {
                state.frozen = FILE_SYSTEMS;
                number(FILE_SYSTEMS)
            }
            "guest-fsfreeze-status" if state.frozen == 0 => b"{\"return\": \"thawed\"}\n".to_vec(),
            "guest-fsfreeze-status" => b"{\"return\": \"frozen\"}\n".to_vec(),
            "guest-fsfreeze-thaw" => number(std::mem::take(&mut state.frozen)),
            _ => b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"it has been disabled\"}}\n"
                .to_vec(),
        }
    }
}

impl fmt::Debug for FakeAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeAgent").field("port", &self.0.port).finish_non_exhaustive()
    }
}

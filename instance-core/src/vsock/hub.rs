//! All streams of a machine: which packet belongs to which, and which stream may send next.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Condvar};

use super::connection::{Connection, State, Ways};
use super::packet::{Op, Packet};
use super::{BACKLOG, BUFFER, LINGERING, REPLIES, STREAMS};

/// The ports of a stream: the host's and the guest's.
type Ports = (u32, u32);
/// A stream, also when its ports belong to another one by now.
pub(super) type Id = u64;

/// The ports that streams of the host's begin from, unless they are listened on.
const FIRST_PORT: u32 = 1 << 30;

/// All that is known of a machine's streams.
#[derive(Debug, Default)]
pub(super) struct Hub {
    entries: HashMap<Id, Entry>,
    by_ports: HashMap<Ports, Id>,
    listeners: BTreeMap<u32, Listening>,
    /// Those that have something to say to the guest, each once.
    speaking: VecDeque<Id>,
    /// Answers to packets that belong to no stream.
    replies: VecDeque<Packet>,
    next_id: Id,
    next_port: AnyPort,
    /// How many streams wait to be rid of what was written to them.
    lingering: usize,
}

/// Begins anywhere: what a guest that was saved still says to a stream that it had is not to meet one of now.
#[derive(Debug)]
struct AnyPort(u32);

impl Default for AnyPort {
    fn default() -> Self {
        Self(RandomState::new().hash_one(()) as u32)
    }
}

#[derive(Debug)]
struct Entry {
    ports: Ports,
    connection: Connection,
    /// Told of what a program may wait for.
    changed: Arc<Condvar>,
    speaking: bool,
    /// No program holds it any more.
    dropped: bool,
}

#[derive(Debug)]
struct Listening {
    backlog: VecDeque<Id>,
    changed: Arc<Condvar>,
}

impl Hub {
    // What the host's program does.

    /// Listens on a port, unless somebody does.
    pub(super) fn listen(&mut self, port: u32) -> Option<Arc<Condvar>> {
        if self.listeners.contains_key(&port) {
            return None;
        }
        let changed = Arc::new(Condvar::new());
        self.listeners.insert(port, Listening { backlog: VecDeque::new(), changed: changed.clone() });
        Some(changed)
    }

    /// Listens no more. Who waits to be accepted is turned away.
    pub(super) fn close(&mut self, port: u32) {
        let backlog = self.listeners.remove(&port).map(|listening| listening.backlog);
        backlog.into_iter().flatten().for_each(|id| self.abandon(id));
    }

    /// The next stream that a guest has made to a port.
    pub(super) fn accept(&mut self, port: u32) -> Option<(Id, Arc<Condvar>)> {
        let id = self.listeners.get_mut(&port)?.backlog.pop_front()?;
        self.entries.get(&id).map(|entry| (id, entry.changed.clone()))
    }

    /// Begins a stream to a guest's port. None where there are too many.
    pub(super) fn connect(&mut self, guest_port: u32) -> Option<(Id, Arc<Condvar>)> {
        if self.by_ports.len() >= STREAMS {
            return None;
        }
        // There are more ports than streams and listeners.
        let host_port = loop {
            let port = FIRST_PORT + self.next_port.0 % FIRST_PORT;
            self.next_port.0 = self.next_port.0.wrapping_add(1);
            if !self.by_ports.contains_key(&(port, guest_port)) && !self.listeners.contains_key(&port) {
                break port;
            }
        };
        Some(self.add((host_port, guest_port), Connection::to_guest()))
    }

    fn add(&mut self, ports: Ports, connection: Connection) -> (Id, Arc<Condvar>) {
        let (id, changed) = (self.next_id, Arc::new(Condvar::new()));
        self.next_id += 1;
        let entry = Entry { ports, connection, changed: changed.clone(), speaking: false, dropped: false };
        self.entries.insert(id, entry);
        self.by_ports.insert(ports, id);
        self.schedule(id);
        (id, changed)
    }

    /// Does something with a stream that a program holds.
    pub(super) fn with<T>(&mut self, id: Id, action: impl FnOnce(&mut Connection) -> T) -> Option<T> {
        let done = self.entries.get_mut(&id).map(|entry| action(&mut entry.connection));
        self.schedule(id);
        done
    }

    pub(super) fn state(&self, id: Id) -> State {
        self.entries.get(&id).map_or(State::Closed, |entry| entry.connection.state)
    }

    /// The ports of a stream.
    pub(super) fn ports(&self, id: Id) -> Ports {
        self.entries.get(&id).map_or((0, 0), |entry| entry.ports)
    }

    /// No program holds a stream any more. The guest still gets what was written.
    pub(super) fn release(&mut self, id: Id) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.connection.state == State::Connecting || self.lingering >= LINGERING {
            return self.abandon(id);
        }
        entry.connection.end(Ways::BOTH);
        entry.dropped = true;
        self.lingering += 1;
        self.schedule(id);
        self.settle(id);
    }

    /// Breaks a stream off that nobody holds.
    fn abandon(&mut self, id: Id) {
        let Some(entry) = self.entries.get(&id) else { return };
        let (ports, live) = (entry.ports, entry.connection.state.is_live());
        if live && !entry.connection.is_unheard_of() {
            self.reply(ports);
        }
        if live {
            self.by_ports.remove(&ports);
        }
        self.forget(id);
    }

    // What the guest does.

    /// Whether the next packet of the guest's can be answered.
    pub(super) fn has_room(&self) -> bool {
        self.replies.len() < REPLIES
    }

    /// Takes a packet of the guest's.
    pub(super) fn deliver(&mut self, packet: Packet) {
        let ports = (packet.host_port, packet.guest_port);
        let Some(&id) = self.by_ports.get(&ports) else { return self.deliver_to_nobody(packet) };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.connection.learn_credit(packet.buf_alloc, packet.fwd_cnt);
        let taken = entry.connection.take(packet.op);
        if taken.is_err() {
            entry.connection.state = State::Broken;
        } else if entry.connection.guest_is_done() {
            entry.connection.state = State::Closed;
        }
        entry.changed.notify_all();
        let gone = !entry.connection.state.is_live();
        if taken.is_err() || gone && entry.connection.guest_is_done() {
            self.reply(ports);
        }
        if gone {
            self.by_ports.remove(&ports);
        }
        self.schedule(id);
        self.settle(id);
    }

    fn deliver_to_nobody(&mut self, packet: Packet) {
        let ports = (packet.host_port, packet.guest_port);
        match packet.op {
            Op::Reset => {}
            Op::Request if self.takes(packet.host_port) => {
                let mut connection = Connection::from_guest();
                connection.learn_credit(packet.buf_alloc, packet.fwd_cnt);
                let (id, _) = self.add(ports, connection);
                if let Some(listening) = self.listeners.get_mut(&packet.host_port) {
                    listening.backlog.push_back(id);
                    listening.changed.notify_all();
                }
            }
            _ => self.reply(ports),
        }
    }

    /// Whether a guest may have one more stream to this port.
    fn takes(&self, port: u32) -> bool {
        let listening = self.listeners.get(&port);
        listening.is_some_and(|l| l.backlog.len() < BACKLOG) && self.by_ports.len() < STREAMS
    }

    /// The guest has forgotten all streams: its driver begins anew, or it is no more.
    pub(super) fn reset(&mut self) {
        self.replies.clear();
        let live: Vec<(Ports, Id)> = self.by_ports.iter().map(|(ports, id)| (*ports, *id)).collect();
        for (ports, id) in live {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            // What the guest has not heard of it may still hear.
            if entry.connection.is_unheard_of() {
                continue;
            }
            entry.connection.state = State::Broken;
            entry.changed.notify_all();
            self.by_ports.remove(&ports);
            self.settle(id);
        }
        for listening in self.listeners.values_mut() {
            let turned_away = std::mem::take(&mut listening.backlog);
            turned_away.iter().for_each(|id| _ = self.entries.remove(id));
        }
        self.speaking.retain(|id| self.entries.get(id).is_some_and(|entry| entry.connection.has_next()));
    }

    /// Wakes all that wait, to see that there is no machine any more.
    pub(super) fn wake_all(&self) {
        self.entries.values().for_each(|entry| entry.changed.notify_all());
        self.listeners.values().for_each(|listening| listening.changed.notify_all());
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_next(&self) -> bool {
        !self.replies.is_empty() || !self.speaking.is_empty()
    }

    /// The next packet for the guest, with at most `room` bytes of data: of each stream one, in turn.
    pub(super) fn next(&mut self, room: usize) -> Option<Packet> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        // Each once: one that has no room for its bytes goes on waiting.
        for _ in 0..self.speaking.len() {
            let Some(id) = self.speaking.pop_front() else { break };
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.speaking = false;
            let op = entry.connection.next(room);
            if op.is_some() {
                // There is room to write again, or the last word has been said.
                entry.changed.notify_all();
            }
            let (ports, taken) = (entry.ports, entry.connection.taken());
            self.schedule(id);
            self.settle(id);
            if let Some(op) = op {
                return Some(packet(ports, op, taken));
            }
        }
        None
    }

    fn schedule(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if entry.connection.has_next() && !entry.speaking {
                entry.speaking = true;
                self.speaking.push_back(id);
            }
        }
    }

    /// Forgets a stream that nobody holds and of which all has been said.
    fn settle(&mut self, id: Id) {
        let Some(entry) = self.entries.get(&id) else { return };
        if entry.dropped && entry.connection.is_over() {
            let ports = entry.ports;
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
            self.forget(id);
        }
    }

    fn forget(&mut self, id: Id) {
        if self.entries.remove(&id).is_some_and(|entry| entry.dropped) {
            self.lingering -= 1;
        }
    }

    /// Says that there is no such stream.
    fn reply(&mut self, ports: Ports) {
        // The guest's packets are not taken while there is no room; the host's own are few.
        self.replies.push_back(packet(ports, Op::Reset, 0));
    }
}

fn packet((host_port, guest_port): Ports, op: Op, taken: u32) -> Packet {
    Packet { host_port, guest_port, op, buf_alloc: BUFFER as u32, fwd_cnt: taken }
}

//! The conversations that an interface is part of: a bounded memory of what rules have allowed.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;

use crate::firewall::{Direction, Policy};
use crate::packet::{ECHO, ECHO_REPLY, Flow, Transport};

/// How long a conversation may be silent, in seconds: one of TCP that both sides have spoken in (EC2's default for
/// instances of the Nitro system), one of UDP in which both have, another (EC2 User Guide, "Security group
/// connection tracking").
const ESTABLISHED_TCP: u32 = 350;
const UDP_STREAM: u32 = 180;
const BRIEF: u32 = 30;

/// A conversation, seen from the interface: the peer's address and port, and its own port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    peer: Ipv4Addr,
    peer_port: u16,
    port: u16,
    protocol: u8,
}

/// What is known of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    /// Which way its first packet went.
    inwards: bool,
    stage: Stage,
    /// When it was last heard of, in seconds.
    last: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// One side has spoken.
    Begun,
    /// Both have.
    Established,
    /// One has said that it ends.
    Closing,
}

/// The conversations of an interface.
///
/// Those in which only one side has spoken are kept apart and are the first to go, so that no flood of
/// beginnings takes the place of a conversation that goes on.
#[derive(Debug)]
pub(crate) struct Conntrack {
    begun: HashMap<Key, Seen>,
    /// The order in which they began; some have gone since.
    beginnings: VecDeque<Key>,
    established: HashMap<Key, Seen>,
    most_begun: usize,
    most_established: usize,
    /// When those that are over were last looked for.
    swept: u32,
}

impl Conntrack {
    /// Remembers at most so many conversations, an eighth of them beginnings.
    pub(crate) fn new(most: usize) -> Self {
        let most_begun = (most / 8).max(1);
        Self {
            begun: HashMap::new(),
            beginnings: VecDeque::new(),
            established: HashMap::new(),
            most_begun,
            most_established: most.saturating_sub(most_begun).max(1),
            swept: 0,
        }
    }

    /// How many conversations are remembered.
    pub(crate) fn len(&self) -> usize {
        self.begun.len() + self.established.len()
    }

    /// How many beginnings are remembered in their order, of which some may have gone.
    #[cfg(test)]
    pub(crate) fn beginnings(&self) -> usize {
        self.beginnings.len()
    }

    /// Whether a packet belongs to a conversation that goes on, or `policy` allows one to begin with it.
    /// `now` is in seconds and does not go back.
    pub(crate) fn allows(&mut self, policy: &Policy, direction: Direction, flow: &Flow, now: u32) -> bool {
        self.sweep(now);
        let Some(key) = Key::of(direction, flow) else {
            // Nothing to tell its conversations by: each packet by the rules.
            return policy.allows(direction, flow);
        };
        self.continues(key, direction, flow, now)
            || policy.allows(direction, flow) && self.begin(key, direction, now)
    }

    /// Whether `policy` lets a conversation in that begins with `real`, which the instance sees as `shown`.
    pub(crate) fn admit_as(&mut self, policy: &Policy, real: &Flow, shown: &Flow, now: u32) -> bool {
        self.sweep(now);
        let key = Key::of(Direction::Ingress, shown).filter(|_| policy.allows(Direction::Ingress, real));
        key.is_some_and(|key| self.begin(key, Direction::Ingress, now))
    }

    /// Whether an ICMP error is about a conversation that goes on.
    pub(crate) fn allows_error(&self, direction: Direction, about: &Flow, now: u32) -> bool {
        // The quoted packet went the other way.
        let went = match direction {
            Direction::Ingress => Direction::Egress,
            Direction::Egress => Direction::Ingress,
        };
        let known = |seen: &Seen, protocol| now.saturating_sub(seen.last) <= seen.patience(protocol);
        Key::of(went, about).is_some_and(|key| {
            let seen = self.established.get(&key).or_else(|| self.begun.get(&key));
            seen.is_some_and(|seen| known(seen, key.protocol))
        })
    }

    fn continues(&mut self, key: Key, direction: Direction, flow: &Flow, now: u32) -> bool {
        let inwards = direction == Direction::Ingress;
        let ends = matches!(flow.transport, Transport::Tcp { flags, .. } if flags.end);
        if let Entry::Occupied(mut entry) = self.established.entry(key) {
            let begins_anew =
                matches!(flow.transport, Transport::Tcp { flags, .. } if flags.syn && !flags.ack);
            let seen = entry.get_mut();
            let over = now.saturating_sub(seen.last) > seen.patience(key.protocol);
            if over || begins_anew && seen.stage == Stage::Closing {
                entry.remove();
                return false;
            }
            seen.last = now;
            if ends {
                seen.stage = Stage::Closing;
            }
            return true;
        }
        let Entry::Occupied(mut entry) = self.begun.entry(key) else { return false };
        let seen = entry.get_mut();
        if now.saturating_sub(seen.last) > seen.patience(key.protocol) {
            entry.remove();
            return false;
        }
        seen.last = now;
        if seen.inwards == inwards {
            return true;
        }
        // Answered. Where there is no place among those that go on, it stays a beginning.
        if self.established.len() < self.most_established {
            let stage = if ends { Stage::Closing } else { Stage::Established };
            let seen = Seen { stage, ..*seen };
            entry.remove();
            self.established.insert(key, seen);
        }
        true
    }

    fn begin(&mut self, key: Key, direction: Direction, now: u32) -> bool {
        while self.begun.len() >= self.most_begun {
            match self.beginnings.pop_front() {
                Some(oldest) => drop(self.begun.remove(&oldest)),
                None => return false,
            }
        }
        let seen = Seen { inwards: direction == Direction::Ingress, stage: Stage::Begun, last: now };
        self.begun.insert(key, seen);
        if self.beginnings.len() >= 2 * self.most_begun {
            let begun = &self.begun;
            self.beginnings.retain(|key| begun.contains_key(key));
        }
        self.beginnings.push_back(key);
        true
    }

    /// Forgets what is over, every few seconds.
    fn sweep(&mut self, now: u32) {
        const EVERY: u32 = 10;
        if now.saturating_sub(self.swept) < EVERY {
            return;
        }
        self.swept = now;
        let lives = |key: &Key, seen: &mut Seen| now.saturating_sub(seen.last) <= seen.patience(key.protocol);
        self.begun.retain(lives);
        self.established.retain(lives);
        let begun = &self.begun;
        self.beginnings.retain(|key| begun.contains_key(key));
    }
}

impl Seen {
    fn patience(&self, protocol: u8) -> u32 {
        const TCP: u8 = 6;
        const UDP: u8 = 17;
        match (protocol, self.stage) {
            (TCP, Stage::Established) => ESTABLISHED_TCP,
            (UDP, Stage::Established) => UDP_STREAM,
            _ => BRIEF,
        }
    }
}

impl Key {
    /// None of a packet that has nothing to tell its conversation by.
    fn of(direction: Direction, flow: &Flow) -> Option<Self> {
        let (from, to) = match flow.transport {
            Transport::Tcp { source, destination, .. } | Transport::Udp { source, destination } => {
                (source, destination)
            }
            Transport::Icmp { kind: ECHO | ECHO_REPLY, id, .. } => (id, id),
            Transport::Icmp { .. } | Transport::Other(_) => return None,
        };
        let protocol = flow.transport.number();
        Some(match direction {
            Direction::Ingress => Self { peer: flow.source, peer_port: from, port: to, protocol },
            Direction::Egress => Self { peer: flow.destination, peer_port: to, port: from, protocol },
        })
    }
}

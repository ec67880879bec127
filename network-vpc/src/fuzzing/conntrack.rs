//! The firewall, beside a plain model of what may pass.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::firewall::{Conntrack, Direction, Members, Peer, Policy, Ports, Protocol, Rule};
use crate::packet::{ECHO, ECHO_REPLY, Flow, TcpFlags, Transport};

const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

/// Takes the input apart.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }
}

/// Packets, floods and changes of rules, beside a plain model of what may pass.
pub fn conntrack(bytes: &[u8]) {
    let (mut world, mut input) = (World::new(), Input(bytes));
    while let Some([action, a, b, c]) = input.take() {
        match action % 16 {
            0 => world.rules.clear(),
            1 | 2 => world.add_rule(a, b, c),
            3 => world.now += u32::from(u16::from_le_bytes([a, b])) >> (c % 16),
            4 => world.flood(a, b),
            5 => world.shake_hands(a, b),
            6 => world.still_alive(),
            _ => {
                let numbers = [b >> 6, c >> 6].map(u32::from);
                world.packet(direction(a), stranger(a >> 1), transport(a >> 2, b, c, numbers));
            }
        }
        world.table.check();
    }
    world.still_alive();
}

/// A firewall, and the model.
struct World {
    table: Conntrack,
    policy: Policy,
    rules: Vec<(Direction, Rule)>,
    now: u32,
    /// When a packet of a conversation last passed, or was the first that a rule allowed.
    known: HashMap<Conversation, u32>,
    /// When a rule last allowed one to begin by a SYN, each way.
    begun: HashMap<(Direction, Conversation), u32>,
    /// What was begun as it should be and has not ended.
    alive: Vec<(Direction, Ipv4Addr, u16, u16)>,
    alive_since: u32,
}

/// A protocol, the peer, its port and the own one.
type Conversation = (u8, Ipv4Addr, u16, u16);

fn direction(byte: u8) -> Direction {
    if byte & 1 == 0 { Direction::Ingress } else { Direction::Egress }
}

fn stranger(byte: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, byte & 1)
}

fn transport(kind: u8, b: u8, c: u8, [sequence, acknowledged]: [u32; 2]) -> Transport {
    let (source, destination) = (u16::from(b & 3), u16::from(c & 3));
    let bit = |n: u8| b >> (n + 2) & 1 == 1;
    match kind & 7 {
        0..=3 => {
            let flags = TcpFlags {
                syn: bit(0),
                ack: bit(1),
                fin: c >> 2 & 3 == 1,
                rst: c >> 2 & 3 == 2,
                sequence,
                acknowledged,
            };
            Transport::Tcp { source, destination, flags }
        }
        4 | 5 => Transport::Udp { source, destination },
        6 => Transport::Icmp {
            kind: [ECHO, ECHO_REPLY, 3, 13][usize::from(b >> 2 & 3)],
            code: c & 3,
            id: source,
        },
        _ => Transport::Other(47 + (b & 1)),
    }
}

impl World {
    fn new() -> Self {
        Self {
            table: Conntrack::new(1600),
            policy: Policy::default(),
            rules: Vec::new(),
            now: 0,
            known: HashMap::new(),
            begun: HashMap::new(),
            alive: Vec::new(),
            alive_since: 0,
        }
    }

    fn add_rule(&mut self, a: u8, b: u8, c: u8) {
        const MOST: usize = 8;
        let protocol = match a >> 1 & 7 {
            0..=2 => Protocol::Tcp,
            3 => Protocol::Udp,
            4 => Protocol::Icmp,
            5 => Protocol::Any,
            6 => Protocol::Number(47),
            _ => Protocol::Number(6),
        };
        let ports = match protocol {
            Protocol::Tcp | Protocol::Udp if b >> 4 != 0 => {
                Ports::Range(u16::from(b & 3)..=if b & 4 == 0 { u16::from(b & 3) + 1 } else { u16::MAX })
            }
            Protocol::Icmp if b >> 4 != 0 => {
                Ports::Icmp([8, 0, 3, 13][usize::from(b & 3)], (b & 4 == 0).then_some(0))
            }
            _ => Ports::All,
        };
        let peer: Ipv4Net = match c & 3 {
            0 => Ipv4Net::default(),
            1 => Ipv4Net::from(stranger(0)),
            2 => Ipv4Net::from(stranger(1)),
            _ => Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 0, 0), 8),
        };
        if self.rules.len() < MOST {
            self.rules.push((direction(a), Rule { protocol, ports, ..Rule::all(Peer::Cidr(peer)) }));
        }
    }

    fn allowed(&self, way: Direction) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |(of, _)| *of == way).map(|(_, rule)| rule)
    }

    /// What a rule says, word by word.
    fn by_rule(&self, way: Direction, peer: Ipv4Addr, transport: &Transport) -> bool {
        self.allowed(way).any(|rule| {
            let Peer::Cidr(cidr) = rule.peer else { return false };
            cidr.contains(&peer) && covers(rule, transport)
        })
    }

    /// Whether rules allow all of a port's conversations both ways, in which the port is the one that is asked.
    fn is_open(&self, way: Direction, number: u8, port: u16) -> bool {
        let open = |way, port| {
            let of_all = self.allowed(way).filter(|rule| rule.peer == Peer::Cidr(Ipv4Net::default()));
            of_all.into_iter().any(|rule| covers(rule, &with_port(number, port)))
        };
        // Where a range of the rules' ends, or none.
        let ends = [0, 1, 2, 3, 4, 5, u16::MAX - 1, u16::MAX];
        open(way, port) && ends.into_iter().all(|port| open(way.opposite(), port))
    }

    fn packet(&mut self, way: Direction, peer: Ipv4Addr, transport: Transport) -> bool {
        self.policy = Policy::new(self.allowed(Direction::Ingress), self.allowed(Direction::Egress), |_| {
            Members::default()
        });
        let (source, destination) = if way == Direction::Ingress { (peer, OWN) } else { (OWN, peer) };
        let flow = Flow { source, destination, transport };
        let remembered = self.table.len();
        let passes = self.table.allows(&self.policy, way, &flow, self.now);
        let by_rule = self.by_rule(way, peer, &transport);
        assert!(passes || !by_rule, "{way:?} {flow:?} is allowed");
        let (number, from, to) = match transport {
            Transport::Tcp { source, destination, .. } => (6, source, destination),
            Transport::Udp { source, destination } => (17, source, destination),
            Transport::Icmp { id, .. } => (1, id, id),
            Transport::Other(number) => (number, 0, 0),
        };
        let untracked = [6, 17].contains(&number)
            && (self.is_open(way, number, to) || self.is_open(way.opposite(), number, from));
        assert!(!untracked || passes && self.table.len() <= remembered, "{flow:?} needs no memory");
        let conversation = match way {
            Direction::Ingress => (number, peer, from, to),
            Direction::Egress => (number, peer, to, from),
        };
        if passes && !by_rule {
            let patience = match number {
                6 => 432_000,
                17 => 180,
                1 => 30,
                _ => 600,
            };
            let last = self.known.get(&conversation).copied();
            let last = last.unwrap_or_else(|| panic!("{way:?} {flow:?} belongs to nothing"));
            if matches!(transport, Transport::Tcp { flags, .. } if flags.begins()) {
                let begun = self.begun.get(&(way, conversation)).map(|begun| self.now - begun);
                assert!(begun.is_some_and(|ago| ago <= 30), "{flow:?} begins by itself");
            }
            assert!(self.now - last <= patience, "{flow:?} comes {} s too late", self.now - last - patience);
        }
        if passes {
            self.known.insert(conversation, self.now);
        }
        if by_rule {
            self.begun.insert((way, conversation), self.now);
        }
        passes
    }

    /// A conversation of a port that is nobody else's, if rules let it begin and it is to be tracked.
    fn shake_hands(&mut self, a: u8, b: u8) {
        const MOST: usize = 200;
        let (way, peer, to) = (direction(a), stranger(a >> 1), u16::from(b & 3));
        let from = 1000 + self.alive.len() as u16;
        let say = |syn, ack, sequence, acknowledged| TcpFlags {
            syn,
            ack,
            fin: false,
            rst: false,
            sequence,
            acknowledged,
        };
        let asks = |flags| Transport::Tcp { source: from, destination: to, flags };
        let answers = |flags| Transport::Tcp { source: to, destination: from, flags };
        let syn = asks(say(true, false, 70, 0));
        let untracked = self.is_open(way, 6, to) || self.is_open(way.opposite(), 6, from);
        if self.alive.len() >= MOST
            || untracked
            || !self.by_rule(way, peer, &syn)
            || self.known.contains_key(&of(way, peer, from, to))
        {
            return;
        }
        let back = way.opposite();
        assert!(self.packet(way, peer, syn));
        assert!(self.packet(back, peer, answers(say(true, true, u32::MAX, 71))), "answers");
        assert!(self.packet(way, peer, asks(say(false, true, 71, 0))), "acknowledges");
        if self.alive.is_empty() {
            self.alive_since = self.now;
        }
        self.alive.push((way, peer, from, to));
    }

    /// Whatever else has come, what was begun goes on, also without a rule.
    fn still_alive(&mut self) {
        let is_over = self.now - self.alive_since > 432_000;
        for (way, peer, from, to) in self.alive.clone() {
            let flags = TcpFlags { ack: true, sequence: 0, acknowledged: 71, ..TcpFlags::default() };
            let transport = Transport::Tcp { source: to, destination: from, flags };
            let (source, destination) = if way == Direction::Ingress { (OWN, peer) } else { (peer, OWN) };
            let flow = Flow { source, destination, transport };
            let lives = self.table.allows(&Policy::default(), way.opposite(), &flow, self.now);
            assert!(lives || is_over, "{flow:?} of a conversation that goes on");
            if lives {
                self.known.insert(of(way, peer, from, to), self.now);
            }
        }
        if is_over {
            self.alive.clear();
        }
        self.alive_since = self.now;
    }

    /// Many who are none of those that speak otherwise.
    fn flood(&mut self, a: u8, b: u8) {
        for n in 0..300u16 {
            let peer = Ipv4Addr::from(0xcb01_0000 + u32::from(n));
            let flags = |syn, ack| TcpFlags { syn, ack, acknowledged: u32::from(n), ..TcpFlags::default() };
            let (source, destination) = (9, u16::from(a & 3));
            let (asks, answers) = match b & 3 {
                0 => (
                    Transport::Udp { source, destination },
                    Transport::Udp { source: destination, destination: 9 },
                ),
                1 => (Transport::Other(47), Transport::Other(47)),
                _ => (
                    Transport::Tcp { source, destination, flags: flags(true, false) },
                    Transport::Tcp { source: destination, destination: 9, flags: flags(true, true) },
                ),
            };
            let way = direction(a >> 2);
            self.packet(way, peer, asks);
            if b & 4 == 0 {
                self.packet(way.opposite(), peer, answers);
                self.packet(way, peer, asks);
            }
        }
    }
}

/// The conversation that one begins from a port with another.
fn of(way: Direction, peer: Ipv4Addr, from: u16, to: u16) -> Conversation {
    match way {
        Direction::Ingress => (6, peer, from, to),
        Direction::Egress => (6, peer, to, from),
    }
}

fn with_port(number: u8, destination: u16) -> Transport {
    match number {
        6 => Transport::Tcp { source: 0, destination, flags: TcpFlags::default() },
        _ => Transport::Udp { source: 0, destination },
    }
}

pub(super) fn covers(rule: &Rule, transport: &Transport) -> bool {
    let protocol = match rule.protocol {
        Protocol::Any => true,
        Protocol::Tcp => transport.number() == 6,
        Protocol::Udp => transport.number() == 17,
        Protocol::Icmp => transport.number() == 1,
        Protocol::Number(number) => transport.number() == number,
    };
    protocol
        && match (&rule.ports, transport) {
            (Ports::All, _) => true,
            (
                Ports::Range(ports),
                Transport::Tcp { destination, .. } | Transport::Udp { destination, .. },
            ) => ports.contains(destination),
            (Ports::Icmp(of, None), Transport::Icmp { kind, .. }) => of == kind,
            (Ports::Icmp(of, Some(with)), Transport::Icmp { kind, code, .. }) => (of, with) == (kind, code),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn agrees_with_a_plain_model(bytes in proptest::collection::vec(any::<u8>(), 0..800)) {
            super::conntrack(&bytes);
        }
    }
}

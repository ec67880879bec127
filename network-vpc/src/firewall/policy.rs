//! The rules of an interface's groups, laid out for whoever asks of every packet.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::firewall::{Direction, Peer, Ports, Protocol, Rule};
use crate::packet::{Flow, Transport};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The addresses that a group stands for: one set for all the rules that name it.
pub(crate) type Members = Arc<HashSet<Ipv4Addr>>;

/// All rules of an interface's groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    ingress: Side,
    egress: Side,
}

/// Those of one direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Side {
    allowed: Vec<Allowed>,
    /// What everybody is allowed.
    open_tcp: Ranges,
    open_udp: Ranges,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Allowed {
    /// None is every one.
    protocol: Option<u8>,
    /// Of the [selector](selector).
    first: u16,
    last: u16,
    peers: Peers,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Peers {
    Net { network: u32, mask: u32 },
    Group(Members),
}

/// Numbers, as ranges that are in order and apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ranges(Vec<(u16, u16)>);

impl Policy {
    /// `members` says who is in a group.
    pub(crate) fn new<'r>(
        ingress: impl IntoIterator<Item = &'r Rule>,
        egress: impl IntoIterator<Item = &'r Rule>,
        mut members: impl FnMut(ami_core::SecurityGroupId) -> Members,
    ) -> Self {
        let mut side = |rules: &mut dyn Iterator<Item = &'r Rule>| {
            Side::new(rules.map(|rule| Allowed::new(rule, &mut members)).collect())
        };
        Self { ingress: side(&mut ingress.into_iter()), egress: side(&mut egress.into_iter()) }
    }

    /// Whether a rule allows a conversation to begin with this packet.
    pub(crate) fn allows(&self, direction: Direction, flow: &Flow) -> bool {
        let peer = match direction {
            Direction::Ingress => flow.source,
            Direction::Egress => flow.destination,
        };
        let is_peer = |peers: &Peers| peers.have(peer);
        self.side(direction)
            .allowed
            .iter()
            .any(|allowed| allowed.covers(&flow.transport) && is_peer(&allowed.peers))
    }

    /// The same of a packet to the instance from one who is in no group, whatever address it is from: one outside the VPC, or who
    /// passes it on for another.
    pub(crate) fn allows_stranger(&self, flow: &Flow) -> bool {
        let is_peer = |peers: &Peers| matches!(peers, Peers::Net { .. }) && peers.have(flow.source);
        self.ingress.allowed.iter().any(|allowed| allowed.covers(&flow.transport) && is_peer(&allowed.peers))
    }

    /// Whether a packet is of a conversation that needs no memory: of TCP or UDP, of a kind that everybody may begin,
    /// where everything may go the other way. Those are allowed packet by packet, for as long as the rules are there.
    pub(crate) fn leaves_untracked(&self, direction: Direction, flow: &Flow) -> bool {
        let (this, other) = (self.side(direction), self.side(direction.opposite()));
        let (this, other, from, to) = match flow.transport {
            Transport::Tcp { source, destination, .. } => {
                (&this.open_tcp, &other.open_tcp, source, destination)
            }
            Transport::Udp { source, destination } => (&this.open_udp, &other.open_udp, source, destination),
            Transport::Icmp { .. } | Transport::Other(_) => return false,
        };
        // It begins the conversation, or answers.
        this.contain(to) && other.are_all() || this.are_all() && other.contain(from)
    }

    fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

impl Side {
    fn new(allowed: Vec<Allowed>) -> Self {
        let open = |number| {
            let open = allowed.iter().filter(|allowed| allowed.protocol.is_none_or(|n| n == number));
            let open = open.filter(|allowed| matches!(allowed.peers, Peers::Net { mask: 0, .. }));
            Ranges::new(open.map(|allowed| (allowed.first, allowed.last)).collect())
        };
        Self { open_tcp: open(TCP), open_udp: open(UDP), allowed }
    }
}

impl Allowed {
    fn new(rule: &Rule, members: impl FnOnce(ami_core::SecurityGroupId) -> Members) -> Self {
        let protocol = match rule.protocol {
            Protocol::Any => None,
            Protocol::Tcp => Some(TCP),
            Protocol::Udp => Some(UDP),
            Protocol::Icmp => Some(ICMP),
            Protocol::Number(number) => Some(number),
        };
        let (first, last) = match &rule.ports {
            Ports::All => (0, u16::MAX),
            Ports::Range(ports) => (*ports.start(), *ports.end()),
            Ports::Icmp(kind, code) => {
                (icmp_selector(*kind, code.unwrap_or(0)), icmp_selector(*kind, code.unwrap_or(u8::MAX)))
            }
        };
        let peers = match rule.peer {
            Peer::Cidr(cidr) => {
                Peers::Net { network: u32::from(cidr.network()), mask: u32::from(cidr.netmask()) }
            }
            Peer::Group(group) => Peers::Group(members(group)),
        };
        Self { protocol, first, last, peers }
    }

    /// Whether it is about such packets, whoever sends them.
    fn covers(&self, transport: &Transport) -> bool {
        self.protocol.is_none_or(|number| number == transport.number())
            && (self.first..=self.last).contains(&selector(transport))
    }
}

impl Peers {
    fn have(&self, peer: Ipv4Addr) -> bool {
        match self {
            Self::Net { network, mask } => u32::from(peer) & mask == *network,
            Self::Group(members) => members.contains(&peer),
        }
    }
}

/// By what a protocol's rules tell packets apart: the port of the receiver, or ICMP's type and code.
fn selector(transport: &Transport) -> u16 {
    match *transport {
        Transport::Tcp { destination, .. } | Transport::Udp { destination, .. } => destination,
        Transport::Icmp { kind, code, .. } => icmp_selector(kind, code),
        Transport::Other(_) => 0,
    }
}

fn icmp_selector(kind: u8, code: u8) -> u16 {
    u16::from_be_bytes([kind, code])
}

impl Ranges {
    fn new(mut ranges: Vec<(u16, u16)>) -> Self {
        ranges.sort_unstable();
        let mut apart: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges.into_iter().filter(|(first, last)| first <= last) {
            match apart.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => apart.push((first, last)),
            }
        }
        Self(apart)
    }

    fn contain(&self, number: u16) -> bool {
        let behind = self.0.partition_point(|(first, _)| *first <= number);
        behind.checked_sub(1).is_some_and(|at| number <= self.0[at].1)
    }

    fn are_all(&self) -> bool {
        self.0 == [(0, u16::MAX)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_what_they_were_made_of() {
        for (ranges, expect) in [
            (vec![], vec![]),
            (vec![(5, 9), (1, 2)], vec![(1, 2), (5, 9)]),
            (vec![(1, 5), (3, 9), (10, 11)], vec![(1, 11)]),
            (vec![(1, 9), (3, 4)], vec![(1, 9)]),
            (vec![(9, 1)], vec![]),
            (vec![(0, u16::MAX), (7, u16::MAX)], vec![(0, u16::MAX)]),
        ] {
            let made = Ranges::new(ranges.clone());
            assert_eq!(made.0, expect, "{ranges:?}");
            for n in (0..20).chain([u16::MAX]) {
                let expect = ranges.iter().any(|(first, last)| (*first..=*last).contains(&n));
                assert_eq!(made.contain(n), expect, "{n} of {ranges:?}");
            }
        }
    }
}

//! What a plain model knows of a conversation: for how long it may go on at most after what passed of it last.

use std::net::Ipv4Addr;

use crate::firewall::Direction;
use crate::packet::{Flow, TcpFlags, Transport};

/// A protocol, and both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Conversation {
    pub(super) protocol: u8,
    pub(super) own: (Ipv4Addr, u16),
    pub(super) peer: (Ipv4Addr, u16),
}

/// That of a packet.
pub(super) fn conversation(way: Direction, flow: &Flow) -> Conversation {
    let (from, to) = match flow.transport {
        Transport::Tcp { source, destination, .. } | Transport::Udp { source, destination } => {
            (source, destination)
        }
        Transport::Icmp { id, .. } => (id, id),
        Transport::Other(_) => (0, 0),
    };
    let (from, to) = ((flow.source, from), (flow.destination, to));
    let (own, peer) = if way == Direction::Ingress { (to, from) } else { (from, to) };
    Conversation { protocol: flow.transport.number(), own, peer }
}

/// What has passed of one.
#[derive(Debug, Default)]
pub(super) struct Known {
    last: u32,
    protocol: u8,
    /// A client from outside was let in.
    is_admitted: bool,
    /// Something came, or went; of TCP, something that acknowledges.
    came: bool,
    went: bool,
}

impl Known {
    pub(super) fn passed(&mut self, way: Direction, flow: &Flow, now: u32) {
        (self.last, self.protocol) = (now, flow.transport.number());
        let counts = match flow.transport {
            Transport::Tcp { flags: TcpFlags { ack, rst, .. }, .. } => ack && !rst,
            _ => true,
        };
        match way {
            Direction::Ingress => self.came |= counts,
            Direction::Egress => self.went |= counts,
        }
    }

    pub(super) fn admitted(&mut self, now: u32) {
        (self.last, self.is_admitted) = (now, true);
    }

    /// Whether it may still go on. One that has shown itself to be wanted by both sides may for longer.
    pub(super) fn lives(&self, now: u32) -> bool {
        let is_wanted = self.came && (self.went || self.is_admitted);
        let patience = match self.protocol {
            6 if is_wanted => 432_000,
            17 if is_wanted => 180,
            1 | 6 | 17 => 30,
            // Of one that nothing has passed of yet.
            0 => 30,
            _ => 600,
        };
        now - self.last <= patience
    }
}

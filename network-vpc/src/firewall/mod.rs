//! Security groups: which packets an interface lets in and out.
//!
//! What a rule allows in one direction is followed in the other as well ([`conntrack`]): rules decide about
//! the first packet of a conversation, and a conversation that goes on outlives the rule that let it begin, as in
//! EC2 ("Security group connection tracking").

mod conntrack;
mod rule;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::net::Ipv4Addr;

pub(crate) use self::conntrack::Conntrack;
pub use self::rule::{Peer, Ports, Protocol, Rule};
use crate::packet::Flow;

/// Which way a packet goes through an interface, seen from its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the instance.
    Ingress,
    /// From the instance.
    Egress,
}

/// All rules of an interface's groups, with the addresses that other groups stand for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) ingress: Vec<Allowed>,
    pub(crate) egress: Vec<Allowed>,
}

/// A rule whose peer is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) rule: Rule,
    /// The addresses of the group's members, if the rule's peer is a group.
    pub(crate) members: HashSet<Ipv4Addr>,
}

impl Policy {
    /// Whether a rule allows a conversation to begin with this packet.
    pub(crate) fn allows(&self, direction: Direction, flow: &Flow) -> bool {
        let (rules, peer) = match direction {
            Direction::Ingress => (&self.ingress, flow.source),
            Direction::Egress => (&self.egress, flow.destination),
        };
        rules.iter().any(|allowed| allowed.allows(peer, flow))
    }
}

impl Allowed {
    fn allows(&self, peer: Ipv4Addr, flow: &Flow) -> bool {
        let peer = match &self.rule.peer {
            Peer::Cidr(cidr) => cidr.contains(&peer),
            Peer::Group(_) => self.members.contains(&peer),
        };
        peer && self.rule.covers(&flow.transport)
    }
}

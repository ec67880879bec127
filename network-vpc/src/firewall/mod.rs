//! Security groups: which packets an interface lets in and out.
//!
//! Rules decide about the first packet of a conversation, and what they allow in one direction is followed in the
//! other as well: a conversation that goes on outlives the rule that let it begin. As in EC2 there are conversations
//! that need no memory, those that rules allow with everybody and in both directions; these end with their rule
//! (EC2 User Guide, "Security group connection tracking").
//!
//! All of it is a function of a packet, of the rules and of the time: [`policy`] knows the rules, [`conntrack`] what
//! becomes of a conversation, [`table`] which are remembered.

mod conntrack;
mod policy;
mod rule;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use self::conntrack::Conntrack;
pub(crate) use self::policy::{Members, Policy};
pub use self::rule::{Peer, Ports, Protocol, Rule};

/// Which way a packet goes through an interface, seen from its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the instance.
    Ingress,
    /// From the instance.
    Egress,
}

impl Direction {
    pub(crate) fn opposite(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }
}

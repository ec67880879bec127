//! A rule of a security group.

use std::ops::RangeInclusive;

use ami_core::SecurityGroupId;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// Allows conversations of a protocol with a peer.
///
/// ```
/// use network_vpc::Rule;
///
/// let web = Rule::tcp(80, "0.0.0.0/0".parse()?);
/// let ssh = Rule::tcp(22, "203.0.113.7/32".parse()?).described("the office");
/// assert_ne!(web, ssh);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Rule {
    /// The protocol.
    pub protocol: Protocol,
    /// The ports at the receiver or, of ICMP, type and code.
    pub ports: Ports,
    /// Who sends or, going out, who receives.
    pub peer: Peer,
    /// What it is for.
    pub description: String,
}

/// A protocol in a [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Every one: EC2's `-1`.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP.
    Icmp,
    /// Another, by its number.
    Number(u8),
}

/// The ports in a [`Rule`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ports {
    /// Every one.
    All,
    /// From one to another.
    Range(RangeInclusive<u16>),
    /// ICMP's type and, unless any, its code.
    Icmp(u8, Option<u8>),
}

/// The peer in a [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// Addresses.
    Cidr(Ipv4Net),
    /// The interfaces that are in a group.
    Group(SecurityGroupId),
}

impl Rule {
    /// A rule that allows everything with `peer`.
    pub fn all(peer: Peer) -> Self {
        Self { protocol: Protocol::Any, ports: Ports::All, peer, description: String::new() }
    }

    /// A rule for a port of TCP.
    pub fn tcp(port: u16, peer: Ipv4Net) -> Self {
        let ports = Ports::Range(port..=port);
        Self { protocol: Protocol::Tcp, ports, ..Self::all(Peer::Cidr(peer)) }
    }

    /// A rule for ports of UDP.
    pub fn udp(ports: RangeInclusive<u16>, peer: Ipv4Net) -> Self {
        Self { protocol: Protocol::Udp, ports: Ports::Range(ports), ..Self::all(Peer::Cidr(peer)) }
    }

    /// A rule for echo requests: what `ping` sends.
    pub fn ping(peer: Ipv4Net) -> Self {
        let ports = Ports::Icmp(crate::packet::ECHO, None);
        Self { protocol: Protocol::Icmp, ports, ..Self::all(Peer::Cidr(peer)) }
    }

    /// The same with another peer.
    pub fn with_peer(self, peer: Peer) -> Self {
        Self { peer, ..self }
    }

    /// The same with a description.
    pub fn described(self, description: impl Into<String>) -> Self {
        Self { description: description.into(), ..self }
    }

    /// That protocol and ports go together, as EC2 has it.
    pub(crate) fn check(&self) -> Result<()> {
        let sound = match (&self.protocol, &self.ports) {
            (_, Ports::All) => true,
            (Protocol::Tcp | Protocol::Udp, Ports::Range(ports)) => !ports.is_empty(),
            (Protocol::Icmp, Ports::Icmp(..)) => true,
            _ => false,
        };
        if sound {
            return Ok(());
        }
        let what = format!("ports {:?} do not go with protocol {:?}", self.ports, self.protocol);
        Err(Error::new(ErrorKind::InvalidPermission, what))
    }

    /// Whether it allows the same as another, whatever it is for.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (self.protocol, &self.ports, self.peer) == (other.protocol, &other.ports, other.peer)
    }
}

//! Ways out of a VPC, and which of a subnet's packets take them (VPC User Guide, "Configure route tables").

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use ami_core::{InternetGatewayId, NetworkInterfaceId, RouteTableId, VpcId};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// A way out of a VPC, over the sockets of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InternetGateway {
    /// Its id.
    pub id: InternetGatewayId,
    /// The VPC that it leads out of, if it is attached to one.
    pub vpc_id: Option<VpcId>,
}

/// Says where a subnet's packets go that are for other addresses than its VPC's, which is always known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RouteTable {
    /// Its id.
    pub id: RouteTableId,
    /// Where it can be used.
    pub vpc_id: VpcId,
    /// Whether it is the one of all subnets that have no other.
    pub is_main: bool,
    /// What is led to by destination; the most specific destination decides. A gateway that is not attached to the
    /// VPC any more, and an interface that is gone, are black holes.
    pub routes: BTreeMap<Ipv4Net, RouteTarget>,
}

/// What a route leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum RouteTarget {
    /// A way out of the VPC.
    InternetGateway(InternetGatewayId),
    /// An interface of the VPC, whose instance passes on what is for others: a NAT instance, or one that looks at what passes.
    NetworkInterface(NetworkInterfaceId),
}

impl From<InternetGatewayId> for RouteTarget {
    fn from(id: InternetGatewayId) -> Self {
        Self::InternetGateway(id)
    }
}

impl From<NetworkInterfaceId> for RouteTarget {
    fn from(id: NetworkInterfaceId) -> Self {
        Self::NetworkInterface(id)
    }
}

impl fmt::Display for RouteTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InternetGateway(id) => id.fmt(f),
            Self::NetworkInterface(id) => id.fmt(f),
        }
    }
}

/// A route of a [`RouteTable`], and what becomes of packets that take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Route {
    /// The addresses that it is for.
    pub destination: Ipv4Net,
    /// What it leads to.
    pub target: RouteTarget,
    /// Whether it does.
    pub state: RouteState,
}

/// What becomes of packets that take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteState {
    /// They go there.
    Active,
    /// They are dropped: there is no such gateway, or it leads out of another VPC or out of none; or there is no such interface,
    /// or no instance that has it.
    Blackhole,
}

/// The routes of an interface's subnet, laid out for whoever asks of every packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Routes(Vec<(Ipv4Net, Option<Hop>)>);

/// Where packets go next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hop {
    /// Out of the VPC.
    Out,
    /// To the interface with this address.
    Interface(Ipv4Addr),
}

impl Routes {
    /// A route without a hop is a black hole.
    pub(crate) fn new(routes: impl IntoIterator<Item = (Ipv4Net, Option<Hop>)>) -> Self {
        let mut routes: Vec<_> = routes.into_iter().collect();
        routes.sort_by_key(|(destination, _)| std::cmp::Reverse(destination.prefix_len()));
        Self(routes)
    }

    /// Where packets to an address that is none of the VPC's go, if anywhere.
    pub(crate) fn hop(&self, to: Ipv4Addr) -> Option<Hop> {
        self.0.iter().find(|(destination, _)| destination.contains(&to)).and_then(|(_, hop)| *hop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_route_decides() {
        let route = |net: &str, hop| (net.parse::<Ipv4Net>().unwrap(), hop);
        let through = Some(Hop::Interface(Ipv4Addr::new(10, 0, 0, 9)));
        let routes = Routes::new([
            route("198.51.100.128/25", through),
            route("0.0.0.0/0", Some(Hop::Out)),
            route("198.51.100.0/24", None),
        ]);
        for (to, expect) in [
            ("203.0.113.1", Some(Hop::Out)),
            ("198.51.100.1", None),
            ("198.51.100.127", None),
            ("198.51.100.128", through),
            ("198.51.101.1", Some(Hop::Out)),
        ] {
            assert_eq!(routes.hop(to.parse().unwrap()), expect, "{to}");
        }
        assert_eq!(Routes::default().hop(Ipv4Addr::new(203, 0, 113, 1)), None);
    }
}

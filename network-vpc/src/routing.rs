//! Ways out of a VPC, and which of a subnet's packets take them (VPC User Guide, "Configure route tables").

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ami_core::{InternetGatewayId, RouteTableId, VpcId};
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
    /// The gateway by destination; the most specific destination decides. A gateway that is not attached to the
    /// VPC any more is a black hole.
    pub routes: BTreeMap<Ipv4Net, InternetGatewayId>,
}

/// A route of a [`RouteTable`], and what becomes of packets that take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Route {
    /// The addresses that it is for.
    pub destination: Ipv4Net,
    /// The gateway that it leads to.
    pub gateway_id: InternetGatewayId,
    /// Whether it does.
    pub state: RouteState,
}

/// What becomes of packets that take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteState {
    /// They leave.
    Active,
    /// They are dropped: there is no such gateway, or it leads out of another VPC or out of none.
    Blackhole,
}

/// The routes of an interface's subnet, laid out for whoever asks of every packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Routes(Vec<(Ipv4Net, RouteState)>);

impl Routes {
    pub(crate) fn new(routes: impl IntoIterator<Item = (Ipv4Net, RouteState)>) -> Self {
        let mut routes: Vec<_> = routes.into_iter().collect();
        routes.sort_by_key(|(destination, _)| std::cmp::Reverse(destination.prefix_len()));
        Self(routes)
    }

    /// Whether packets to an address leave the VPC.
    pub(crate) fn lead_out(&self, to: Ipv4Addr) -> bool {
        let route = self.0.iter().find(|(destination, _)| destination.contains(&to));
        route.is_some_and(|(_, state)| *state == RouteState::Active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_route_decides() {
        let route = |net: &str, state| (net.parse::<Ipv4Net>().unwrap(), state);
        let routes = Routes::new([
            route("198.51.100.128/25", RouteState::Active),
            route("0.0.0.0/0", RouteState::Active),
            route("198.51.100.0/24", RouteState::Blackhole),
        ]);
        for (to, expect) in [
            ("203.0.113.1", true),
            ("198.51.100.1", false),
            ("198.51.100.127", false),
            ("198.51.100.128", true),
            ("198.51.101.1", true),
        ] {
            assert_eq!(routes.lead_out(to.parse().unwrap()), expect, "{to}");
        }
        assert!(!Routes::default().lead_out(Ipv4Addr::new(203, 0, 113, 1)));
    }
}

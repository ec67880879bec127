//! Elastic IP addresses (EC2 User Guide, "Elastic IP addresses"): addresses of the host's that stay, whatever they
//! lead to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use ami_core::{AllocationId, AssociationId, NetworkInterfaceId, SecurityGroupRuleId};
use serde::{Deserialize, Serialize};

use crate::edge::Carrier;
use crate::{Ports, Protocol, Rule};

/// An address of the host's that is reserved until it is released. At which of its ports clients come in
/// [`public_ports`](crate::Network::public_ports) says of the interface that it leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ElasticAddress {
    /// Its id.
    pub allocation_id: AllocationId,
    /// The address.
    pub public_ip: Ipv4Addr,
    /// What it leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub association: Option<Association>,
}

/// What an [`ElasticAddress`] leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Association {
    /// Its id.
    pub association_id: AssociationId,
    /// The interface.
    pub interface_id: NetworkInterfaceId,
    /// Which of the interface's addresses.
    pub private_ip: Ipv4Addr,
}

/// The most ports of a rule, and of an address by a protocol, that are listened at.
const MOST_PORTS: usize = 64;

/// Where the host lets clients come to a public address of an interface's, and where not:
/// [`Network::public_ports`](crate::Network::public_ports).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublicPorts {
    /// The address.
    pub public_ip: Ipv4Addr,
    /// Which of the interface's addresses it leads to.
    pub private_ip: Ipv4Addr,
    /// Whether an internet gateway leads out of the interface's VPC. Where none does nobody comes in either, and it is listened
    /// nowhere.
    pub has_gateway: bool,
    /// The ports at which it is listened; none while no machine is plugged in.
    pub listened: Vec<PublicPort>,
    /// Those that the host does not give this process, as those below 1024 mostly, each with the reason.
    pub refused: Vec<(PublicPort, String)>,
    /// The rules of the interface's groups that let clients in at more ports than can be listened at, so that nobody comes to some
    /// of them: everything, or more than 64 ports at once, or what is behind the first 64 of a protocol.
    pub not_offered: Vec<SecurityGroupRuleId>,
}

/// A port of a public address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublicPort {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Its number, at the address and at the instance.
    pub port: u16,
}

impl PublicPort {
    pub(crate) fn new(carrier: Carrier, port: u16) -> Self {
        let protocol = match carrier {
            Carrier::Tcp => Protocol::Tcp,
            Carrier::Udp => Protocol::Udp,
        };
        Self { protocol, port }
    }
}

/// The ports of a rule, if it names few.
fn named(rule: &Rule) -> Option<(Carrier, RangeInclusive<u16>)> {
    let carrier = match rule.protocol {
        Protocol::Tcp => Carrier::Tcp,
        Protocol::Udp => Carrier::Udp,
        Protocol::Any | Protocol::Icmp | Protocol::Number(_) => return None,
    };
    match &rule.ports {
        Ports::Range(range) if range.len() <= MOST_PORTS => Some((carrier, range.clone())),
        _ => None,
    }
}

/// The ports at which an address is to be listened at whose interface has these rules for what comes in. A rule for
/// more than a few ports says who may come in and not what is offered.
pub(crate) fn offered<'r>(rules: impl IntoIterator<Item = &'r Rule>) -> Vec<(Carrier, u16)> {
    let mut ports = BTreeMap::<Carrier, BTreeSet<u16>>::new();
    for (carrier, range) in rules.into_iter().filter_map(named) {
        ports.entry(carrier).or_default().extend(range.filter(|port| *port != 0));
    }
    let few = |(carrier, ports): (Carrier, BTreeSet<u16>)| {
        ports.into_iter().take(MOST_PORTS).map(move |port| (carrier, port))
    };
    ports.into_iter().flat_map(few).collect()
}

/// Whether a rule lets clients in by TCP or UDP where it is not offered to come in.
pub(crate) fn is_left_out(rule: &Rule, offered: &[(Carrier, u16)]) -> bool {
    match named(rule) {
        Some((carrier, mut ports)) => !ports.all(|port| port == 0 || offered.contains(&(carrier, port))),
        None => matches!(rule.protocol, Protocol::Any | Protocol::Tcp | Protocol::Udp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_what_rules_name() {
        let udp = |ports| Rule::udp(ports, "0.0.0.0/0".parse().unwrap());
        let tcp = |ports: std::ops::RangeInclusive<u16>| {
            let mut rule = udp(ports);
            rule.protocol = Protocol::Tcp;
            rule
        };
        let all = Rule::all(crate::Peer::Cidr(ipnet::Ipv4Net::default()));
        let check = |rules: &[Rule], tcp: &[u16], udp: &[u16]| {
            let tcp = tcp.iter().map(|port| (Carrier::Tcp, *port));
            let expect: Vec<_> = tcp.chain(udp.iter().map(|port| (Carrier::Udp, *port))).collect();
            assert_eq!(offered(rules), expect, "{rules:?}");
        };
        check(&[tcp(22..=22), udp(53..=54), tcp(80..=81), tcp(80..=80)], &[22, 80, 81], &[53, 54]);
        let wide = [all, tcp(0..=65_535), udp(1..=65), tcp(0..=0)];
        check(&wide, &[], &[]);
        assert_eq!(wide.map(|rule| is_left_out(&rule, &[])), [true, true, true, false]);
        check(&[tcp(65_535..=65_535)], &[65_535], &[]);
        let many = [tcp(100..=163), tcp(1000..=1063), udp(7..=7)];
        let offered = offered(&many);
        assert_eq!(offered.len(), MOST_PORTS + 1);
        assert_eq!(many.map(|rule| is_left_out(&rule, &offered)), [false, true, false]);
        assert!(!is_left_out(&Rule::ping(ipnet::Ipv4Net::default()), &offered));
    }
}

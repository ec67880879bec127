//! Elastic IP addresses (EC2 User Guide, "Elastic IP addresses"): addresses of the host's that stay, whatever they
//! lead to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ami_core::{AllocationId, AssociationId, NetworkInterfaceId};
use serde::{Deserialize, Serialize};

use crate::edge::Carrier;
use crate::{Ports, Protocol, Rule};

/// An address of the host's that is reserved until it is released.
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

/// The ports at which an address is to be listened at whose interface has these rules for what comes in. A rule for
/// more than a few ports says who may come in and not what is offered.
pub(crate) fn offered<'r>(rules: impl IntoIterator<Item = &'r Rule>) -> Vec<(Carrier, u16)> {
    let mut ports = BTreeMap::<Carrier, BTreeSet<u16>>::new();
    for rule in rules {
        let carrier = match rule.protocol {
            Protocol::Tcp => Carrier::Tcp,
            Protocol::Udp => Carrier::Udp,
            Protocol::Any | Protocol::Icmp | Protocol::Number(_) => continue,
        };
        if let Ports::Range(range) = &rule.ports {
            if range.len() <= MOST_PORTS {
                ports.entry(carrier).or_default().extend(range.clone().filter(|port| *port != 0));
            }
        }
    }
    let few = |(carrier, ports): (Carrier, BTreeSet<u16>)| {
        ports.into_iter().take(MOST_PORTS).map(move |port| (carrier, port))
    };
    ports.into_iter().flat_map(few).collect()
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
        check(&[all, tcp(0..=65_535), udp(1..=65), tcp(0..=0)], &[], &[]);
        check(&[tcp(65_535..=65_535)], &[65_535], &[]);
        let many = [tcp(100..=163), tcp(1000..=1063), udp(7..=7)];
        assert_eq!(offered(&many).len(), MOST_PORTS + 1);
    }
}

//! Elastic IP addresses (EC2 User Guide, "Elastic IP addresses"): addresses of the host's that stay, whatever they
//! lead to.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ami_core::{AllocationId, AssociationId, NetworkInterfaceId};
use serde::{Deserialize, Serialize};

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

/// The most ports of a rule, and of an address, that are listened at.
const MOST_PORTS: usize = 64;

/// The ports at which an address is to be listened at whose interface has these rules for what comes in. A rule for
/// more than a few ports says who may come in and not what is offered.
pub(crate) fn offered<'r>(rules: impl IntoIterator<Item = &'r Rule>) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for rule in rules {
        if let (Protocol::Tcp, Ports::Range(range)) = (rule.protocol, &rule.ports) {
            let few = range.clone().filter(|port| *port != 0);
            if range.len() <= MOST_PORTS {
                ports.extend(few);
            }
        }
    }
    ports.into_iter().take(MOST_PORTS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_what_rules_name() {
        let tcp = |ports: std::ops::RangeInclusive<u16>| {
            let mut rule = Rule::udp(ports, "0.0.0.0/0".parse().unwrap());
            rule.protocol = Protocol::Tcp;
            rule
        };
        let udp = Rule::udp(53..=53, "0.0.0.0/0".parse().unwrap());
        let all = Rule::all(crate::Peer::Cidr(ipnet::Ipv4Net::default()));
        let check = |rules: &[Rule], expect: &[u16]| {
            assert_eq!(offered(rules), expect.iter().copied().collect(), "{rules:?}");
        };
        check(&[tcp(22..=22), tcp(80..=81), tcp(80..=80)], &[22, 80, 81]);
        check(&[udp, all, tcp(0..=65_535), tcp(0..=0)], &[]);
        check(&[tcp(65_535..=65_535)], &[65_535]);
        assert_eq!(offered(&[tcp(100..=163), tcp(1000..=1063)]).len(), MOST_PORTS);
    }
}

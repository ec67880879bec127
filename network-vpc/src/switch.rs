//! What becomes of a frame that an instance sends: a function of it, of what is known of its interface, and of the
//! time. It knows where each address is and learns nothing from what guests claim.

use std::net::Ipv4Addr;

use ami_core::{NetworkInterfaceId, SecurityGroupId, SubnetId, VpcId};
use instance_core::net::{Frame, MacAddress};
use ipnet::Ipv4Net;
use smoltcp::wire::Ipv4Packet;

use crate::answer;
use crate::firewall::{Conntrack, Direction, Policy};
use crate::network::DhcpSettings;
use crate::packet::{Carries, ETHERNET_LEN, Ethernet, Flow, Transport, leaves_its_own};
use crate::routing::{Hop, Routes};

#[cfg(test)]
mod tests;

/// The address of every subnet's router, as guests see it.
pub(crate) const ROUTER_MAC: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 1]);

/// The instance metadata service (EC2 User Guide, "Access instance metadata").
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The resolver, at an address that is the same everywhere; it is also the third of the VPC's.
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);

/// As which a guest sees a client on the host itself, or any whose own address means something else inside, as one of the VPC's, or
/// leads nowhere.
pub(crate) const LOCAL_CLIENT: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);

/// The port of HTTP, at which metadata is served, and of DNS.
const HTTP: u16 = 80;
pub(crate) const DNS: u16 = 53;

/// What the switch knows of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) interface: NetworkInterfaceId,
    pub(crate) vpc: VpcId,
    pub(crate) vpc_cidr: Ipv4Net,
    pub(crate) subnet_id: SubnetId,
    pub(crate) subnet: Ipv4Net,
    pub(crate) mac: MacAddress,
    pub(crate) address: Ipv4Addr,
    /// Its other addresses.
    pub(crate) secondary: Vec<Ipv4Addr>,
    /// Its Elastic IP addresses, each with its own that it leads to.
    pub(crate) public: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// The ways out of the VPC.
    pub(crate) routes: Routes,
    pub(crate) dhcp: DhcpSettings,
    /// Whether what it sends has to be from its own addresses, and what it gets for them.
    pub(crate) source_dest_check: bool,
    pub(crate) mtu: u16,
    /// The instance's name without its domain, and the domain.
    pub(crate) host_name: String,
    pub(crate) domain: String,
    pub(crate) region: String,
    pub(crate) zone: String,
    /// Its groups and their names.
    pub(crate) groups: Vec<(SecurityGroupId, String)>,
    pub(crate) policy: Policy,
}

impl View {
    /// The router of its subnet: the first address (VPC User Guide, "Subnet CIDR reservations").
    pub(crate) fn router(&self) -> Ipv4Addr {
        offset(self.subnet, 1)
    }

    /// The VPC's resolver: the second address behind the first of the VPC's.
    pub(crate) fn resolver(&self) -> Ipv4Addr {
        offset(self.vpc_cidr, 2)
    }

    /// Whether an address is its own.
    pub(crate) fn has(&self, address: Ipv4Addr) -> bool {
        address == self.address || self.secondary.contains(&address)
    }

    /// Its own addresses.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.address).chain(self.secondary.iter().copied())
    }

    pub(crate) fn is_resolver(&self, address: Ipv4Addr) -> bool {
        address == RESOLVER || address == self.resolver()
    }

    /// Whether no instance speaks from an address, not even for another: one of the network's own, or of no use outside.
    fn is_nobodys(&self, address: Ipv4Addr) -> bool {
        let is_own = [METADATA, LOCAL_CLIENT, self.router()].contains(&address) || self.is_resolver(address);
        is_own || !self.vpc_cidr.contains(&address) && !is_outside(address)
    }
}

/// The address that is so far behind a network's first.
pub(crate) fn offset(net: Ipv4Net, by: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(net.network()).wrapping_add(by))
}

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Drop,
    /// The network answers.
    Reply(Vec<u8>),
    /// It goes to the interface with this address in the same VPC, if that lets it in.
    Local(Ipv4Addr, Frame),
    /// It is for a service of the network's own, or leaves it.
    Edge(Frame),
}

/// Where the peers of an interface are: the address of the one that has an IP address.
pub(crate) type Peers<'a> = &'a dyn Fn(Ipv4Addr) -> Option<MacAddress>;

/// What becomes of a frame that the interface sends.
pub(crate) fn decide(
    view: &View,
    peers: Peers<'_>,
    table: &mut Conntrack,
    frame: Frame,
    now: u32,
) -> Verdict {
    let sent = Ethernet::parse(&frame.data).filter(|ethernet| ethernet.source == view.mac);
    match sent.map(|ethernet| ethernet.carries) {
        Some(Carries::Arp) => answer::arp(view, peers, &frame.data).map_or(Verdict::Drop, Verdict::Reply),
        Some(Carries::Ipv4) => route(view, peers, table, frame, now).unwrap_or(Verdict::Drop),
        Some(Carries::Other) | None => Verdict::Drop,
    }
}

/// None of a packet that goes nowhere.
fn route(view: &View, peers: Peers<'_>, table: &mut Conntrack, frame: Frame, now: u32) -> Option<Verdict> {
    let packet = &frame.data[ETHERNET_LEN..];
    let flow = Flow::parse(packet).filter(|_| leaves_its_own(&frame))?;
    if let Transport::Udp { source: 68, destination: 67 } = flow.transport {
        return answer::dhcp(view, packet).map(Verdict::Reply);
    }
    if view.source_dest_check && !view.has(flow.source) || view.is_nobodys(flow.source) {
        return None;
    }
    let to = flow.destination;
    if to == METADATA || view.is_resolver(to) {
        // Services of the network's own are not subject to groups (VPC User Guide, "Security groups").
        let served = match flow.transport {
            Transport::Tcp { destination, .. } => destination == if to == METADATA { HTTP } else { DNS },
            Transport::Udp { destination, .. } => to != METADATA && destination == DNS,
            _ => false,
        };
        return served.then_some(Verdict::Edge(frame));
    }
    if to == view.router() {
        return answer::echo(view, packet).map(Verdict::Reply);
    }
    let is_local = view.vpc_cidr.contains(&to);
    // Clients that are seen so come in without a way out.
    let hop = match to {
        LOCAL_CLIENT => Some(Hop::Out),
        _ if is_local => Some(Hop::Interface(to)),
        _ => view.routes.hop(to).filter(|_| is_outside(to)),
    };
    let error = Flow::parse_error(packet);
    let allowed = match error {
        Some(about) => {
            let by_rule = view.policy.allows(Direction::Egress, &flow);
            table.allows_error(&view.policy, Direction::Egress, &about, by_rule, now)
        }
        None => hop.is_some() && table.allows(&view.policy, Direction::Egress, &flow, now),
    };
    if !allowed {
        return None;
    }
    match hop? {
        Hop::Out => Some(Verdict::Edge(frame)),
        Hop::Interface(at) => forward(view, peers(at)?, to, frame).map(|frame| Verdict::Local(at, frame)),
    }
}

/// Whether an address may be one outside: one host's, and of no special use.
pub(crate) fn is_outside(address: Ipv4Addr) -> bool {
    let special = address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address.octets()[0] == 0
        || address.octets()[0] >= 240;
    !special
}

/// The frame as it arrives: within a subnet as it was sent, else from the router, one hop older.
fn forward(view: &View, receiver: MacAddress, to: Ipv4Addr, mut frame: Frame) -> Option<Frame> {
    let (header, packet) = frame.data.split_at_mut(ETHERNET_LEN);
    header[..6].copy_from_slice(&receiver.0);
    if !view.subnet.contains(&to) {
        header[6..12].copy_from_slice(&ROUTER_MAC.0);
        let mut ip = Ipv4Packet::new_unchecked(packet);
        let hops = ip.hop_limit().checked_sub(1).filter(|hops| *hops > 0)?;
        ip.set_hop_limit(hops);
        ip.fill_checksum();
    }
    Some(frame)
}

/// Who gives an interface a frame.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Giver<'a> {
    /// Another interface.
    Peer(&'a View),
    /// The edge, for somebody outside.
    Edge,
}

/// Whether the interface lets a frame in that another sends it. A group stands for its members, and for nobody who only has
/// the address of one.
pub(crate) fn admit(view: &View, from: Giver<'_>, table: &mut Conntrack, frame: &[u8], now: u32) -> bool {
    let Some(packet) = frame.get(ETHERNET_LEN..) else { return false };
    let Some(flow) = Flow::parse(packet) else { return false };
    // A route may lead what is for others to one who does not pass it on.
    if view.source_dest_check && !view.has(flow.destination) {
        return false;
    }
    let is_itself = match from {
        // It knows the router of its own subnet alone.
        Giver::Peer(_) if view.is_nobodys(flow.source) => return false,
        Giver::Peer(sender) => sender.has(flow.source),
        Giver::Edge => false,
    };
    let policy = &view.policy;
    match Flow::parse_error(packet) {
        Some(about) => {
            let by_rule = match is_itself {
                true => policy.allows(Direction::Ingress, &flow),
                false => policy.allows_stranger(&flow),
            };
            table.allows_error(policy, Direction::Ingress, &about, by_rule, now)
        }
        None if is_itself => table.allows(policy, Direction::Ingress, &flow, now),
        None => table.allows_stranger(policy, &flow, now),
    }
}

//! What a network consists of, as users see it and as it is kept.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::{
    AllocationId, DhcpOptionsId, InstanceId, InternetGatewayId, NetworkInterfaceId, RegionName, RouteTableId,
    SecurityGroupId, SecurityGroupRuleId, SubnetId, VpcId,
};
use instance_core::net::MacAddress;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::edge::Carrier;
use crate::elastic::{self, Association, ElasticAddress};
use crate::firewall::{Members, Policy};
use crate::key_pair::KeyPair;
use crate::network::DhcpOptions;
use crate::network::forwards::PublicOffers;
use crate::routing::{Hop, InternetGateway, RouteTable, RouteTarget, Routes};
use crate::switch::{View, offset};
use crate::{Error, ErrorKind, Result, Rule, dns};

/// A virtual private cloud: a network of its own, whose addresses mean nothing to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Vpc {
    /// Its id.
    pub id: VpcId,
    /// Its addresses.
    pub cidr: Ipv4Net,
    /// Whether it is the one that is there from the beginning.
    pub is_default: bool,
    /// What its guests are told of whom to ask; EC2's own set, if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhcp_options_id: Option<DhcpOptionsId>,
}

/// A part of a VPC's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Subnet {
    /// Its id.
    pub id: SubnetId,
    /// What it is a part of.
    pub vpc_id: VpcId,
    /// Its addresses. The first four and the last are the network's own.
    pub cidr: Ipv4Net,
    /// Where it is.
    pub availability_zone: String,
    /// Whether it is the one of its zone that instances are launched into whose launch names none. One of the default VPC
    /// is, which is there from the beginning.
    #[serde(default)]
    pub default_for_az: bool,
    /// Its route table; its VPC's main one, if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_table_id: Option<RouteTableId>,
    /// Whether instances that are launched into it have a public address, unless their launch says otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub map_public_ip_on_launch: bool,
}

/// Which conversations the interfaces in it may begin, and which may begin with them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SecurityGroup {
    /// Its id.
    pub id: SecurityGroupId,
    /// Its name, which no other of the VPC has.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Where it can be used.
    pub vpc_id: VpcId,
    /// What may come in.
    pub ingress: BTreeMap<SecurityGroupRuleId, Rule>,
    /// What may go out.
    pub egress: BTreeMap<SecurityGroupRuleId, Rule>,
}

/// An instance's place in a subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetworkInterface {
    /// Its id.
    pub id: NetworkInterfaceId,
    /// What it is in.
    pub subnet_id: SubnetId,
    /// The VPC of that.
    pub vpc_id: VpcId,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Its address in the subnet.
    pub private_ip: Ipv4Addr,
    /// Its other addresses in the subnet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secondary_private_ips: Vec<Ipv4Addr>,
    /// The public address that it has while its instance runs, if it was launched with one and no
    /// [Elastic IP address](crate::ElasticAddress) has taken its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_ip: Option<Ipv4Addr>,
    /// Whether it is to have one whenever its instance runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) has_public: bool,
    /// The groups it is in.
    pub groups: Vec<SecurityGroupId>,
    /// Whether it may send only what is from its own addresses, and gets only what is for them.
    pub source_dest_check: bool,
    /// The instance that has it. It goes with one that it was made for, and not with one that was launched with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Whether it was there before that instance, and stays.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stays: bool,
    /// Where on the host its ports of TCP are reached.
    pub forwards: BTreeMap<u16, SocketAddr>,
    /// For which of its ports the host's was chosen and not asked for.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) chosen_forwards: BTreeSet<u16>,
    /// Where on the host its ports of UDP are reached.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub udp_forwards: BTreeMap<u16, SocketAddr>,
    /// For which of those the host's was chosen.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) chosen_udp_forwards: BTreeSet<u16>,
}

impl NetworkInterface {
    /// All its addresses, the primary one first.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.private_ip).chain(self.secondary_private_ips.iter().copied())
    }

    /// The name of the instance in its VPC, without the domain.
    pub fn private_host_name(&self) -> String {
        dns::host_name(self.private_ip)
    }

    /// Where on the host its ports are reached by a protocol, and for which of them the host's was chosen.
    pub(crate) fn forwards_by(&self, carrier: Carrier) -> (&BTreeMap<u16, SocketAddr>, &BTreeSet<u16>) {
        match carrier {
            Carrier::Tcp => (&self.forwards, &self.chosen_forwards),
            Carrier::Udp => (&self.udp_forwards, &self.chosen_udp_forwards),
        }
    }

    /// The same, to be changed.
    pub(crate) fn forwards_mut(
        &mut self,
        carrier: Carrier,
    ) -> (&mut BTreeMap<u16, SocketAddr>, &mut BTreeSet<u16>) {
        match carrier {
            Carrier::Tcp => (&mut self.forwards, &mut self.chosen_forwards),
            Carrier::Udp => (&mut self.udp_forwards, &mut self.chosen_udp_forwards),
        }
    }
}

/// Everything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Model {
    pub(crate) format: u32,
    pub(crate) region: RegionName,
    pub(crate) vpcs: BTreeMap<VpcId, Vpc>,
    pub(crate) subnets: BTreeMap<SubnetId, Subnet>,
    pub(crate) groups: BTreeMap<SecurityGroupId, SecurityGroup>,
    pub(crate) interfaces: BTreeMap<NetworkInterfaceId, NetworkInterface>,
    pub(crate) key_pairs: BTreeMap<String, KeyPair>,
    #[serde(default)]
    pub(crate) gateways: BTreeMap<InternetGatewayId, InternetGateway>,
    #[serde(default)]
    pub(crate) route_tables: BTreeMap<RouteTableId, RouteTable>,
    #[serde(default)]
    pub(crate) addresses: BTreeMap<AllocationId, ElasticAddress>,
    #[serde(default)]
    pub(crate) dhcp_options: BTreeMap<DhcpOptionsId, DhcpOptions>,
}

impl Model {
    /// The version of how it is kept.
    pub(crate) const FORMAT: u32 = 4;

    pub(crate) fn vpc(&self, id: VpcId) -> Result<&Vpc> {
        self.vpcs.get(&id).ok_or_else(|| not_found(ErrorKind::VpcNotFound, id))
    }

    pub(crate) fn subnet(&self, id: SubnetId) -> Result<&Subnet> {
        self.subnets.get(&id).ok_or_else(|| not_found(ErrorKind::SubnetNotFound, id))
    }

    pub(crate) fn group(&self, id: SecurityGroupId) -> Result<&SecurityGroup> {
        self.groups.get(&id).ok_or_else(|| not_found(ErrorKind::GroupNotFound, id))
    }

    pub(crate) fn interface(&self, id: NetworkInterfaceId) -> Result<&NetworkInterface> {
        self.interfaces.get(&id).ok_or_else(|| not_found(ErrorKind::InterfaceNotFound, id))
    }

    pub(crate) fn interface_mut(&mut self, id: NetworkInterfaceId) -> Result<&mut NetworkInterface> {
        self.interfaces.get_mut(&id).ok_or_else(|| not_found(ErrorKind::InterfaceNotFound, id))
    }

    /// The interface and its port that are reached at an address of the host's, also where one of both is any address, but for
    /// this one.
    pub(crate) fn forwarded_at(
        &self,
        carrier: Carrier,
        at: SocketAddr,
        but: (NetworkInterfaceId, u16),
    ) -> Option<String> {
        let meets = |there: &SocketAddr| {
            let is_any = there.ip().is_unspecified() || at.ip().is_unspecified();
            there.port() == at.port() && (is_any || there.ip() == at.ip())
        };
        self.interfaces.values().find_map(|interface| {
            let is_other = |port: u16| (interface.id, port) != but;
            let mut forwards = interface.forwards_by(carrier).0.iter();
            let (port, _) = forwards.find(|(port, there)| is_other(**port) && meets(there))?;
            Some(format!("port {port} of {}", interface.id))
        })
    }

    pub(crate) fn vpc_mut(&mut self, id: VpcId) -> Result<&mut Vpc> {
        self.vpcs.get_mut(&id).ok_or_else(|| not_found(ErrorKind::VpcNotFound, id))
    }

    pub(crate) fn subnet_mut(&mut self, id: SubnetId) -> Result<&mut Subnet> {
        self.subnets.get_mut(&id).ok_or_else(|| not_found(ErrorKind::SubnetNotFound, id))
    }

    pub(crate) fn gateway(&self, id: InternetGatewayId) -> Result<&InternetGateway> {
        self.gateways.get(&id).ok_or_else(|| not_found(ErrorKind::InternetGatewayNotFound, id))
    }

    pub(crate) fn gateway_mut(&mut self, id: InternetGatewayId) -> Result<&mut InternetGateway> {
        self.gateways.get_mut(&id).ok_or_else(|| not_found(ErrorKind::InternetGatewayNotFound, id))
    }

    /// The gateway that leads out of a VPC.
    pub(crate) fn gateway_of(&self, vpc: VpcId) -> Option<&InternetGateway> {
        self.gateways.values().find(|gateway| gateway.vpc_id == Some(vpc))
    }

    pub(crate) fn route_table(&self, id: RouteTableId) -> Result<&RouteTable> {
        self.route_tables.get(&id).ok_or_else(|| not_found(ErrorKind::RouteTableNotFound, id))
    }

    pub(crate) fn route_table_mut(&mut self, id: RouteTableId) -> Result<&mut RouteTable> {
        self.route_tables.get_mut(&id).ok_or_else(|| not_found(ErrorKind::RouteTableNotFound, id))
    }

    pub(crate) fn main_route_table(&self, vpc: VpcId) -> Result<&RouteTable> {
        self.vpc(vpc)?;
        let main = self.route_tables.values().find(|table| table.vpc_id == vpc && table.is_main);
        main.ok_or_else(|| {
            not_found(ErrorKind::RouteTableNotFound, format_args!("main route table of {vpc}"))
        })
    }

    /// Where what takes a route of a VPC's goes next; nowhere, where it is a black hole.
    pub(crate) fn hop(&self, vpc: VpcId, target: RouteTarget) -> Option<Hop> {
        match target {
            RouteTarget::InternetGateway(id) => {
                self.gateways.get(&id).filter(|gateway| gateway.vpc_id == Some(vpc)).map(|_| Hop::Out)
            }
            RouteTarget::NetworkInterface(id) => {
                let there = self.interfaces.get(&id).filter(|there| there.vpc_id == vpc);
                there.map(|there| Hop::Interface(there.private_ip))
            }
        }
    }

    /// The addresses of a subnet that interfaces have.
    pub(crate) fn taken(&self, subnet: SubnetId) -> HashSet<Ipv4Addr> {
        let there = self.interfaces.values().filter(|interface| interface.subnet_id == subnet);
        there.flat_map(NetworkInterface::addresses).collect()
    }

    /// The addresses that interfaces have.
    pub(crate) fn all_addresses(&self) -> impl Iterator<Item = (VpcId, Ipv4Addr)> + '_ {
        self.interfaces.values().flat_map(|there| there.addresses().map(|address| (there.vpc_id, address)))
    }

    /// Takes an interface from its instance, with which it goes unless it stays.
    pub(crate) fn give_up(&mut self, id: NetworkInterfaceId) {
        match self.interfaces.get_mut(&id) {
            Some(there) if there.stays => {
                (there.instance_id, there.stays, there.public_ip) = (None, false, None);
            }
            _ => self.remove_interface(id),
        }
    }

    /// Removes an interface, with what leads to it.
    pub(crate) fn remove_interface(&mut self, id: NetworkInterfaceId) {
        self.disassociate(|association| association.interface_id == id);
        self.interfaces.remove(&id);
    }

    /// Has Elastic IP addresses lead nowhere that lead to what is told.
    pub(crate) fn disassociate(&mut self, gone: impl Fn(&Association) -> bool) {
        for address in self.addresses.values_mut() {
            address.association.take_if(|association| gone(association));
        }
    }

    /// The public addresses that lead to an interface, each with its own that it leads to.
    pub(crate) fn public<'m>(
        &'m self,
        interface: &NetworkInterface,
    ) -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr)> + 'm {
        let id = interface.id;
        let there =
            self.addresses.values().filter_map(|address| Some((address, address.association.as_ref()?)));
        let elastic = there.filter(move |(_, a)| a.interface_id == id);
        let own = interface.public_ip.map(|public| (public, interface.private_ip));
        elastic.map(|(address, a)| (address.public_ip, a.private_ip)).chain(own)
    }

    /// The public addresses that are taken, whether or not they lead anywhere.
    pub(crate) fn taken_public(&self) -> HashSet<Ipv4Addr> {
        let own = self.interfaces.values().filter_map(|interface| interface.public_ip);
        self.addresses.values().map(|address| address.public_ip).chain(own).collect()
    }

    /// Where public addresses are to be listened at for an interface.
    pub(crate) fn public_offers(&self, interface: &NetworkInterface) -> PublicOffers {
        let groups = interface.groups.iter().filter_map(|id| self.groups.get(id));
        let ports = elastic::offered(groups.flat_map(|group| group.ingress.values()));
        let at = |(public, to): (Ipv4Addr, Ipv4Addr)| {
            let at = |port: u16| SocketAddr::from((public, port));
            ports.iter().map(|(carrier, port)| ((*carrier, at(*port)), to)).collect::<Vec<_>>()
        };
        // Nothing comes in where no way leads out.
        let gateway = self.gateway_of(interface.vpc_id);
        self.public(interface).filter(|_| gateway.is_some()).flat_map(at).collect()
    }

    /// What the switch has to know of an interface.
    pub(crate) fn view(&self, interface: &NetworkInterface, members: &mut Memberships) -> Result<View> {
        let (subnet, vpc) = (self.subnet(interface.subnet_id)?, self.vpc(interface.vpc_id)?);
        let groups = interface.groups.iter().map(|id| self.group(*id)).collect::<Result<Vec<_>>>()?;
        let table = match subnet.route_table_id {
            Some(id) => self.route_table(id)?,
            None => self.main_route_table(vpc.id)?,
        };
        let routes = table.routes.iter().map(|(to, target)| (*to, self.hop(vpc.id, *target)));
        let options = vpc.dhcp_options_id.and_then(|id| self.dhcp_options.get(&id));
        let ingress = groups.iter().flat_map(|group| group.ingress.values());
        let egress = groups.iter().flat_map(|group| group.egress.values());
        Ok(View {
            interface: interface.id,
            vpc: vpc.id,
            vpc_cidr: vpc.cidr,
            subnet_id: subnet.id,
            subnet: subnet.cidr,
            mac: interface.mac,
            address: interface.private_ip,
            secondary: interface.secondary_private_ips.clone(),
            public: self.public(interface).collect(),
            routes: Routes::new(routes),
            dhcp: options.map(|options| options.settings.clone()).unwrap_or_default(),
            source_dest_check: interface.source_dest_check,
            mtu: MTU,
            host_name: interface.private_host_name(),
            domain: domain(&self.region),
            region: self.region.to_string(),
            zone: subnet.availability_zone.clone(),
            groups: groups.iter().map(|group| (group.id, group.name.clone())).collect(),
            policy: Policy::new(ingress, egress, |group| members.of(self, group)),
        })
    }
}

/// Who is in which group, looked up once for all the views that are made of a model.
#[derive(Debug, Default)]
pub(crate) struct Memberships(HashMap<SecurityGroupId, Members>);

impl Memberships {
    fn of(&mut self, model: &Model, group: SecurityGroupId) -> Members {
        let members = self.0.entry(group).or_insert_with(|| {
            let members = model.interfaces.values().filter(|interface| interface.groups.contains(&group));
            Members::new(members.flat_map(NetworkInterface::addresses).collect())
        });
        members.clone()
    }
}

/// The longest packet of a VPC. EC2's is 9001 within one and 1500 out of it, which cannot be told apart by a guest
/// that does not look for it.
pub(crate) const MTU: u16 = 1500;

/// The domain of instances' names (VPC User Guide, "DNS attributes"): an older one in the oldest region.
fn domain(region: &RegionName) -> String {
    match region.as_str() {
        "us-east-1" => "ec2.internal".to_owned(),
        region => format!("{region}.compute.internal"),
    }
}

/// That an address is one of the subnet's that can be given.
pub(crate) fn check_address(subnet: &Subnet, address: Ipv4Addr) -> Result<()> {
    if usable(subnet.cidr).any(|usable| usable == address) {
        return Ok(());
    }
    let what = format!("{address} is none of the addresses of {} that can be given", subnet.cidr);
    Err(Error::new(ErrorKind::InvalidAddress, what))
}

/// The addresses of a subnet that can be given: the first four and the last are not (VPC User Guide, "Subnet CIDR
/// reservations").
pub(crate) fn usable(cidr: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let size = 1u32 << (32 - cidr.prefix_len());
    (4..size - 1).map(move |by| offset(cidr, by))
}

/// That a block has a size that VPCs and subnets have.
pub(crate) fn check_block(cidr: Ipv4Net, kind: ErrorKind) -> Result<Ipv4Net> {
    if (16..=28).contains(&cidr.prefix_len()) {
        return Ok(cidr.trunc());
    }
    Err(Error::new(kind, format!("the block {cidr} is not from /16 to /28")))
}

fn not_found(kind: ErrorKind, id: impl std::fmt::Display) -> Error {
    Error::new(kind, format!("there is no {id}"))
}

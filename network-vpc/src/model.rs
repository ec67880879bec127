//! What a network consists of, as users see it and as it is kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::{
    InstanceId, NetworkInterfaceId, RegionName, SecurityGroupId, SecurityGroupRuleId, SubnetId, VpcId,
};
use instance_core::net::MacAddress;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::firewall::{Members, Policy};
use crate::key_pair::KeyPair;
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
    /// Whether a way leads out of it.
    pub internet_gateway: bool,
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
    /// The groups it is in.
    pub groups: Vec<SecurityGroupId>,
    /// Whether it may send and receive only what is from and to its own address.
    pub source_dest_check: bool,
    /// The instance that it was made for, with which it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Where on the host its ports are reached.
    pub forwards: BTreeMap<u16, SocketAddr>,
}

impl NetworkInterface {
    /// The name of the instance in its VPC, without the domain.
    pub fn private_host_name(&self) -> String {
        dns::host_name(self.private_ip)
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
}

impl Model {
    /// The version of how it is kept.
    pub(crate) const FORMAT: u32 = 1;

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

    /// The addresses of a subnet that interfaces have.
    pub(crate) fn taken(&self, subnet: SubnetId) -> HashSet<Ipv4Addr> {
        let there = self.interfaces.values().filter(|interface| interface.subnet_id == subnet);
        there.map(|interface| interface.private_ip).collect()
    }

    /// What the switch has to know of an interface.
    pub(crate) fn view(&self, interface: &NetworkInterface, members: &mut Memberships) -> Result<View> {
        let (subnet, vpc) = (self.subnet(interface.subnet_id)?, self.vpc(interface.vpc_id)?);
        let groups = interface.groups.iter().map(|id| self.group(*id)).collect::<Result<Vec<_>>>()?;
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
            internet: vpc.internet_gateway,
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
            Members::new(members.map(|interface| interface.private_ip).collect())
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

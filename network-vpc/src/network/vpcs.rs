//! VPCs and subnets of a network.

use std::collections::BTreeMap;

use ami_core::{RegionName, SubnetId, VpcId};
use ipnet::Ipv4Net;

use super::{Network, groups, no_random, routes};
use crate::model::{Model, check_block};
use crate::{Error, ErrorKind, Result, Subnet, Vpc};

/// The block of the VPC that is there from the beginning, and of its subnet (VPC User Guide, "Default VPCs").
const DEFAULT_VPC: &str = "172.31.0.0/16";
const DEFAULT_SUBNET: &str = "172.31.0.0/20";
/// The size of a default subnet's block.
const DEFAULT_PREFIX: u8 = 20;

impl Network {
    /// Makes a VPC with its default security group and its main route table. No way leads out of it until it has an
    /// [internet gateway](Self::create_internet_gateway).
    ///
    /// # Errors
    ///
    /// [`InvalidVpcRange`](ErrorKind::InvalidVpcRange), or what the host refused.
    pub fn create_vpc(&self, cidr: Ipv4Net) -> Result<Vpc> {
        let cidr = check_block(cidr, ErrorKind::InvalidVpcRange)?;
        self.change(|model| {
            let made = add_vpc(model, cidr, false)?;
            routes::add_route_table(model, made.id, true, BTreeMap::new())?;
            Ok(made)
        })
    }

    /// Deletes a VPC that nothing is in but its default group and its main route table.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), [`DependencyViolation`](ErrorKind::DependencyViolation), or what the
    /// host refused.
    pub fn delete_vpc(&self, id: VpcId) -> Result<()> {
        self.change(|model| {
            model.vpc(id)?;
            let in_use = model.subnets.values().any(|subnet| subnet.vpc_id == id)
                || model.groups.values().any(|g| g.vpc_id == id && g.name != groups::DEFAULT)
                || model.route_tables.values().any(|table| table.vpc_id == id && !table.is_main)
                || model.gateway_of(id).is_some();
            if in_use {
                let what = format!("{id} has subnets, groups, route tables or a gateway");
                return Err(Error::new(ErrorKind::DependencyViolation, what));
            }
            model.groups.retain(|_, group| group.vpc_id != id);
            model.route_tables.retain(|_, table| table.vpc_id != id);
            model.vpcs.remove(&id);
            Ok(())
        })
    }

    /// Makes the VPC again that is there from the beginning, with its subnet and its way out, where it was deleted.
    ///
    /// ```
    /// # use network_vpc::{ErrorKind, Network};
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let there = network.create_default_vpc().unwrap_err();
    /// assert_eq!(there.kind(), ErrorKind::DefaultVpcAlreadyExists);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`DefaultVpcAlreadyExists`](ErrorKind::DefaultVpcAlreadyExists), or what the host refused.
    pub fn create_default_vpc(&self) -> Result<Vpc> {
        self.change(|model| {
            if let Some(there) = model.vpcs.values().find(|vpc| vpc.is_default) {
                let what = format!("{} is the default VPC", there.id);
                return Err(Error::new(ErrorKind::DefaultVpcAlreadyExists, what));
            }
            add_default_vpc(model)
        })
    }

    /// Makes the default subnet of a zone, where it was deleted: the first /20 of the default VPC that is free. A region has one
    /// zone, whose name is that of the region and an `a`.
    ///
    /// # Errors
    ///
    /// [`DefaultVpcDoesNotExist`](ErrorKind::DefaultVpcDoesNotExist),
    /// [`DefaultSubnetAlreadyExists`](ErrorKind::DefaultSubnetAlreadyExists),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a zone that is not there,
    /// [`SubnetConflict`](ErrorKind::SubnetConflict) if no block is free, or what the host refused.
    pub fn create_default_subnet(&self, availability_zone: &str) -> Result<Subnet> {
        self.change(|model| {
            let default = model.vpcs.values().find(|vpc| vpc.is_default).cloned();
            let vpc = default.ok_or_else(|| {
                Error::new(ErrorKind::DefaultVpcDoesNotExist, "there is no default VPC for a default subnet")
            })?;
            if availability_zone != zone(model) {
                let what = format!("there is no availability zone {availability_zone}");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
            let mut inside = model.subnets.values().filter(|subnet| subnet.vpc_id == vpc.id);
            if let Some(there) = inside.find(|subnet| subnet.default_for_az) {
                let what = format!("{} is the default subnet of {availability_zone}", there.id);
                return Err(Error::new(ErrorKind::DefaultSubnetAlreadyExists, what));
            }
            let taken = |cidr: &Ipv4Net| conflict(model, vpc.id, *cidr).is_some();
            let blocks = vpc.cidr.subnets(DEFAULT_PREFIX).into_iter().flatten();
            let cidr = blocks.into_iter().find(|cidr| !taken(cidr)).ok_or_else(|| {
                let what = format!("no /{DEFAULT_PREFIX} of {} is free", vpc.cidr);
                Error::new(ErrorKind::SubnetConflict, what)
            })?;
            add_subnet(model, vpc.id, cidr, true)
        })
    }

    /// Makes a subnet.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), [`InvalidSubnetRange`](ErrorKind::InvalidSubnetRange),
    /// [`SubnetConflict`](ErrorKind::SubnetConflict), or what the host refused.
    pub fn create_subnet(&self, vpc: VpcId, cidr: Ipv4Net) -> Result<Subnet> {
        let cidr = check_block(cidr, ErrorKind::InvalidSubnetRange)?;
        self.change(|model| add_subnet(model, vpc, cidr, false))
    }

    /// Deletes a subnet without interfaces.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), [`DependencyViolation`](ErrorKind::DependencyViolation), or
    /// what the host refused.
    pub fn delete_subnet(&self, id: SubnetId) -> Result<()> {
        self.change(|model| {
            model.subnet(id)?;
            if !model.taken(id).is_empty() {
                return Err(Error::new(ErrorKind::DependencyViolation, format!("{id} has interfaces")));
            }
            model.subnets.remove(&id);
            Ok(())
        })
    }
}

pub(super) fn first_model(region: &RegionName) -> Result<Model> {
    let mut model = Model {
        format: Model::FORMAT,
        region: region.clone(),
        vpcs: Default::default(),
        subnets: Default::default(),
        groups: Default::default(),
        interfaces: Default::default(),
        key_pairs: Default::default(),
        gateways: Default::default(),
        route_tables: Default::default(),
        addresses: Default::default(),
        dhcp_options: Default::default(),
    };
    add_default_vpc(&mut model)?;
    Ok(model)
}

/// The VPC that is there from the beginning, its way out and its subnet.
fn add_default_vpc(model: &mut Model) -> Result<Vpc> {
    let constant = |text: &str| {
        text.parse().map_err(|_| Error::new(ErrorKind::InvalidVpcRange, format!("{text} is no block")))
    };
    let vpc = add_vpc(model, constant(DEFAULT_VPC)?, true)?;
    routes::lead_out(model, vpc.id)?;
    add_subnet(model, vpc.id, constant(DEFAULT_SUBNET)?, true)?;
    Ok(vpc)
}

fn add_vpc(model: &mut Model, cidr: Ipv4Net, is_default: bool) -> Result<Vpc> {
    let id = VpcId::random().map_err(no_random)?;
    let vpc = Vpc { id, cidr, is_default, dhcp_options_id: None };
    model.vpcs.insert(id, vpc.clone());
    let group = groups::default_group(id)?;
    model.groups.insert(group.id, group);
    Ok(vpc)
}

/// Has the subnet be the default one that was taken for it when none was marked: the one that is there from the beginning, or else
/// the first.
pub(super) fn mark_default_subnet(model: &mut Model) {
    let is_default = |subnet: &&mut Subnet| model.vpcs.get(&subnet.vpc_id).is_some_and(|vpc| vpc.is_default);
    let there = model.subnets.values_mut().filter(is_default);
    let first = there.min_by_key(|subnet| (subnet.cidr.to_string() != DEFAULT_SUBNET, subnet.id));
    first.into_iter().for_each(|subnet| subnet.default_for_az = true);
}

fn add_subnet(model: &mut Model, vpc: VpcId, cidr: Ipv4Net, default_for_az: bool) -> Result<Subnet> {
    let whole = model.vpc(vpc)?.cidr;
    if !whole.contains(&cidr) {
        return Err(Error::new(ErrorKind::InvalidSubnetRange, format!("{cidr} is no part of {whole}")));
    }
    if let Some(other) = conflict(model, vpc, cidr) {
        let what = format!("{cidr} overlaps {}, which has {}", other.id, other.cidr);
        return Err(Error::new(ErrorKind::SubnetConflict, what));
    }
    let id = SubnetId::random().map_err(no_random)?;
    let availability_zone = zone(model);
    let subnet = Subnet {
        id,
        vpc_id: vpc,
        cidr,
        availability_zone,
        default_for_az,
        route_table_id: None,
        map_public_ip_on_launch: false,
    };
    model.subnets.insert(id, subnet.clone());
    Ok(subnet)
}

/// The subnet of a VPC that has addresses of a block.
fn conflict(model: &Model, vpc: VpcId, cidr: Ipv4Net) -> Option<&Subnet> {
    let overlaps =
        |other: &&Subnet| other.vpc_id == vpc && (other.cidr.contains(&cidr) || cidr.contains(&other.cidr));
    model.subnets.values().find(overlaps)
}

/// The region's only zone.
fn zone(model: &Model) -> String {
    format!("{}a", model.region)
}

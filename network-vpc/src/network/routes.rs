//! Internet gateways and route tables of a network.

use std::collections::BTreeMap;

use ami_core::{InternetGatewayId, RouteTableId, SubnetId, VpcId};
use ipnet::Ipv4Net;

use super::{Network, no_random};
use crate::model::Model;
use crate::{Error, ErrorKind, InternetGateway, Result, Route, RouteState, RouteTable, RouteTarget};

/// The most routes of a table (VPC User Guide, "Amazon VPC quotas").
const MOST_ROUTES: usize = 500;

impl Network {
    /// The internet gateways.
    pub fn internet_gateways(&self) -> Vec<InternetGateway> {
        self.model().gateways.values().cloned().collect()
    }

    /// Makes a way out, which leads nowhere until it is [attached](Self::attach_internet_gateway) to a VPC and a
    /// [route](Self::create_route) names it.
    ///
    /// ```
    /// # use network_vpc::Network;
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let vpc = network.create_vpc("10.0.0.0/16".parse()?)?;
    /// let gateway = network.create_internet_gateway()?;
    /// network.attach_internet_gateway(gateway.id, vpc.id)?;
    /// let table = network.main_route_table(vpc.id)?;
    /// network.create_route(table.id, "0.0.0.0/0".parse()?, gateway.id)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// What the host refused.
    pub fn create_internet_gateway(&self) -> Result<InternetGateway> {
        self.change(|model| add_gateway(model, None))
    }

    /// Has a gateway lead out of a VPC.
    ///
    /// # Errors
    ///
    /// [`InternetGatewayNotFound`](ErrorKind::InternetGatewayNotFound), [`VpcNotFound`](ErrorKind::VpcNotFound),
    /// [`AlreadyAssociated`](ErrorKind::AlreadyAssociated) if the gateway is attached,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) if the VPC has another, or what the host refused.
    pub fn attach_internet_gateway(&self, id: InternetGatewayId, vpc: VpcId) -> Result<()> {
        self.change(|model| {
            model.vpc(vpc)?;
            if let Some(other) = model.gateway(id)?.vpc_id {
                let what = format!("{id} is attached to {other}");
                return Err(Error::new(ErrorKind::AlreadyAssociated, what));
            }
            if model.gateway_of(vpc).is_some() {
                let what = format!("{vpc} has an internet gateway already");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
            model.gateway_mut(id)?.vpc_id = Some(vpc);
            Ok(())
        })
    }

    /// Takes a gateway away from its VPC. Routes to it are black holes from now on, also for what goes on.
    ///
    /// # Errors
    ///
    /// [`InternetGatewayNotFound`](ErrorKind::InternetGatewayNotFound),
    /// [`GatewayNotAttached`](ErrorKind::GatewayNotAttached),
    /// [`DependencyViolation`](ErrorKind::DependencyViolation) while Elastic IP addresses are associated with
    /// interfaces of the VPC, or what the host refused.
    pub fn detach_internet_gateway(&self, id: InternetGatewayId, vpc: VpcId) -> Result<()> {
        self.change(|model| {
            if model.gateway(id)?.vpc_id != Some(vpc) {
                let what = format!("{id} is not attached to {vpc}");
                return Err(Error::new(ErrorKind::GatewayNotAttached, what));
            }
            let mut inside = model.interfaces.values().filter(|interface| interface.vpc_id == vpc);
            if inside.any(|interface| model.public(interface).next().is_some()) {
                let what = format!("{vpc} has mapped public addresses");
                return Err(Error::new(ErrorKind::DependencyViolation, what));
            }
            model.gateway_mut(id)?.vpc_id = None;
            Ok(())
        })
    }

    /// Deletes a gateway that is not attached.
    ///
    /// # Errors
    ///
    /// [`InternetGatewayNotFound`](ErrorKind::InternetGatewayNotFound),
    /// [`DependencyViolation`](ErrorKind::DependencyViolation), or what the host refused.
    pub fn delete_internet_gateway(&self, id: InternetGatewayId) -> Result<()> {
        self.change(|model| {
            if let Some(vpc) = model.gateway(id)?.vpc_id {
                let what = format!("{id} is attached to {vpc}");
                return Err(Error::new(ErrorKind::DependencyViolation, what));
            }
            model.gateways.remove(&id);
            Ok(())
        })
    }

    /// The route tables.
    pub fn route_tables(&self) -> Vec<RouteTable> {
        self.model().route_tables.values().cloned().collect()
    }

    /// The table of a VPC's subnets that have no other.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound).
    pub fn main_route_table(&self, vpc: VpcId) -> Result<RouteTable> {
        self.model().main_route_table(vpc).cloned()
    }

    /// The routes of a table, and which of them are black holes, as those are that lead to an interface at which nothing is.
    ///
    /// # Errors
    ///
    /// [`RouteTableNotFound`](ErrorKind::RouteTableNotFound).
    pub fn routes(&self, id: RouteTableId) -> Result<Vec<Route>> {
        let plugged = self.plugged();
        let model = self.model();
        let table = model.route_table(id)?;
        let is_there = |target: RouteTarget| match target {
            RouteTarget::InternetGateway(_) => true,
            // What is sent there is dropped by itself.
            RouteTarget::NetworkInterface(id) => {
                model.interface(id).is_ok_and(|there| there.instance_id.is_some())
                    || plugged.get(&id).is_some_and(|there| there.port.is_plugged())
            }
        };
        let route = |(to, target): (&Ipv4Net, &RouteTarget)| Route {
            destination: *to,
            target: *target,
            state: match model.hop(table.vpc_id, *target) {
                Some(_) if is_there(*target) => RouteState::Active,
                _ => RouteState::Blackhole,
            },
        };
        Ok(table.routes.iter().map(route).collect())
    }

    /// Makes a route table without routes: what is for the VPC's own addresses needs none.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), or what the host refused.
    pub fn create_route_table(&self, vpc: VpcId) -> Result<RouteTable> {
        self.change(|model| {
            model.vpc(vpc)?;
            add_route_table(model, vpc, false, BTreeMap::new())
        })
    }

    /// Deletes a route table that no subnet has.
    ///
    /// # Errors
    ///
    /// [`RouteTableNotFound`](ErrorKind::RouteTableNotFound),
    /// [`DependencyViolation`](ErrorKind::DependencyViolation), or what the host refused.
    pub fn delete_route_table(&self, id: RouteTableId) -> Result<()> {
        self.change(|model| {
            let in_use = model.route_table(id)?.is_main
                || model.subnets.values().any(|subnet| subnet.route_table_id == Some(id));
            if in_use {
                return Err(Error::new(ErrorKind::DependencyViolation, format!("{id} is needed")));
            }
            model.route_tables.remove(&id);
            Ok(())
        })
    }

    /// Adds a route, to an internet gateway or to an interface. What leads to an interface comes to its machine if its
    /// [check](Self::set_source_dest_check) is off and its groups let it in; where that passes it on to, the route table of its own
    /// subnet says.
    ///
    /// ```
    /// # use network_vpc::{InterfaceSpec, Network};
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let nat = network.create_interface(network.interface_spec()?.source_dest_check(false))?;
    /// let private = network.create_subnet(network.default_vpc()?, "172.31.64.0/20".parse()?)?;
    /// let table = network.create_route_table(private.vpc_id)?;
    /// network.create_route(table.id, "0.0.0.0/0".parse()?, nat.id)?;
    /// network.set_route_table(private.id, Some(table.id))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`RouteTableNotFound`](ErrorKind::RouteTableNotFound),
    /// [`InternetGatewayNotFound`](ErrorKind::InternetGatewayNotFound),
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound),
    /// [`RouteAlreadyExists`](ErrorKind::RouteAlreadyExists), [`InvalidParameter`](ErrorKind::InvalidParameter) for a
    /// gateway or an interface of another VPC or a destination within the table's own,
    /// [`RoutesLimit`](ErrorKind::RoutesLimit), or what the host refused.
    pub fn create_route(&self, id: RouteTableId, to: Ipv4Net, target: impl Into<RouteTarget>) -> Result<()> {
        self.set_route(id, to.trunc(), target.into(), false)
    }

    /// Has a route of a table lead to something else.
    ///
    /// # Errors
    ///
    /// As [`create_route`](Self::create_route), and [`RouteNotFound`](ErrorKind::RouteNotFound).
    pub fn replace_route(&self, id: RouteTableId, to: Ipv4Net, target: impl Into<RouteTarget>) -> Result<()> {
        self.set_route(id, to.trunc(), target.into(), true)
    }

    fn set_route(&self, id: RouteTableId, to: Ipv4Net, target: RouteTarget, there: bool) -> Result<()> {
        self.change(|model| {
            let table = model.route_table(id)?;
            let (is_there, is_full) = (table.routes.contains_key(&to), table.routes.len() >= MOST_ROUTES);
            let vpc = model.vpc(table.vpc_id)?;
            match target {
                RouteTarget::InternetGateway(gateway) => _ = model.gateway(gateway)?,
                RouteTarget::NetworkInterface(interface) => _ = model.interface(interface)?,
            }
            if model.hop(vpc.id, target).is_none() {
                let what = format!("{target} does not belong to {}, whose table {id} is", vpc.id);
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
            if vpc.cidr.contains(&to) {
                let what = format!("{to} is a part of {}, which is local", vpc.cidr);
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
            match (there, is_there) {
                (false, true) => {
                    return Err(Error::new(
                        ErrorKind::RouteAlreadyExists,
                        format!("{id} has a route to {to}"),
                    ));
                }
                (true, false) => return Err(no_route(id, to)),
                (false, false) if is_full => {
                    let what = format!("{id} has {MOST_ROUTES} routes, which is the most");
                    return Err(Error::new(ErrorKind::RoutesLimit, what));
                }
                _ => {}
            }
            model.route_table_mut(id)?.routes.insert(to, target);
            Ok(())
        })
    }

    /// Takes a route away.
    ///
    /// # Errors
    ///
    /// [`RouteTableNotFound`](ErrorKind::RouteTableNotFound), [`RouteNotFound`](ErrorKind::RouteNotFound), or what the
    /// host refused.
    pub fn delete_route(&self, id: RouteTableId, to: Ipv4Net) -> Result<()> {
        let to = to.trunc();
        self.change(|model| {
            model.route_table_mut(id)?.routes.remove(&to).map(drop).ok_or_else(|| no_route(id, to))
        })
    }

    /// Gives a subnet a table of its own, or with none its VPC's main one again.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), [`RouteTableNotFound`](ErrorKind::RouteTableNotFound),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a table of another VPC, or what the host refused.
    pub fn set_route_table(&self, subnet: SubnetId, table: Option<RouteTableId>) -> Result<()> {
        self.change(|model| {
            let vpc = model.subnet(subnet)?.vpc_id;
            if let Some(id) = table {
                if model.route_table(id)?.vpc_id != vpc {
                    let what = format!("{id} and {subnet} belong to different VPCs");
                    return Err(Error::new(ErrorKind::InvalidParameter, what));
                }
            }
            model.subnet_mut(subnet)?.route_table_id = table;
            Ok(())
        })
    }
}

fn no_route(id: RouteTableId, to: Ipv4Net) -> Error {
    Error::new(ErrorKind::RouteNotFound, format!("{id} has no route to {to}"))
}

pub(super) fn add_gateway(model: &mut Model, vpc_id: Option<VpcId>) -> Result<InternetGateway> {
    let id = InternetGatewayId::random().map_err(no_random)?;
    let gateway = InternetGateway { id, vpc_id };
    model.gateways.insert(id, gateway.clone());
    Ok(gateway)
}

pub(super) fn add_route_table(
    model: &mut Model,
    vpc_id: VpcId,
    is_main: bool,
    routes: BTreeMap<Ipv4Net, RouteTarget>,
) -> Result<RouteTable> {
    let id = RouteTableId::random().map_err(no_random)?;
    let table = RouteTable { id, vpc_id, is_main, routes };
    model.route_tables.insert(id, table.clone());
    Ok(table)
}

/// What the VPC that is there from the beginning has: a gateway, and a main table that leads everything to it.
pub(super) fn lead_out(model: &mut Model, vpc: VpcId) -> Result<()> {
    let gateway = add_gateway(model, Some(vpc))?.id;
    let everything = BTreeMap::from([(Ipv4Net::default(), gateway.into())]);
    add_route_table(model, vpc, true, everything).map(drop)
}

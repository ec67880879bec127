//! Public addresses that interfaces have while their instances run (EC2 User Guide, "Public IPv4 addresses").

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::{NetworkInterfaceId, SecurityGroupRuleId, SubnetId};
use ipnet::Ipv4Net;

use super::{Network, Plugged, no_random};
use crate::elastic::{self, PublicPort, PublicPorts};
use crate::model::Model;
use crate::switch::offset;
use crate::{Error, ErrorKind, NetworkInterface, Result};

impl Network {
    /// Whether instances that are launched into a subnet from now on have a public address while they run, unless their
    /// launch says otherwise (`MapPublicIpOnLaunch`). They have not before this is said, in the default subnet neither,
    /// unlike EC2's.
    ///
    /// The address is one of the [pool](super::NetworkOptions::elastic_pool) of the Elastic IP addresses and is listened at
    /// [like those](Self::associate_address). An instance has another each time that it is started, and none any more
    /// when an Elastic IP address leads to its primary address. When that leads there no longer, it is given another at
    /// once. Where none is free by then, it goes on without, over reboots too; it is only started with one.
    ///
    /// ```
    /// # use network_vpc::Network;
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let subnet = network.subnets()[0].id;
    /// network.set_map_public_ip_on_launch(subnet, true)?;
    /// assert!(network.subnets()[0].map_public_ip_on_launch);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), or what the host refused.
    pub fn set_map_public_ip_on_launch(&self, subnet: SubnetId, on: bool) -> Result<()> {
        self.change(|model| {
            model.subnet_mut(subnet)?.map_public_ip_on_launch = on;
            Ok(())
        })
    }

    /// At which ports clients come to the public addresses of an interface's, and at which the host does not let them: an address
    /// is of use only where it is listened.
    ///
    /// ```
    /// # use network_vpc::{Direction, Network, Rule};
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// # let group = network.create_security_group(network.default_vpc()?, "web", "")?;
    /// network.authorize(group.id, Direction::Ingress, Rule::tcp(80, "0.0.0.0/0".parse()?))?;
    /// # let interface = network.create_interface(network.interface_spec()?.groups([group.id]))?;
    /// network.associate_address(network.allocate_address()?.allocation_id, interface.id, None)?;
    /// let machine = network.plug(interface.id)?;
    /// for address in network.public_ports(interface.id)? {
    ///     for (at, why) in address.refused {
    ///         eprintln!("nobody comes to port {} of {}: {why}", at.port, address.public_ip);
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound).
    pub fn public_ports(&self, id: NetworkInterfaceId) -> Result<Vec<PublicPorts>> {
        let plugged = self.plugged();
        let model = self.model();
        let interface = model.interface(id)?;
        let there = plugged.get(&id).filter(|there| there.port.is_plugged());
        let not_offered = model.rules_not_offered(interface);
        let has_gateway = model.gateway_of(interface.vpc_id).is_some();
        let ports = |(public_ip, private_ip): (Ipv4Addr, Ipv4Addr)| {
            let mut ports = PublicPorts {
                public_ip,
                private_ip,
                has_gateway,
                listened: Vec::new(),
                refused: Vec::new(),
                not_offered: not_offered.clone(),
            };
            let own = |at: &SocketAddr| at.ip() == public_ip;
            if let Some(there) = there {
                let listened = there.public.keys().filter(|(_, at)| own(at));
                ports.listened = listened.map(|(by, at)| PublicPort::new(*by, at.port())).collect();
                let refused = there.refused.iter().filter(|((_, at), _)| own(at));
                let refused = refused.map(|((by, at), why)| (PublicPort::new(*by, at.port()), why.clone()));
                ports.refused = refused.collect();
            }
            ports
        };
        Ok(model.public(interface).map(ports).collect())
    }

    /// Gives an interface a public address that is about to be plugged in, if it is to have one and has none.
    pub(super) fn give_public_ip(
        &self,
        plugged: &mut HashMap<NetworkInterfaceId, Plugged>,
        id: NetworkInterfaceId,
    ) -> Result<()> {
        if !self.model().lacks_public_ip(id) {
            return Ok(());
        }
        let begin = self.anywhere()?;
        self.change_with(plugged, |model| {
            let public = any_free_while_running(model, self.0.elastic_pool, begin)?;
            model.interface_mut(id)?.public_ip = Some(public);
            Ok(())
        })
    }

    /// Takes the public address from an interface that it has only while it is plugged in, which it is no longer.
    pub(super) fn take_public_ip(
        &self,
        plugged: &mut HashMap<NetworkInterfaceId, Plugged>,
        id: NetworkInterfaceId,
    ) {
        if self.model().interfaces.get(&id).is_none_or(|interface| interface.public_ip.is_none()) {
            return;
        }
        let taken = self.change_with(plugged, |model| {
            model.interface_mut(id)?.public_ip = None;
            Ok(())
        });
        if let Err(error) = taken {
            tracing::warn!(%error, %id, "an interface that is not plugged in keeps its public address");
        }
    }

    /// Makes a change after which Elastic IP addresses lead elsewhere. From whom one went that is plugged in and is to have
    /// a public address has another by the same change, if there is one.
    pub(super) fn change_associations<T>(&self, change: impl FnOnce(&mut Model) -> Result<T>) -> Result<T> {
        let begin = self.anywhere()?;
        let mut plugged = self.plugged();
        let is_plugged =
            |(id, there): (&NetworkInterfaceId, &Plugged)| there.port.is_plugged().then_some(*id);
        let there: Vec<_> = plugged.iter().filter_map(is_plugged).collect();
        self.change_with(&mut plugged, |model| {
            let had: Vec<_> = there.into_iter().filter(|id| !model.lacks_public_ip(*id)).collect();
            let made = change(model)?;
            for id in had {
                if !model.lacks_public_ip(id) {
                    continue;
                }
                match any_free_while_running(model, self.0.elastic_pool, begin) {
                    Ok(public) => model.interface_mut(id)?.public_ip = Some(public),
                    Err(error) => {
                        tracing::warn!(%error, %id, "an interface goes on without a public address")
                    }
                }
            }
            Ok(made)
        })
    }

    /// Where in the pool to begin to look for a free address, as other networks of this host have the same.
    pub(super) fn anywhere(&self) -> Result<u32> {
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|e| no_random(e.into()))?;
        Ok(u32::from_ne_bytes(random))
    }
}

impl Model {
    /// The public address by which an interface is reached at its primary one.
    pub(super) fn primary_public_ip(&self, interface: &NetworkInterface) -> Option<Ipv4Addr> {
        self.public(interface).find(|(_, own)| *own == interface.private_ip).map(|(public, _)| public)
    }

    /// The rules by which clients may come to an interface where it is listened at none of its public addresses for them.
    pub(crate) fn rules_not_offered(&self, interface: &NetworkInterface) -> Vec<SecurityGroupRuleId> {
        let groups = || interface.groups.iter().filter_map(|id| self.groups.get(id));
        let offered = elastic::offered(groups().flat_map(|group| group.ingress.values()));
        let rules = groups().flat_map(|group| &group.ingress);
        rules.filter(|(_, rule)| elastic::is_left_out(rule, &offered)).map(|(id, _)| *id).collect()
    }

    /// Whether an interface is to have a public address while it is plugged in, and has none.
    fn lacks_public_ip(&self, id: NetworkInterfaceId) -> bool {
        let lacks = |there: &NetworkInterface| there.has_public && self.primary_public_ip(there).is_none();
        self.interface(id).is_ok_and(lacks)
    }
}

/// One for who has it while it runs.
pub(super) fn any_free_while_running(model: &Model, pool: Ipv4Net, begin: u32) -> Result<Ipv4Addr> {
    any_free(model, pool, begin, ErrorKind::InsufficientAddressCapacity)
}

/// An address of the pool that nobody has. Says what kind of failure it is if there is none.
pub(super) fn any_free(model: &Model, pool: Ipv4Net, begin: u32, none: ErrorKind) -> Result<Ipv4Addr> {
    let taken = model.taken_public();
    // Neither the first nor the last.
    let last = u32::MAX.checked_shr(pool.prefix_len().into()).unwrap_or(0);
    let usable = last.saturating_sub(1);
    let begin = begin.checked_rem(usable).unwrap_or(0);
    let mut all = (0..usable).map(|n| offset(pool, 1 + (begin + n) % usable));
    all.find(|address| !taken.contains(address))
        .ok_or_else(|| Error::new(none, format!("every address of {pool} is taken")))
}

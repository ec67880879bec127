//! Elastic IP addresses of a network.

use std::net::Ipv4Addr;

use ami_core::{AllocationId, AssociationId, NetworkInterfaceId};

use super::public::any_free;
use super::{Network, no_random};
use crate::elastic::{Association, ElasticAddress};
use crate::model::Model;
use crate::{Error, ErrorKind, Result};

impl Network {
    /// The Elastic IP addresses.
    pub fn addresses(&self) -> Vec<ElasticAddress> {
        self.model().addresses.values().cloned().collect()
    }

    /// Reserves an address out of the [pool](super::NetworkOptions::elastic_pool).
    ///
    /// ```
    /// # use network_vpc::{Direction, Network, Rule};
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let group = network.create_security_group(network.default_vpc()?, "web", "")?;
    /// network.authorize(group.id, Direction::Ingress, Rule::tcp(8080, "0.0.0.0/0".parse()?))?;
    /// let interface = network.create_interface(network.interface_spec()?.groups([group.id]))?;
    ///
    /// let address = network.allocate_address()?;
    /// network.associate_address(address.allocation_id, interface.id, None)?;
    /// println!("http://{}:8080/", address.public_ip);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AddressLimit`](ErrorKind::AddressLimit) if none is left, or what the host refused.
    pub fn allocate_address(&self) -> Result<ElasticAddress> {
        let begin = self.anywhere()?;
        let allocation_id = AllocationId::random().map_err(no_random)?;
        self.change(|model| {
            let public_ip = any_free(model, self.0.elastic_pool, begin, ErrorKind::AddressLimit)?;
            let made = ElasticAddress { allocation_id, public_ip, association: None };
            model.addresses.insert(allocation_id, made.clone());
            Ok(made)
        })
    }

    /// Has an Elastic IP address lead to an interface, to its primary address unless another of its is named, and to
    /// nothing else any more. Whatever led there before does so no longer.
    ///
    /// The address is listened at, while a machine is plugged in, at those ports of TCP and of UDP that rules of the
    /// interface's groups name one by one or in ranges of up to 64, and at the first 64 of each protocol; what comes in is
    /// then up to the rules, as in [`forward`]. Ports that the host does not give this process, such as those below 1024,
    /// are not: [`public_ports`](Self::public_ports) says where it is listened. A ping of the address is answered by the host's kernel, not by the guest.
    ///
    /// [`forward`]: Self::forward
    ///
    /// # Errors
    ///
    /// [`AllocationNotFound`](ErrorKind::AllocationNotFound), [`InterfaceNotFound`](ErrorKind::InterfaceNotFound),
    /// [`InvalidAddress`](ErrorKind::InvalidAddress) for an address that the interface has not,
    /// [`GatewayNotAttached`](ErrorKind::GatewayNotAttached) in a VPC without an internet gateway, or what the host
    /// refused.
    pub fn associate_address(
        &self,
        allocation: AllocationId,
        interface_id: NetworkInterfaceId,
        private_ip: Option<Ipv4Addr>,
    ) -> Result<AssociationId> {
        let association_id = AssociationId::random().map_err(no_random)?;
        self.change_associations(|model| {
            address(model, allocation)?;
            let interface = model.interface(interface_id)?;
            let private_ip = private_ip.unwrap_or(interface.private_ip);
            if !interface.addresses().any(|own| own == private_ip) {
                let what = format!("{interface_id} has no address {private_ip}");
                return Err(Error::new(ErrorKind::InvalidAddress, what));
            }
            if model.gateway_of(interface.vpc_id).is_none() {
                let what = format!("{} is not attached to any internet gateway", interface.vpc_id);
                return Err(Error::new(ErrorKind::GatewayNotAttached, what));
            }
            let same = |a: &mut Association| a.interface_id == interface_id && a.private_ip == private_ip;
            for other in model.addresses.values_mut() {
                other.association.take_if(same);
            }
            let made = Association { association_id, interface_id, private_ip };
            address(model, allocation)?.association = Some(made);
            let interface = model.interface_mut(interface_id)?;
            if interface.private_ip == private_ip {
                interface.public_ip = None;
            }
            Ok(association_id)
        })
    }

    /// Has an Elastic IP address lead to nothing. Conversations go on. An interface that had another public address before
    /// is [given one](Self::set_map_public_ip_on_launch) instead.
    ///
    /// # Errors
    ///
    /// [`AssociationNotFound`](ErrorKind::AssociationNotFound), or what the host refused.
    pub fn disassociate_address(&self, id: AssociationId) -> Result<()> {
        self.change_associations(|model| {
            let taken =
                |address: &mut ElasticAddress| address.association.take_if(|a| a.association_id == id);
            model.addresses.values_mut().find_map(taken).map(drop).ok_or_else(|| {
                Error::new(ErrorKind::AssociationNotFound, format!("there is no association {id}"))
            })
        })
    }

    /// Gives an Elastic IP address back.
    ///
    /// # Errors
    ///
    /// [`AllocationNotFound`](ErrorKind::AllocationNotFound), [`AddressInUse`](ErrorKind::AddressInUse) while it is
    /// associated, or what the host refused.
    pub fn release_address(&self, allocation: AllocationId) -> Result<()> {
        self.change(|model| {
            let address = address(model, allocation)?;
            if address.association.is_some() {
                let what = format!("{} is associated", address.public_ip);
                return Err(Error::new(ErrorKind::AddressInUse, what));
            }
            model.addresses.remove(&allocation);
            Ok(())
        })
    }
}

fn address(model: &mut Model, id: AllocationId) -> Result<&mut ElasticAddress> {
    let found = model.addresses.get_mut(&id);
    found.ok_or_else(|| Error::new(ErrorKind::AllocationNotFound, format!("there is no address {id}")))
}

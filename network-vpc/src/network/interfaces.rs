//! Interfaces of a network.

use std::net::Ipv4Addr;

use ami_core::{InstanceId, NetworkInterfaceId, SecurityGroupId, SubnetId};
use instance_core::net::MacAddress;
use ipnet::Ipv4Net;

use super::public::any_free_while_running;
use super::{Network, groups, no_random};
use crate::model::{Model, check_address, usable};
use crate::{Error, ErrorKind, NetworkInterface, Result, Subnet};

/// The most addresses of an interface: what EC2's larger types have.
const MOST_ADDRESSES: usize = 50;

/// What an interface is made by: [`Network::create_interface`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceSpec {
    subnet: SubnetId,
    groups: Vec<SecurityGroupId>,
    private_ip: Option<Ipv4Addr>,
    public_ip: Option<bool>,
    source_dest_check: bool,
}

impl InterfaceSpec {
    /// An interface in a subnet, in no group yet.
    pub fn new(subnet: SubnetId) -> Self {
        Self { subnet, groups: Vec::new(), private_ip: None, public_ip: None, source_dest_check: true }
    }

    /// In these groups; in its VPC's default one, if in none.
    pub fn groups(mut self, groups: impl IntoIterator<Item = SecurityGroupId>) -> Self {
        self.groups = groups.into_iter().collect();
        self
    }

    /// With this address.
    pub fn private_ip(mut self, address: Ipv4Addr) -> Self {
        self.private_ip = Some(address);
        self
    }

    /// Whether it has a public address while it is plugged in. If nothing is said, it has one if it is made for an instance
    /// and its subnet [says so](Network::set_map_public_ip_on_launch).
    pub fn associate_public_ip_address(mut self, associate: bool) -> Self {
        self.public_ip = Some(associate);
        self
    }

    /// Whether it may send only what is from its own addresses and gets only what is for them, which is so unless this says
    /// otherwise.
    pub fn source_dest_check(mut self, on: bool) -> Self {
        self.source_dest_check = on;
        self
    }
}

impl Network {
    /// What an interface is made by that is in the default subnet.
    ///
    /// # Errors
    ///
    /// [`VpcNotSpecified`](ErrorKind::VpcNotSpecified) if there is no default VPC any more, and
    /// [`SubnetNotSpecified`](ErrorKind::SubnetNotSpecified) if that has no default subnet: no other takes its place.
    pub fn interface_spec(&self) -> Result<InterfaceSpec> {
        let vpc = self.default_vpc()?;
        let model = self.model();
        let subnet = model.subnets.values().find(|subnet| subnet.vpc_id == vpc && subnet.default_for_az);
        let subnet = subnet.ok_or_else(|| {
            Error::new(ErrorKind::SubnetNotSpecified, format!("{vpc} has no default subnet: name one"))
        })?;
        Ok(InterfaceSpec::new(subnet.id))
    }

    /// Makes an interface.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), [`SubnetFull`](ErrorKind::SubnetFull),
    /// [`InvalidAddress`](ErrorKind::InvalidAddress), [`AddressInUse`](ErrorKind::AddressInUse),
    /// [`GroupNotFound`](ErrorKind::GroupNotFound), or what the host refused.
    pub fn create_interface(&self, spec: InterfaceSpec) -> Result<NetworkInterface> {
        self.create_interface_for(None, spec)
    }

    pub(super) fn create_interface_for(
        &self,
        instance_id: Option<InstanceId>,
        spec: InterfaceSpec,
    ) -> Result<NetworkInterface> {
        let new = self.new_interface()?;
        self.change(|model| new.put_into(model, instance_id, spec))
    }

    /// Whether so many interfaces can be made for instances, which are not.
    pub(super) fn check_interfaces(&self, spec: &InterfaceSpec, count: u32) -> Result<()> {
        let mut model = self.model().clone();
        let nobody = InstanceId::from_bytes([0; 16]);
        let mut make = |_| {
            self.new_interface()?.put_into(&mut model, Some(nobody), spec.clone())?;
            Ok(())
        };
        (0..count).try_for_each(&mut make)
    }

    fn new_interface(&self) -> Result<NewInterface> {
        let id = NetworkInterfaceId::random().map_err(no_random)?;
        Ok(NewInterface { id, mac: random_mac()?, pool: self.0.elastic_pool, begin: self.anywhere()? })
    }

    /// Gives an interface that is there to an instance.
    pub(super) fn take_interface(
        &self,
        instance: InstanceId,
        id: NetworkInterfaceId,
    ) -> Result<NetworkInterface> {
        self.change(|model| {
            check_unused(model.interface(id)?)?;
            let interface = model.interface_mut(id)?;
            (interface.instance_id, interface.stays) = (Some(instance), true);
            Ok(interface.clone())
        })
    }

    /// Whether an interface can be given to an instance.
    pub(super) fn check_interface(&self, id: NetworkInterfaceId) -> Result<()> {
        check_unused(self.model().interface(id)?)
    }

    /// Whether an interface may send only what is from its own addresses, and gets only what is for them: not so one of an
    /// instance that passes on what others send, to which [routes](Self::create_route) may lead. It is still in no group of
    /// theirs, as far as rules go. In force when this returns.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), or what the host refused.
    pub fn set_source_dest_check(&self, id: NetworkInterfaceId, on: bool) -> Result<()> {
        self.change(|model| {
            model.interface_mut(id)?.source_dest_check = on;
            Ok(())
        })
    }

    /// Puts an interface into other groups. Those conversations go on that were allowed.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`GroupNotFound`](ErrorKind::GroupNotFound), or what the
    /// host refused.
    pub fn modify_groups(&self, id: NetworkInterfaceId, groups: &[SecurityGroupId]) -> Result<()> {
        self.change(|model| {
            let vpc = model.interface(id)?.vpc_id;
            let groups = groups::of_interface(model, vpc, groups.to_vec())?;
            model.interface_mut(id)?.groups = groups;
            Ok(())
        })
    }

    /// Gives an interface these addresses of its subnet beside the one that it has. DHCP tells its guest of none of
    /// them; metadata does.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InvalidAddress`](ErrorKind::InvalidAddress),
    /// [`AddressInUse`](ErrorKind::AddressInUse), also by the interface itself,
    /// [`PrivateAddressLimit`](ErrorKind::PrivateAddressLimit), or what the host refused; then it has none of them.
    pub fn assign_private_ips(&self, id: NetworkInterfaceId, addresses: &[Ipv4Addr]) -> Result<()> {
        self.change(|model| {
            for address in addresses {
                let subnet = model.subnet(model.interface(id)?.subnet_id)?.clone();
                let address = free(model, &subnet, *address)?;
                add_address(model, id, address)?;
            }
            Ok(())
        })
    }

    /// Gives an interface so many addresses more that are free, and says which.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`SubnetFull`](ErrorKind::SubnetFull),
    /// [`PrivateAddressLimit`](ErrorKind::PrivateAddressLimit), or what the host refused; then it has none of them.
    pub fn assign_any_private_ips(&self, id: NetworkInterfaceId, count: usize) -> Result<Vec<Ipv4Addr>> {
        self.change(|model| {
            let subnet = model.subnet(model.interface(id)?.subnet_id)?.clone();
            let one = |_| {
                let address = any_free(model, &subnet)?;
                add_address(model, id, address)
            };
            (0..count).map(one).collect()
        })
    }

    /// Takes addresses from an interface, with the Elastic IP addresses that lead to them, but not the one that it was
    /// made with.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InvalidAddress`](ErrorKind::InvalidAddress) for one that
    /// it has not got or was made with, or what the host refused.
    pub fn unassign_private_ips(&self, id: NetworkInterfaceId, addresses: &[Ipv4Addr]) -> Result<()> {
        self.change(|model| {
            for address in addresses {
                let there = &mut model.interface_mut(id)?.secondary_private_ips;
                let Some(at) = there.iter().position(|own| own == address) else {
                    let what = format!("{address} is no secondary address of {id}");
                    return Err(Error::new(ErrorKind::InvalidAddress, what));
                };
                there.remove(at);
                model.disassociate(|a| a.interface_id == id && a.private_ip == *address);
            }
            Ok(())
        })
    }

    /// Deletes an interface that no instance has, not even one that is stopped, and that is not plugged in.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InterfaceInUse`](ErrorKind::InterfaceInUse), or what
    /// the host refused.
    pub fn delete_interface(&self, id: NetworkInterfaceId) -> Result<()> {
        let mut plugged = self.plugged();
        let is_plugged = plugged.get(&id).is_some_and(|plugged| plugged.port.is_plugged());
        self.change_with(&mut plugged, |model| {
            let used = match model.interface(id)?.instance_id {
                Some(instance) => Some(format!("{instance} has {id}")),
                None => is_plugged.then(|| format!("{id} is plugged in")),
            };
            if let Some(what) = used {
                return Err(Error::new(ErrorKind::InterfaceInUse, what));
            }
            model.remove_interface(id);
            Ok(())
        })?;
        // Its machine is gone, and nobody else may plug it in any more.
        let before = plugged.remove(&id);
        drop(plugged);
        if let Some(before) = before {
            self.0.fabric.remove(&before.port);
        }
        Ok(())
    }
}

/// What is chosen at random of an interface, before the model is looked at.
struct NewInterface {
    id: NetworkInterfaceId,
    mac: MacAddress,
    /// Where its public address is of, and where to begin to look for it.
    pool: Ipv4Net,
    begin: u32,
}

impl NewInterface {
    fn put_into(
        self,
        model: &mut Model,
        instance_id: Option<InstanceId>,
        spec: InterfaceSpec,
    ) -> Result<NetworkInterface> {
        let Self { id, mac, pool, begin } = self;
        let InterfaceSpec { subnet, groups, private_ip, public_ip, source_dest_check } = spec;
        let subnet = model.subnet(subnet)?.clone();
        let groups = groups::of_interface(model, subnet.vpc_id, groups)?;
        let private_ip = match private_ip {
            Some(address) => free(model, &subnet, address)?,
            None => any_free(model, &subnet)?,
        };
        let has_public = public_ip.unwrap_or(instance_id.is_some() && subnet.map_public_ip_on_launch);
        let public_ip = (has_public && instance_id.is_some())
            .then(|| any_free_while_running(model, pool, begin))
            .transpose()?;
        let (forwards, chosen_forwards, udp_forwards, chosen_udp_forwards) = Default::default();
        let (subnet_id, vpc_id) = (subnet.id, subnet.vpc_id);
        let made = NetworkInterface {
            id,
            subnet_id,
            vpc_id,
            mac,
            private_ip,
            secondary_private_ips: Vec::new(),
            public_ip,
            has_public,
            groups,
            source_dest_check,
            instance_id,
            stays: false,
            forwards,
            chosen_forwards,
            udp_forwards,
            chosen_udp_forwards,
        };
        model.interfaces.insert(id, made.clone());
        Ok(made)
    }
}

fn check_unused(interface: &NetworkInterface) -> Result<()> {
    match interface.instance_id {
        Some(other) => Err(Error::new(ErrorKind::InterfaceInUse, format!("{other} has {}", interface.id))),
        None => Ok(()),
    }
}

/// An address of those that are given locally, and no router's.
fn random_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|e| no_random(e.into()))?;
    bytes[0] = 0x06;
    Ok(MacAddress(bytes))
}

/// The address, if it is one of the subnet's that nobody has.
fn free(model: &Model, subnet: &Subnet, address: Ipv4Addr) -> Result<Ipv4Addr> {
    check_address(subnet, address)?;
    if model.taken(subnet.id).contains(&address) {
        return Err(Error::new(ErrorKind::AddressInUse, format!("an interface has {address}")));
    }
    Ok(address)
}

fn any_free(model: &Model, subnet: &Subnet) -> Result<Ipv4Addr> {
    let taken = model.taken(subnet.id);
    usable(subnet.cidr)
        .find(|address| !taken.contains(address))
        .ok_or_else(|| Error::new(ErrorKind::SubnetFull, format!("{} has no address left", subnet.id)))
}

fn add_address(model: &mut Model, id: NetworkInterfaceId, address: Ipv4Addr) -> Result<Ipv4Addr> {
    let there = &mut model.interface_mut(id)?.secondary_private_ips;
    if there.len() + 1 >= MOST_ADDRESSES {
        let what = format!("{id} has {MOST_ADDRESSES} addresses, which is the most");
        return Err(Error::new(ErrorKind::PrivateAddressLimit, what));
    }
    there.push(address);
    Ok(address)
}

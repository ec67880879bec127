//! The network of a region: a place for each of its instances.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::{BlockDeviceKind, BlockDeviceMapping, InstanceId, NetworkInterfaceId, SecurityGroupId, Tags};
use instance_core::InstanceState;
use instance_core::machine::NetSpec;
use instance_core::network::{Guest, NetworkPlacement, PlacementRequest};

use super::{InterfaceSpec, Network};
use crate::model::Memberships;
use crate::{Error, ErrorKind, Metadata};

type Result<T> = instance_core::Result<T>;

/// What a region is told of a failure.
impl From<Error> for instance_core::Error {
    fn from(error: Error) -> Self {
        use instance_core::ErrorKind as Region;
        let kind = match error.kind() {
            ErrorKind::VpcNotSpecified => Region::VpcNotSpecified,
            ErrorKind::SubnetNotSpecified => Region::SubnetNotSpecified,
            ErrorKind::SubnetNotFound => Region::SubnetNotFound,
            ErrorKind::SubnetFull => Region::SubnetFull,
            ErrorKind::GroupNotFound => Region::SecurityGroupNotFound,
            ErrorKind::AddressInUse => Region::AddressInUse,
            ErrorKind::AddressLimit => Region::AddressLimitExceeded,
            ErrorKind::InsufficientAddressCapacity => Region::InsufficientAddressCapacity,
            ErrorKind::InterfaceNotFound => Region::NetworkInterfaceNotFound,
            ErrorKind::InterfaceInUse => Region::NetworkInterfaceInUse,
            ErrorKind::KeyPairNotFound => Region::KeyPairNotFound,
            ErrorKind::InvalidAddress | ErrorKind::InvalidParameter => Region::InvalidParameter,
            ErrorKind::NetworkInUse => Region::RegionInUse,
            ErrorKind::Corrupt => Region::Corrupt,
            _ => Region::Internal,
        };
        Self::new(kind, error.to_string()).with_source(error)
    }
}

impl instance_core::network::Network for Network {
    fn public_key(&self, name: &str) -> Result<String> {
        Ok(self.key_pair(name)?.public_key)
    }

    fn place(&self, instance: InstanceId, request: &PlacementRequest) -> Result<NetworkPlacement> {
        let made = match request.interface_id {
            Some(id) => self.take_interface(instance, id)?,
            None => self.create_interface_for(Some(instance), self.spec_of(request)?)?,
        };
        let whole = (made.vpc_id, made.subnet_id);
        let mut placement = NetworkPlacement::new(made.id, whole, made.private_ip, made.mac);
        let view = self.model().view(&made, &mut Memberships::default())?;
        placement.private_dns_name = format!("{}.{}", view.host_name, view.domain);
        placement.security_groups = made.groups;
        Ok(placement)
    }

    fn check_places(&self, request: &PlacementRequest, count: u32) -> Result<()> {
        match request.interface_id {
            Some(id) => Ok(self.check_interface(id)?),
            None => Ok(self.check_interfaces(&self.spec_of(request)?, count)?),
        }
    }

    fn plug(&self, guest: Guest<'_>) -> Result<NetSpec> {
        // One that runs has been reset, which does not end it.
        let goes_on = guest.instance.state == InstanceState::Running;
        let port = self.plug_in(guest.placement.interface_id, goes_on)?;
        self.set_metadata(guest.placement.interface_id, Some(self.metadata_of(guest)))?;
        Ok(port)
    }

    fn reach(&self, placement: &NetworkPlacement, port: u16) -> Result<SocketAddr> {
        let id = placement.interface_id;
        match self.interface(id)?.forwards.get(&port) {
            Some(at) => Ok(*at),
            None => Ok(self.forward(id, port, (Ipv4Addr::LOCALHOST, 0).into())?),
        }
    }

    fn public_ip(&self, placement: &NetworkPlacement) -> Option<Ipv4Addr> {
        let model = self.model();
        model.primary_public_ip(model.interface(placement.interface_id).ok()?)
    }

    fn security_groups(&self, placement: &NetworkPlacement) -> Option<Vec<SecurityGroupId>> {
        Some(self.model().interface(placement.interface_id).ok()?.groups.clone())
    }

    fn stopped(&self, placement: &NetworkPlacement) {
        self.unplug(placement.interface_id);
    }

    fn update(&self, guest: Guest<'_>) {
        // It may be about to be unplugged.
        let _ = self.set_metadata(guest.placement.interface_id, Some(self.metadata_of(guest)));
    }

    fn release(&self, placement: &NetworkPlacement) -> Result<()> {
        let id = placement.interface_id;
        self.pull_out(id);
        let released = self.change(|model| {
            model.interface(id)?;
            model.give_up(id);
            Ok(())
        });
        match released {
            Err(error) if error.kind() == ErrorKind::InterfaceNotFound => Ok(()),
            released => Ok(released?),
        }
    }

    fn keep_only(&self, interfaces: &HashSet<NetworkInterfaceId>) -> Result<()> {
        let left =
            |there: &crate::NetworkInterface| there.instance_id.is_some() && !interfaces.contains(&there.id);
        let had_public =
            |there: &crate::NetworkInterface| there.instance_id.is_some() && there.public_ip.is_some();
        if self.model().interfaces.values().any(|there| left(there) || had_public(there)) {
            self.change(|model| {
                let those = model.interfaces.values_mut().filter(|there| had_public(there));
                those.for_each(|there| there.public_ip = None);
                let gone: Vec<_> =
                    model.interfaces.values().filter(|there| left(there)).map(|i| i.id).collect();
                gone.into_iter().for_each(|id| model.give_up(id));
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Network {
    /// What an interface is made by for who asks so for a place.
    fn spec_of(&self, request: &PlacementRequest) -> crate::Result<InterfaceSpec> {
        let spec = match request.subnet_id {
            Some(subnet) => InterfaceSpec::new(subnet),
            None => self.interface_spec()?,
        };
        let mut spec = spec.groups(request.security_groups.iter().copied());
        if let Some(address) = request.private_ip {
            spec = spec.private_ip(address);
        }
        if let Some(associate) = request.public_ip {
            spec = spec.associate_public_ip_address(associate);
        }
        Ok(spec)
    }

    fn metadata_of(&self, guest: Guest<'_>) -> Metadata {
        let instance = guest.instance;
        let key = instance.key_name.clone().and_then(|name| {
            let given = guest.public_key.map(str::to_owned);
            // Of one that has not been kept there is what its key pair says today.
            let key = given.or_else(|| Some(self.key_pair(&name).ok()?.public_key))?;
            Some((name, key))
        });
        let volumes = instance.attachments.iter().filter(|a| a.device_name != instance.root_device_name);
        Metadata {
            image_id: Some(instance.image_id),
            product_codes: instance.product_codes.clone(),
            instance_type: instance.instance_type.to_string(),
            launch_index: instance.launch_index,
            reservation_id: Some(instance.reservation_id),
            launch_time: Some(instance.launch_time),
            owner: Some(instance.owner),
            architecture: instance.architecture,
            root_device: Some(instance.root_device_name.clone()),
            volumes: volumes.map(|a| a.device_name.clone()).collect(),
            instance_store: guest.instance_store.iter().filter_map(named_store).collect(),
            public_keys: key.into_iter().collect(),
            user_data: guest.user_data.map(<[u8]>::to_vec),
            tags: Tags::try_from(instance.tags.clone()).unwrap_or_default(),
            options: instance.metadata_options.clone(),
            ..Metadata::new(instance.id)
        }
    }
}

/// The name of a disk of instance store, and that of its device.
fn named_store(mapping: &BlockDeviceMapping) -> Option<(String, String)> {
    match mapping.kind() {
        BlockDeviceKind::Ephemeral { virtual_name } => {
            Some((virtual_name.clone(), mapping.device_name().to_owned()))
        }
        _ => None,
    }
}

//! The network of a region: a place for each of its instances.

use std::collections::HashSet;

use ami_core::{BlockDeviceKind, BlockDeviceMapping, InstanceId, NetworkInterfaceId, Tags};
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
            ErrorKind::SubnetNotFound => Region::SubnetNotFound,
            ErrorKind::SubnetFull => Region::SubnetFull,
            ErrorKind::GroupNotFound => Region::SecurityGroupNotFound,
            ErrorKind::AddressInUse => Region::AddressInUse,
            ErrorKind::KeyPairNotFound => Region::KeyPairNotFound,
            ErrorKind::InvalidAddress | ErrorKind::InvalidParameter => Region::InvalidParameter,
            ErrorKind::Corrupt => Region::Corrupt,
            _ => Region::Internal,
        };
        Self::new(kind, error.to_string()).with_source(error)
    }
}

impl instance_core::network::Network for Network {
    fn check_key_pair(&self, name: &str) -> Result<()> {
        Ok(self.key_pair(name).map(drop)?)
    }

    fn place(&self, instance: InstanceId, request: &PlacementRequest) -> Result<NetworkPlacement> {
        let mut spec = match request.subnet_id {
            Some(subnet) => InterfaceSpec::new(subnet),
            None => self.interface_spec()?,
        };
        spec = spec.groups(request.security_groups.iter().copied());
        if let Some(address) = request.private_ip {
            spec = spec.private_ip(address);
        }
        let made = self.create_interface_for(Some(instance), spec)?;
        let whole = (made.vpc_id, made.subnet_id);
        let mut placement = NetworkPlacement::new(made.id, whole, made.private_ip, made.mac);
        let view = self.model().view(&made, &mut Memberships::default())?;
        placement.private_dns_name = format!("{}.{}", view.host_name, view.domain);
        placement.security_groups = made.groups;
        Ok(placement)
    }

    fn plug(&self, guest: Guest<'_>) -> Result<NetSpec> {
        let port = self.plug(guest.placement.interface_id)?;
        self.set_metadata(guest.placement.interface_id, Some(self.metadata_of(guest)))?;
        Ok(port)
    }

    fn update(&self, guest: Guest<'_>) {
        // It may be about to be unplugged.
        let _ = self.set_metadata(guest.placement.interface_id, Some(self.metadata_of(guest)));
    }

    fn release(&self, placement: &NetworkPlacement) -> Result<()> {
        self.unplug(placement.interface_id);
        match self.delete_interface(placement.interface_id) {
            Err(error) if error.kind() == ErrorKind::InterfaceNotFound => Ok(()),
            released => Ok(released?),
        }
    }

    fn keep_only(&self, interfaces: &HashSet<NetworkInterfaceId>) -> Result<()> {
        let left =
            |there: &crate::NetworkInterface| there.instance_id.is_some() && !interfaces.contains(&there.id);
        if self.model().interfaces.values().any(left) {
            self.change(|model| {
                let gone: Vec<_> =
                    model.interfaces.values().filter(|there| left(there)).map(|i| i.id).collect();
                gone.into_iter().for_each(|id| model.remove_interface(id));
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Network {
    fn metadata_of(&self, guest: Guest<'_>) -> Metadata {
        let instance = guest.instance;
        // Of a key pair that was deleted since, the instance has nothing.
        let key = instance.key_name.as_deref().and_then(|name| self.key_pair(name).ok());
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
            instance_store: guest.instance_store.iter().filter_map(named_store).collect(),
            public_keys: key.into_iter().map(|key| (key.name, key.public_key)).collect(),
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

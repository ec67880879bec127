//! What an instance must be for a volume to be attached to it, detached or changed.

use ami_core::{DeviceName, VolumeId, VolumeType};

use crate::description::InstanceDescription;
use crate::instance::Live;
use crate::machine::Capabilities;
use crate::record::InstanceRecord;
use crate::{Error, ErrorKind, InstanceState, Result};

/// That an instance has no disk of this name: neither a volume, nor instance store.
pub(super) fn check_free_device(record: &InstanceRecord, name: &DeviceName) -> Result<()> {
    let InstanceDescription { id, attachments, instance_type, .. } = &*record.description;
    let is_there = |other: &str| other.parse().is_ok_and(|other| name.same_disk(&other));
    let what = if attachments.iter().any(|attachment| is_there(&attachment.device_name)) {
        "a volume"
    } else if record.store_root().is_some() && is_there(&record.description.root_device_name)
        || instance_type.instance_store().is_some_and(|store| {
            store.served(&record.instance_store).iter().any(|mapping| is_there(mapping.device_name()))
        })
    {
        "instance store"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidParameter, format!("{id} has {what} at {name} already")))
}

/// That the instance is in a state in which its volumes may change.
pub(super) fn check_settled(live: &Live) -> Result<()> {
    let InstanceRecord { description, .. } = &live.record;
    check_awake(&live.record)?;
    match (description.state, &live.machine) {
        (InstanceState::Stopped, _) | (InstanceState::Running, Some(_)) => Ok(()),
        (state, _) => {
            let what = format!("{} is {state}; this is done while it is running or stopped", description.id);
            Err(Error::new(ErrorKind::IncorrectInstanceState, what))
        }
    }
}

/// That the instance does not hibernate: its guest keeps its disks in mind as they are.
pub(super) fn check_awake(record: &InstanceRecord) -> Result<()> {
    match record.saved {
        Some(_) => {
            let what = format!("{} hibernates with its volumes; start it first", record.description.id);
            Err(Error::new(ErrorKind::IncorrectInstanceState, what))
        }
        None => Ok(()),
    }
}

/// That a machine of the instance has a place for one more disk, now or when it is started.
pub(super) fn check_place(record: &InstanceRecord, can: &Capabilities) -> Result<()> {
    let InstanceDescription { id, attachments, instance_type, network, .. } = &*record.description;
    let store = instance_type.instance_store().map_or(0, |store| store.names(&record.instance_store).len());
    let others = [record.store_root().is_some(), record.nocloud_seed.is_some()].map(usize::from);
    let disks = attachments.len() + store + others.iter().sum::<usize>();
    let devices = disks + usize::from(network.is_some());
    if disks < can.max_disks && devices < can.max_devices {
        return Ok(());
    }
    let what =
        format!("{id} has {disks} disks, and with its network port that is all that {} gives", can.name);
    Err(Error::new(ErrorKind::AttachmentLimitExceeded, what))
}

/// That instances boot from volumes of this type.
pub(super) fn check_can_boot(volume: VolumeId, volume_type: VolumeType) -> Result<()> {
    if volume_type.can_boot() {
        return Ok(());
    }
    let what = format!("nothing boots from {volume} as a volume of type {volume_type}");
    Err(Error::new(ErrorKind::BootForVolumeTypeUnsupported, what))
}

//! Which volumes an instance gets: the image's disks, and what the launch changes of them.

use ami_core::{
    AccountId, BlockDeviceKind, BlockDeviceMapping, DeviceName, Digest, Ebs, Manifest, RootDeviceType, Tags,
    Timestamp, VolumeId,
};

use storage_block::Volume;

use super::Parameters;
use crate::description::Attachment;
use crate::products::ProductCodes;
use crate::record::VolumeRecord;
use crate::region::Inner;
use crate::{Error, ErrorKind, Result, ShutdownBehavior};

/// A volume to be made for a launch.
pub(super) struct Planned {
    pub(super) attachment: Attachment,
    pub(super) record: VolumeRecord,
    /// Whether it is to be encrypted, also if its content is not.
    pub(super) encrypted: bool,
}

impl Planned {
    /// Its record once the volume is there.
    pub(super) fn as_made(&self, volume: &Volume) -> VolumeRecord {
        let kms_key_id = volume.key().map(|key| key.key_id().to_owned());
        VolumeRecord { kms_key_id, ..self.record.clone() }
    }
}

/// The disks of an image's instance, EBS volumes and instance store, the root volume first, with `changes` made.
pub(super) fn disks(manifest: &Manifest, changes: &[BlockDeviceMapping]) -> Result<Vec<BlockDeviceMapping>> {
    let root = (manifest.root_device_name(), manifest.root_device_type());
    let mut disks = changed(root, manifest.block_device_mappings().to_vec(), changes)?;
    disks.retain(|disk| *disk.kind() != BlockDeviceKind::NoDevice);
    Ok(disks)
}

/// Disks with `changes` made, of whatever has this root device, which comes first.
pub(crate) fn changed(
    (root, root_type): (&DeviceName, RootDeviceType),
    mut disks: Vec<BlockDeviceMapping>,
    changes: &[BlockDeviceMapping],
) -> Result<Vec<BlockDeviceMapping>> {
    for change in changes {
        let name = change.validate()?;
        let same = |disk: &BlockDeviceMapping| disk.validate().is_ok_and(|n| n.same_disk(&name));
        let place = disks.iter().position(same);
        match (place, change.kind()) {
            (_, BlockDeviceKind::NoDevice) if root.same_disk(&name) => {
                return invalid(format!("{name} is the root device, which cannot be left out"));
            }
            (Some(place), BlockDeviceKind::NoDevice) => drop(disks.remove(place)),
            (None, BlockDeviceKind::NoDevice) => {}
            (Some(_), _) if root.same_disk(&name) && root_type == RootDeviceType::InstanceStore => {
                return invalid(format!("{name}, the root device, is instance store, which is the image's"));
            }
            (Some(place), BlockDeviceKind::Ebs(ebs)) => {
                if ebs.snapshot().is_some() && root.same_disk(&name) {
                    return invalid(format!("the content of {name}, the root device, is the image's"));
                }
                disks[place] = merged(&disks[place], change, ebs);
            }
            (Some(_), BlockDeviceKind::Ephemeral { .. }) if root.same_disk(&name) => {
                return invalid(format!("{name}, the root device, is an EBS volume"));
            }
            (Some(place), _) => disks[place] = change.clone(),
            (None, _) => disks.push(change.clone()),
        }
    }
    disks.sort_by_key(|disk| disk.device_name() != root.as_str());
    for disk in &disks {
        let name = disk.device_name();
        match disk.as_ebs() {
            Some(ebs) if name == root.as_str() && !ebs.volume_type().can_boot() => {
                return invalid(format!("nothing boots from {name}, a volume of type {}", ebs.volume_type()));
            }
            _ => {}
        }
    }
    Ok(disks)
}

/// The image's disk with what a change says of the rest, and its content unless the change names another. What is encrypted
/// stays so: a change that does not ask for it says nothing against it.
fn merged(disk: &BlockDeviceMapping, change: &BlockDeviceMapping, ebs: &Ebs) -> BlockDeviceMapping {
    let content = ebs.snapshot().or_else(|| disk.as_ebs()?.snapshot());
    let (name, size) = (disk.device_name(), ebs.volume_size_gib());
    let merged = match content {
        Some(content) => BlockDeviceMapping::ebs(name, *content, size)
            .volume_type(ebs.volume_type())
            .delete_on_termination(ebs.delete_on_termination()),
        None => change.clone(),
    };
    merged.encrypted(ebs.encrypted() || disk.as_ebs().is_some_and(Ebs::encrypted))
}

fn invalid<T>(what: String) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what))
}

/// Those of the disks that are instance store. Of which the instance type has none, EC2 passes over.
pub(super) fn instance_store(disks: &[BlockDeviceMapping]) -> Vec<BlockDeviceMapping> {
    use BlockDeviceKind::{Ephemeral, InstanceStore};
    disks.iter().filter(|disk| matches!(disk.kind(), Ephemeral { .. } | InstanceStore(_))).cloned().collect()
}

/// The disks that begin with a content, and which.
pub(super) fn contents(disks: &[BlockDeviceMapping]) -> impl Iterator<Item = (&BlockDeviceMapping, Digest)> {
    disks.iter().filter_map(|disk| disk.content().map(|digest| (disk, *digest)))
}

/// That an instance of this type is what the image asks for.
pub(super) fn check_machine(manifest: &Manifest, spec: &Parameters) -> Result<()> {
    check_tpm(manifest)?;
    check_root(manifest, spec)
}

/// That it has the root device.
fn check_root(manifest: &Manifest, spec: &Parameters) -> Result<()> {
    if manifest.root_device_type() == RootDeviceType::Ebs {
        return Ok(());
    }
    let hardware = &spec.instance_type;
    if spec.hibernation {
        let what = "an instance whose root device is instance store does not hibernate";
        return Err(Error::new(ErrorKind::UnsupportedHibernation, what));
    }
    // As in EC2: NVMe disks are no root devices.
    match hardware.instance_store() {
        Some(store) if !store.nvme && store.disks > 0 => Ok(()),
        _ => {
            let what =
                format!("the image's root device is instance store, of which {hardware} has none for it");
            Err(Error::new(ErrorKind::InvalidParameterCombination, what))
        }
    }
}

/// No machine here has a TPM: an image that is made for one finds no keys in it, and what it has sealed stays shut.
fn check_tpm(manifest: &Manifest) -> Result<()> {
    match manifest.boot().tpm_support() {
        Some(tpm) => {
            let what =
                format!("the image is made for a machine with a TPM {tpm}, which no instance here has");
            Err(Error::new(ErrorKind::Unsupported, what))
        }
        None => Ok(()),
    }
}

/// What the guest's own power-off does: nothing is left to stop where the root device is instance store.
pub(super) fn shutdown_behavior(manifest: &Manifest, spec: &Parameters) -> ShutdownBehavior {
    match manifest.root_device_type() {
        RootDeviceType::InstanceStore => ShutdownBehavior::Terminate,
        _ => spec.shutdown_behavior,
    }
}

/// New volumes for one instance.
pub(super) fn volumes(
    disks: &[BlockDeviceMapping],
    owner: AccountId,
    created: Timestamp,
    tags: &Tags,
    codes_of: impl Fn(&Digest) -> ProductCodes,
) -> Result<Vec<Planned>> {
    let volume = |disk: &BlockDeviceMapping, ebs: &Ebs| -> Result<Planned> {
        let id = VolumeId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        Ok(Planned {
            attachment: Attachment {
                device_name: disk.device_name().to_owned(),
                volume_id: id,
                delete_on_termination: ebs.delete_on_termination(),
            },
            record: VolumeRecord {
                id,
                owner,
                size: ebs.volume_size(),
                base: ebs.snapshot().copied(),
                snapshot_id: None,
                volume_type: ebs.volume_type(),
                created,
                tags: tags.clone(),
                kms_key_id: None,
                product_codes: ebs.snapshot().map(&codes_of).unwrap_or_default(),
                modification: None,
                growing: false,
            },
            encrypted: ebs.encrypted(),
        })
    };
    disks.iter().filter_map(|disk| disk.as_ebs().map(|ebs| volume(disk, ebs))).collect()
}

impl Inner {
    /// That there is a key for what is to be encrypted.
    pub(super) fn check_keys(&self, disks: &[BlockDeviceMapping]) -> Result<()> {
        match disks.iter().filter_map(|disk| disk.as_ebs()).any(Ebs::encrypted) {
            true => match self.blocks.new_key(None) {
                Ok(_) => Ok(()),
                Err(e) => Err(Error::storage(e, "cannot encrypt a volume")),
            },
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use ami_core::VolumeType;

    use super::*;

    #[test]
    fn a_change_of_a_disk_keeps_its_content_and_that_it_is_encrypted() {
        let (content, other) = (Digest::of(b"root"), Digest::of(b"other"));
        let root = |encrypted| BlockDeviceMapping::ebs("/dev/xvda", content, 8).encrypted(encrypted);
        let data = |encrypted| BlockDeviceMapping::blank("/dev/sdf", 8).encrypted(encrypted);
        let larger = |name: &str| BlockDeviceMapping::blank(name, 9);
        // The image's disk, a change, and what comes of them.
        let table = [
            (
                root(true),
                larger("/dev/sda1"),
                BlockDeviceMapping::ebs("/dev/xvda", content, 9).encrypted(true),
            ),
            (root(false), larger("/dev/xvda"), BlockDeviceMapping::ebs("/dev/xvda", content, 9)),
            (root(false), larger("/dev/xvda").encrypted(true), {
                BlockDeviceMapping::ebs("/dev/xvda", content, 9).encrypted(true)
            }),
            (data(true), larger("/dev/xvdf"), larger("/dev/xvdf").encrypted(true)),
            (data(false), larger("/dev/xvdf"), larger("/dev/xvdf")),
            (data(true), BlockDeviceMapping::ebs("/dev/sdf", other, 9), {
                BlockDeviceMapping::ebs("/dev/sdf", other, 9).encrypted(true)
            }),
            // These it says itself, whether or not it was asked to.
            (data(true).delete_on_termination(false).volume_type(VolumeType::Gp2), larger("/dev/sdf"), {
                larger("/dev/sdf").encrypted(true)
            }),
            (data(true), BlockDeviceMapping::ephemeral("/dev/sdf", "ephemeral0"), {
                BlockDeviceMapping::ephemeral("/dev/sdf", "ephemeral0")
            }),
            (BlockDeviceMapping::ephemeral("/dev/sdf", "ephemeral0"), larger("/dev/sdf"), larger("/dev/sdf")),
        ];
        let name: DeviceName = "/dev/xvda".parse().unwrap();
        for (disk, change, expected) in table {
            let changed = changed((&name, RootDeviceType::Ebs), vec![disk], &[change]).unwrap();
            assert_eq!(changed, [expected]);
        }
    }
}

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
use crate::{BlockDeviceMappingRequest, BlockDeviceRequestKind, Error, ErrorKind, Result, ShutdownBehavior};

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
pub(super) fn disks(
    manifest: &Manifest,
    changes: &[BlockDeviceMappingRequest],
    size_of: impl Fn(&Digest) -> Result<u32>,
) -> Result<Vec<BlockDeviceMapping>> {
    let root = (manifest.root_device_name(), manifest.root_device_type());
    let mut disks = changed(root, manifest.block_device_mappings().to_vec(), changes, size_of)?;
    disks.retain(|disk| *disk.kind() != BlockDeviceKind::NoDevice);
    Ok(disks)
}

/// Disks with `changes` made, of whatever has this root device, which comes first. What a change leaves unsaid stays as it
/// is; `size_of` gives the size of a content in GiB.
pub(crate) fn changed(
    (root, root_type): (&DeviceName, RootDeviceType),
    mut disks: Vec<BlockDeviceMapping>,
    changes: &[BlockDeviceMappingRequest],
    size_of: impl Fn(&Digest) -> Result<u32>,
) -> Result<Vec<BlockDeviceMapping>> {
    for change in changes {
        let name = change.check()?;
        let place = disks.iter().position(|disk| change.is_at(disk.device_name()));
        match (place, &change.kind) {
            (_, BlockDeviceRequestKind::NoDevice) if root.same_disk(&name) => {
                return invalid(format!("{name} is the root device, which cannot be left out"));
            }
            (Some(place), BlockDeviceRequestKind::NoDevice) => drop(disks.remove(place)),
            (None, BlockDeviceRequestKind::NoDevice) => {}
            (Some(_), _) if root.same_disk(&name) && root_type == RootDeviceType::InstanceStore => {
                return invalid(format!("{name}, the root device, is instance store, which is the image's"));
            }
            (Some(_), BlockDeviceRequestKind::Ebs(ebs))
                if ebs.snapshot.is_some() && root.same_disk(&name) =>
            {
                return invalid(format!("the content of {name}, the root device, is the image's"));
            }
            (Some(_), BlockDeviceRequestKind::Ephemeral { .. }) if root.same_disk(&name) => {
                return invalid(format!("{name}, the root device, is an EBS volume"));
            }
            (Some(place), _) => disks[place] = change.resolved(Some(&disks[place]), &size_of)?,
            (None, _) => disks.push(change.resolved(None, &size_of)?),
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

fn invalid<T>(what: String) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what))
}

/// Those of the disks that are instance store. Of which the instance type has none, EC2 passes over.
pub(super) fn instance_store(disks: &[BlockDeviceMapping]) -> Vec<BlockDeviceMapping> {
    use BlockDeviceKind::{Ephemeral, InstanceStore};
    disks.iter().filter(|disk| matches!(disk.kind(), Ephemeral { .. } | InstanceStore(_))).cloned().collect()
}

/// How many disks the machine of an instance has that has these.
fn count(disks: &[BlockDeviceMapping], spec: &Parameters) -> Result<usize> {
    let is_there = |disk: &&BlockDeviceMapping| {
        matches!(disk.kind(), BlockDeviceKind::Ebs(_) | BlockDeviceKind::InstanceStore(_))
    };
    let store = match spec.instance_type.instance_store() {
        Some(store) => {
            store.check()?;
            store.names(&instance_store(disks)).len()
        }
        None => 0,
    };
    Ok(disks.iter().filter(is_there).count() + store + usize::from(spec.nocloud_seed.is_some()))
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
    /// That the hypervisor gives a machine as much as an instance with these disks is to have.
    pub(super) fn check_size(&self, disks: &[BlockDeviceMapping], spec: &Parameters) -> Result<()> {
        let hardware = &spec.instance_type;
        let processors = (hardware.vcpus(), hardware.threads_per_core());
        let (disks, nets) = (count(disks, spec)?, usize::from(self.network.is_some()));
        let can = self.hypervisor.capabilities();
        let fits = can.check_size(processors, hardware.memory_mib(), disks, nets);
        fits.map_err(|e| Error::machine(e, format!("no instance of {hardware} with these disks can be")))
    }

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
    use crate::BlockDeviceMappingRequest as Request;

    #[test]
    fn what_a_change_leaves_unsaid_is_the_images() {
        let (content, other) = (Digest::of(b"root"), Digest::of(b"other"));
        let root = || BlockDeviceMapping::ebs("/dev/xvda", content, 8);
        let kept = |disk: BlockDeviceMapping| disk.volume_type(VolumeType::Gp2).delete_on_termination(false);
        let data = |size| BlockDeviceMapping::blank("/dev/sdf", size);
        let store = |name| BlockDeviceMapping::ephemeral(name, "ephemeral0");
        // The image's disk, a change, and what comes of them.
        let table = [
            (kept(root()).encrypted(true), Request::new("/dev/sda1"), kept(root()).encrypted(true)),
            (
                kept(root()),
                Request::new("/dev/sda1").size_gib(9),
                kept(BlockDeviceMapping::ebs("/dev/xvda", content, 9)),
            ),
            (kept(root()), Request::new("/dev/xvda").delete_on_termination(true), {
                kept(root()).delete_on_termination(true)
            }),
            (kept(root()), Request::new("/dev/xvda").volume_type(VolumeType::Gp3), {
                kept(root()).volume_type(VolumeType::Gp3)
            }),
            (root(), Request::new("/dev/xvda").encrypted(true), root().encrypted(true)),
            (root().encrypted(true), Request::new("/dev/xvda").encrypted(false), root().encrypted(true)),
            (kept(data(8)), Request::new("/dev/xvdf").size_gib(9), kept(data(9))),
            (
                kept(data(8)).encrypted(true),
                Request::new("/dev/sdf").snapshot(other),
                kept(BlockDeviceMapping::ebs("/dev/sdf", other, 8)).encrypted(true),
            ),
            (data(8), Request::ephemeral("/dev/sdf", "ephemeral0"), store("/dev/sdf")),
            (store("/dev/sdf"), Request::new("/dev/sdf").size_gib(9), data(9)),
            (store("/dev/sdf"), Request::new("/dev/sdf").snapshot(other), {
                BlockDeviceMapping::ebs("/dev/sdf", other, 3)
            }),
        ];
        let name: DeviceName = "/dev/xvda".parse().unwrap();
        let changed = |disk: &BlockDeviceMapping, change: &Request| {
            let changes = std::slice::from_ref(change);
            changed((&name, RootDeviceType::Ebs), vec![disk.clone()], changes, |_| Ok(3))
        };
        for (disk, change, expected) in table {
            assert_eq!(changed(&disk, &change).unwrap(), [expected], "{disk:?} {change:?}");
        }
        let (io1, mapping) = (data(8).volume_type(VolumeType::Io1), ErrorKind::InvalidBlockDeviceMapping);
        for (disk, change, kind) in [
            (&io1, Request::new("/dev/sdf").size_gib(2), mapping),
            (&io1, Request::new("/dev/sdf").volume_type(VolumeType::St1), mapping),
            (&io1, Request::new("/dev/sdg"), ErrorKind::MissingParameter),
            (&store("/dev/sdf"), Request::new("/dev/sdf"), ErrorKind::MissingParameter),
        ] {
            assert_eq!(changed(disk, &change).unwrap_err().kind(), kind, "{change:?}");
        }
    }
}

//! The machine of an instance: made of its record and its volumes, and ended.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ami_core::{Digest, RootDeviceType};
use rustix::fs::MemfdFlags;
use storage_block::{RawFile, Volume};

use crate::attach::disk_of;
use crate::description::{Attachment, InstanceDescription, StateReason};
use crate::error::chain;
use crate::instance::{Cell, Live};
use crate::machine::{Boot, DiskSpec, Identity, Machine, MachineError, MachineSpec, NetSpec, RestoreSpec};
use crate::record::InstanceRecord;
use crate::region::Inner;
use crate::vsock::{self, VsockSpec};
use crate::{Error, ErrorKind, Result};

/// What a guest finds its root device by, if that is instance store.
const ROOT_SERIAL: &str = "root";

/// What a machine stands on, whether it boots or goes on.
struct Ground {
    disks: Vec<DiskSpec>,
    nets: Vec<NetSpec>,
    vsock: Option<VsockSpec>,
    runtime_dir: PathBuf,
}

impl Inner {
    /// Opens the volumes and has a machine go on where the instance hibernated, or else boots what the root volume
    /// holds now. Says why it has booted, if it was to go on.
    pub(crate) fn power_on_again(&self, cell: &Cell, live: &mut Live) -> Result<Option<StateReason>> {
        live.volumes = self.open_volumes(live)?;
        let lost = match live.record.saved.clone() {
            Some(saved) => match self.wake(cell, live, &saved)? {
                Ok(()) => return Ok(None),
                Err(lost) => {
                    // Before the guest boots: what was saved must not go on over what it writes.
                    let record = InstanceRecord { saved: None, ..live.record.clone() };
                    self.change(cell, live, record)?;
                    Some(lost)
                }
            },
            None => None,
        };
        let is_store = live.record.description.root_device_type == RootDeviceType::InstanceStore;
        let root = if is_store { live.root.as_ref() } else { live.root_volume() };
        live.record.description.check_root_volume()?;
        // A root device that is lost is not made again: it would be another one.
        if is_store && root.is_none() {
            return Err(no_root_volume());
        }
        let boot = match (&live.record.direct_boot, root) {
            (Some(plan), _) => self.boot.boot(plan)?,
            (None, Some(root)) => self.boot.boot_from_disk(&root.disk())?,
            (None, None) => return Err(no_root_volume()),
        };
        self.power_on(cell, live, boot)?;
        Ok(lost)
    }

    pub(crate) fn open_volumes(&self, live: &Live) -> Result<Vec<Volume>> {
        let InstanceRecord { description, launched, .. } = &live.record;
        let open = |attachment: &Attachment| match launched {
            false if self.is_unwritten(attachment) && self.storing.open(attachment.volume_id).is_none() => {
                self.make_unwritten(description.id, attachment.volume_id)
            }
            _ => self.open_volume(attachment.volume_id),
        };
        let volumes = description.attachments.iter().map(open).collect::<Result<Vec<_>>>()?;
        if !launched && volumes.iter().any(Volume::has_files) {
            // What is flushed to one takes its name for durable.
            self.sync_volume_names()?;
        }
        Ok(volumes)
    }

    /// Makes a machine on the volumes that are open, and starts it.
    pub(crate) fn power_on(&self, cell: &Cell, live: &mut Live, boot: Boot) -> Result<()> {
        let ground = self.ground(cell, live, self.vsock)?;
        let description = &live.record.description;
        let mut spec =
            MachineSpec::new(cell.id.to_string(), description.architecture, boot, cell.console.port());
        spec.vcpus = description.instance_type.vcpus();
        spec.threads_per_core = description.instance_type.threads_per_core();
        spec.memory_mib = description.instance_type.memory_mib();
        spec.identity = Some(identity(description));
        (spec.disks, spec.nets, spec.vsock) = (ground.disks, ground.nets, ground.vsock);
        spec.runtime_dir = ground.runtime_dir;
        cell.begin_boot();
        let failed = |e| Error::machine(e, format!("cannot start a machine for {}", cell.id));
        let machine = self.hypervisor.create(spec).map_err(failed)?;
        self.follow_end(cell, live, &*machine);
        machine.start().map_err(failed)?;
        cell.booted(machine.state());
        live.machine = Some(machine);
        Ok(())
    }

    /// Makes a machine that goes on where another was saved, on the volumes that are open. It is paused.
    pub(crate) fn restore(
        &self,
        cell: &Cell,
        live: &mut Live,
        mut spec: RestoreSpec,
        had_vsock: bool,
    ) -> Result<Result<(), MachineError>> {
        let ground = self.ground(cell, live, had_vsock)?;
        (spec.disks, spec.nets, spec.vsock) = (ground.disks, ground.nets, ground.vsock);
        spec.runtime_dir = ground.runtime_dir;
        let machine = match self.hypervisor.restore(spec) {
            Ok(machine) => machine,
            Err(e) => return Ok(Err(e)),
        };
        self.follow_end(cell, live, &*machine);
        cell.woken(machine.state());
        live.machine = Some(machine);
        Ok(Ok(()))
    }

    fn ground(&self, cell: &Cell, live: &mut Live, with_vsock: bool) -> Result<Ground> {
        // A reboot saves nothing up.
        if live.limiters.is_empty() {
            let bandwidth = live.record.description.instance_type.ebs_bandwidth().filter(|_| self.ebs_limits);
            live.limiters = bandwidth.map(|bandwidth| bandwidth.limiters().to_vec()).unwrap_or_default();
        }
        if live.instance_store.is_empty() {
            live.instance_store = self.new_instance_store(&live.record)?;
        }
        if live.root.is_none() {
            live.root = self.new_store_root(&live.record)?;
        }
        let root = live.root.as_ref().map(|root| DiskSpec::new(root.disk(), ROOT_SERIAL));
        let volumes = live.record.description.attachments.iter().zip(&live.volumes);
        let volumes = volumes.map(|(a, v)| disk_of(live, a.volume_id, v));
        let seed = live.record.nocloud_seed.as_ref().map(|seed| seed.disk(&live.record)).transpose()?;
        let disks = root.into_iter().chain(volumes).chain(live.instance_store.iter().cloned()).chain(seed);
        let disks = disks.collect();
        let mut nets: Vec<NetSpec> = self.plug(&live.record)?.into_iter().collect();
        self.limit(&mut nets, live);
        let (port, vsock) = with_vsock.then(vsock::cable).unzip();
        live.vsock = vsock;
        Ok(Ground { disks, nets, vsock: port.map(VsockSpec::new), runtime_dir: self.paths.instance(cell.id) })
    }

    /// Holds the ports of an instance, together, to what its type's network gives.
    fn limit(&self, ports: &mut [NetSpec], live: &mut Live) {
        let on = self.network_limits && self.hypervisor.capabilities().net_limits;
        let hardware = &live.record.description.instance_type;
        let Some(bandwidth) = hardware.network_bandwidth().filter(|_| on) else { return };
        let [receive, transmit] =
            live.frame_limits.get_or_insert_with(|| [bandwidth.limits(), bandwidth.limits()]);
        for port in ports {
            port.receive_limits = receive.clone();
            port.transmit_limits = transmit.clone();
        }
    }

    /// Empty disks without a name in the file system: they go with whoever holds them, also in a crash.
    fn new_instance_store(&self, record: &InstanceRecord) -> Result<Vec<DiskSpec>> {
        let Some(store) = record.description.instance_type.instance_store() else { return Ok(Vec::new()) };
        store.check()?;
        let disk = |name: String| {
            let file = tempfile::tempfile_in(self.paths.instances())
                .and_then(|file| file.set_len(store.disk_size()).map(|()| file))
                .map_err(|e| Error::io(e, format!("cannot make {name}")))?;
            let disk = RawFile::from_file(file, false);
            let disk = disk.map_err(|e| Error::storage(e, format!("cannot make {name}")))?;
            Ok(DiskSpec::new(disk.into_disk(), name))
        };
        store.names(&record.instance_store).into_iter().map(disk).collect()
    }

    /// The root device, if it is instance store: a volume that no record names, so that nothing is left of it after a
    /// crash.
    fn new_store_root(&self, record: &InstanceRecord) -> Result<Option<Volume>> {
        let Some(root) = record.store_root() else { return Ok(None) };
        let content = self.content(root.snapshot())?;
        let made = Volume::create_unsynced(
            &self.paths.store_root(record.description.id),
            Some(&content),
            root.size(),
        );
        made.map(Some).map_err(|e| Error::storage(e, "cannot make the root device"))
    }

    /// Has the supervisor told when the machine ends, and when it shows its host keys.
    fn follow_end(&self, cell: &Cell, live: &mut Live, machine: &dyn Machine) {
        live.generation += 1;
        let (settling, id) = (self.supervisor.reports(), cell.id);
        cell.console.set_host_keys_notifier(Arc::new(move || settling.unsettled(id)));
        let (reports, generation) = (self.supervisor.reports(), live.generation);
        machine.state().subscribe(move |state| {
            if let Some(cause) = state.exit_cause() {
                reports.ended(id, generation, cause);
            }
        });
    }

    /// The port of an instance's machine, if it has a place in a network.
    fn plug(&self, record: &InstanceRecord) -> Result<Option<NetSpec>> {
        let missing = || {
            let what =
                format!("{} is in a network, and the region was opened without one", record.description.id);
            Error::new(ErrorKind::Unsupported, what)
        };
        record.with_guest(|guest| self.network.as_deref().ok_or_else(missing)?.plug(guest))
    }

    /// Ends the machine, if there is one, closes the volumes, and gives back what the instance has of the host.
    pub(crate) fn power_off(&self, live: &mut Live) {
        self.power_off_for_now(live);
        live.instance_store.clear();
        if live.root.take().is_some() {
            let id = live.record.description.id;
            if let Err(e) = Volume::remove(&self.paths.store_root(id)) {
                tracing::warn!(instance = %id, error = chain(&e), "cannot remove a root device");
            }
        }
        live.limiters.clear();
        live.frame_limits = None;
        live.claim = None;
    }

    /// Ends the machine, in whose place another comes, and closes the volumes.
    pub(crate) fn power_off_for_now(&self, live: &mut Live) {
        (live.machine, live.vsock) = (None, None);
        live.volumes.clear();
        let dir = self.paths.instance(live.record.description.id);
        if let Err(e) = fs::remove_dir_all(&dir) {
            if e.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(dir = %dir.display(), error = chain(&e), "cannot remove an instance's directory");
            }
        }
    }
}

/// What an instance of EC2 is told of itself: its UUID and serial number are the same and begin with
/// `ec2`, by which cloud-init and others know where they run (EC2 User Guide, "Identify EC2 instances").
fn identity(description: &InstanceDescription) -> Identity {
    const VENDOR: &str = "Amazon EC2";
    let id = description.id.to_string();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&Digest::of(id.as_bytes()).as_bytes()[..16]);
    (uuid[0], uuid[1]) = (0xec, 0x20 | uuid[1] & 0xf);
    let mut identity = Identity::new(uuid);
    identity.vendor = VENDOR.to_owned();
    // A type of one's own may have any name.
    let name = description.instance_type.name().chars().filter(|c| !c.is_control());
    for c in name {
        if identity.product.len() + c.len_utf8() > Identity::MAX_TEXT {
            break;
        }
        identity.product.push(c);
    }
    identity.asset_tag = id;
    identity
}

/// A file that is in memory alone.
pub(crate) fn memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("instance", MemfdFlags::CLOEXEC)?.into())
}

pub(crate) fn no_root_volume() -> Error {
    Error::new(ErrorKind::NotBootable, "the instance has no root volume")
}

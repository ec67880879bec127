//! What a fake guest knows, which is its machine's memory when that is saved.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::machine::{DiskSpec, MachineError, MachineErrorKind, MachineSpec, NetSpec, RestoreSpec};
use crate::net::MacAddress;

/// See the [module](self).
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) booted: bool,
    pub(super) vcpus: u32,
    pub(super) memory_mib: u32,
    /// Fields of the SMBIOS tables.
    pub(super) dmi: BTreeMap<String, String>,
    pub(super) nets: Vec<Port>,
    /// What it was told to remember.
    pub(super) word: String,
    /// What has been typed of a line.
    pub(super) line: Vec<u8>,
}

/// A network port.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Port {
    pub(super) mac: MacAddress,
    pub(super) mtu: u16,
    /// The address that it answers for when it is up.
    pub(super) address: Option<Ipv4Addr>,
}

/// A saved machine.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    memory: Memory,
    /// Serial numbers and sizes.
    disks: Vec<(String, u64)>,
}

impl Memory {
    /// A guest's that has not booted.
    pub(super) fn new(spec: &MachineSpec) -> Self {
        let mut dmi = BTreeMap::new();
        if let Some(identity) = &spec.identity {
            for (field, text) in [
                ("bios_vendor", identity.vendor.clone()),
                ("sys_vendor", identity.vendor.clone()),
                ("chassis_asset_tag", identity.vendor.clone()),
                ("product_name", identity.product.clone()),
                ("product_uuid", identity.uuid_text()),
                ("product_serial", identity.serial.clone()),
                ("board_asset_tag", identity.asset_tag.clone()),
            ] {
                dmi.insert(field.to_owned(), text);
            }
        }
        let port = |net: &NetSpec| Port { mac: net.mac, mtu: net.mtu, address: None };
        let (vcpus, memory_mib) = (spec.vcpus.get(), spec.memory_mib.get());
        Self { vcpus, memory_mib, dmi, nets: spec.nets.iter().map(port).collect(), ..Self::default() }
    }

    /// The port with this number, if it is one.
    pub(super) fn net(&mut self, number: &str) -> Option<&mut Port> {
        self.nets.get_mut(number.parse::<usize>().ok()?)
    }

    /// Writes it, and which disks it has.
    pub(super) fn save(&mut self, disks: &[DiskSpec], to: &File) -> Result<(), MachineError> {
        let disks = disks.iter().map(described).collect();
        let saved = Saved { memory: std::mem::take(self), disks };
        let written = serde_json::to_writer(to, &saved);
        *self = saved.memory;
        let refused = "the saved machine cannot be written";
        written.map_err(|e| MachineError::new(MachineErrorKind::Host, refused).with_source(e))
    }

    /// Reads what was saved, for a machine with these disks and ports.
    pub(super) fn restore(spec: &mut RestoreSpec) -> Result<Self, MachineError> {
        let refused = |what: &str| MachineError::new(MachineErrorKind::Saved, what);
        let mut text = vec![0; spec.saved.len() as usize];
        let read = spec.saved.file().read_exact_at(&mut text, 0);
        read.map_err(|e| refused("the saved machine cannot be read").with_source(e))?;
        let saved: Saved = serde_json::from_slice(&text)
            .map_err(|e| refused("this is no saved machine of the fake hypervisor").with_source(e))?;
        spec.order_disks(saved.disks.iter().map(|(serial, _)| serial.as_str()));
        if !spec.disks.iter().map(described).eq(saved.disks) {
            return Err(refused("the machine had other disks when it was saved"));
        }
        spec.order_nets(saved.memory.nets.iter().map(|net| net.mac));
        let had = saved.memory.nets.iter().map(|net| (net.mac, net.mtu));
        if !spec.nets.iter().map(|net| (net.mac, net.mtu)).eq(had) {
            return Err(refused("the machine had other network ports when it was saved"));
        }
        Ok(saved.memory)
    }
}

fn described(disk: &DiskSpec) -> (String, u64) {
    (disk.serial.clone(), disk.disk.size())
}

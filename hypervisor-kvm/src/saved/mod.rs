//! Saved machines: what is in one, and how it lies in a file (`docs/saved-machine-format.md`).

mod file;
mod platform;
mod processor;
#[cfg(test)]
mod tests;

use instance_core::machine::{DiskSpec, NetSpec, RestoreSpec};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

pub(crate) use self::file::{Loaded, write};
#[cfg(any(test, fuzzing))]
pub(crate) use self::file::{VERSION, decode, encode};
pub(crate) use self::platform::Platform;
pub(crate) use self::processor::Processor;
use crate::Transport;
use crate::error::{Result, saved, unsupported};
use crate::pci::BusState;
use crate::power;
use crate::rtc::Rtc;
use crate::serial::SerialState;
use crate::slots::{self, Other};
use crate::virtio::DeviceState;

/// What KVM must be able to do for a machine to be saved.
pub(crate) const NEEDED: [Cap; 8] = [
    Cap::MpState,
    Cap::Xsave,
    Cap::Xcrs,
    Cap::Debugregs,
    Cap::VcpuEvents,
    Cap::PitState2,
    Cap::AdjustClock,
    Cap::ImmediateExit,
];

/// A machine that stands still, but for its memory. What its fields are encoded as is the format: whoever changes
/// one changes [`file::VERSION`] too.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) transport: Transport,
    pub(crate) memory_mib: u32,
    pub(crate) disks: Vec<Disk>,
    pub(crate) nets: Vec<Port>,
    pub(crate) serial: SerialState,
    pub(crate) power: power::State,
    pub(crate) rtc: Rtc,
    pub(crate) pci: Option<BusState>,
    pub(crate) hot_plug: slots::Registers,
    /// In the order of their places.
    pub(crate) virtio: Vec<Device>,
    pub(crate) platform: Platform,
    pub(crate) processors: Vec<Processor>,
}

/// A virtio device in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) place: u8,
    pub(crate) role: Role,
    pub(crate) state: DeviceState,
}

/// What a device is: the next of the disks, of the network ports, or of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Role {
    Disk,
    Net,
    Other,
}

/// What the guest knows of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) serial: String,
    size: u64,
    read_only: bool,
}

impl Disk {
    pub(crate) fn of(spec: &DiskSpec) -> Self {
        let (size, read_only) = (spec.disk.size(), spec.disk.read_only());
        Self { serial: spec.serial.clone(), size, read_only }
    }
}

/// What the guest knows of a network port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Port {
    pub(crate) mac: [u8; 6],
    mtu: u16,
}

impl Port {
    pub(crate) fn of(spec: &NetSpec) -> Self {
        Self { mac: spec.mac.0, mtu: spec.mtu }
    }
}

impl State {
    /// The virtio devices that are neither disks nor network ports; none for one that there is not.
    fn others(&self) -> impl Iterator<Item = Option<Other>> {
        let others = self.virtio.iter().filter(|device| device.role == Role::Other);
        others.map(|device| Other::of(device.state.kind()))
    }

    /// How many of them there are.
    fn count(&self, other: Other) -> usize {
        self.others().filter(|one| *one == Some(other)).count()
    }

    /// That the machine had the disks and ports that it is to go on with.
    pub(crate) fn check(&self, spec: &RestoreSpec, most_processors: usize) -> Result<()> {
        let of = |role| self.virtio.iter().filter(|device| device.role == role).count();
        let in_order = self.virtio.is_sorted_by(|a, b| a.place < b.place);
        let last = self.virtio.last().map_or(0, |device| usize::from(device.place));
        let possible = (1..=most_processors).contains(&self.processors.len())
            && self.memory_mib > 0
            && (of(Role::Disk), of(Role::Net)) == (self.disks.len(), self.nets.len())
            && in_order
            && last < self.transport.places()
            && self.others().all(|other| other.is_some_and(|other| self.count(other) == 1));
        if !possible {
            return Err(saved("the saved machine has more than a machine has on this host, or less"));
        }
        for (had, given) in self.disks.iter().zip(spec.disks.iter().map(Disk::of)) {
            if *had != given {
                return Err(saved(format!("the machine had {had:?} when it was saved, not {given:?}")));
            }
        }
        for (had, given) in self.nets.iter().zip(spec.nets.iter().map(Port::of)) {
            if *had != given {
                return Err(saved(format!("the machine had {had:?} when it was saved, not {given:?}")));
            }
        }
        for (other, name, given) in [
            (Other::Vsock, "place for streams", spec.vsock.is_some()),
            (Other::Console, "virtio console", spec.virtio_console.is_some()),
        ] {
            if (self.count(other) == 1) != given {
                let what = if given { "no" } else { "a" };
                return Err(saved(format!("the machine had {what} {name} when it was saved")));
            }
        }
        if spec.vsock.as_ref().is_some_and(|vsock| !vsock.is_valid()) {
            return Err(unsupported("a guest cannot have this address for streams"));
        }
        let (had, given) = ((self.disks.len(), self.nets.len()), (spec.disks.len(), spec.nets.len()));
        if had != given {
            return Err(saved(format!(
                "the machine had {} disks and {} network ports when it was saved, not {} and {}",
                had.0, had.1, given.0, given.1
            )));
        }
        Ok(())
    }
}

//! Saved machines: what is in one, and how it lies in a file (`docs/saved-machine-format.md`).

mod file;
mod msrs;
mod platform;
mod processor;
mod speed;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;

use instance_core::machine::{DiskSpec, NetSpec, RestoreSpec};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, VcpuFd};
use serde::{Deserialize, Serialize};

pub(crate) use self::file::{Loaded, write};
#[cfg(any(test, fuzzing))]
pub(crate) use self::file::{VERSION, decode, encode};
pub(crate) use self::msrs::to_save as msrs_to_save;
pub(crate) use self::platform::Platform;
pub(crate) use self::processor::Processor;
pub(crate) use self::speed::Speed;
use crate::Transport;
use crate::cpuid::{self, Topology};
use crate::error::{HostContext, Result, saved, unsupported};
use crate::gone::Gone;
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
    /// Since version 2, behind what the devices remember: the places whose disk or cable was taken away, and what it was.
    /// They are neither among the disks nor among the ports.
    #[serde(skip)]
    pub(crate) gone: Vec<(u8, Gone)>,
    /// Since version 3, behind them: how fast the processors' time stamp counters run.
    #[serde(skip)]
    pub(crate) speed: Speed,
}

/// A virtio device in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) place: u8,
    pub(crate) role: Role,
    pub(crate) state: DeviceState,
}

impl Device {
    /// The disk that it was made of as its guest knows it.
    pub(crate) fn as_known(&self, disk: &Disk) -> Disk {
        Disk { size: self.state.disk_size().unwrap_or(disk.size), ..disk.clone() }
    }
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
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

impl Disk {
    pub(crate) fn of(spec: &DiskSpec) -> Self {
        let (size, read_only) = (spec.disk.size(), spec.disk.read_only());
        Self { serial: spec.serial.clone(), size, read_only }
    }

    /// Whether this is the disk that the guest knows so, which may have grown since.
    fn can_be(&self, known: &Self) -> bool {
        self.size >= known.size && self.serial == known.serial && self.read_only == known.read_only
    }
}

/// What the guest knows of a network port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Port {
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
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

    /// What the device in a place is.
    fn role(&self, place: u8) -> Option<Role> {
        self.virtio.iter().find(|device| device.place == place).map(|device| device.role)
    }

    /// What the device in a place has lost, if it has.
    pub(crate) fn gone(&self, place: u8) -> Option<&Gone> {
        self.gone.iter().find(|(gone, _)| *gone == place).map(|(_, gone)| gone)
    }

    /// Whether the device of each disk, where it says so, has the size of its disk or of the one that it has lost.
    fn sizes_agree(&self) -> bool {
        let mut disks = self.disks.iter();
        self.virtio.iter().filter(|device| device.role == Role::Disk).all(|device| {
            let disk = match self.gone(device.place) {
                Some(Gone::Disk(disk)) => Some(disk),
                Some(Gone::Net(_)) => None,
                None => disks.next(),
            };
            device.state.disk_size().is_none_or(|size| disk.is_some_and(|disk| disk.size == size))
        })
    }

    /// How many of them there are.
    fn count(&self, other: Other) -> usize {
        self.others().filter(|one| *one == Some(other)).count()
    }

    /// That its processors are such as a new machine would have, of this model. Of `new`, which nobody has used, KVM is asked
    /// what it makes of that, if it has to be.
    pub(crate) fn check_processors(&self, model: &CpuId, version: u32, new: &[VcpuFd]) -> Result<()> {
        let first = new.first().ok_or_else(|| saved("the saved machine has no processors"))?;
        let count = NonZeroU32::MIN.saturating_add(new.len() as u32 - 1);
        // Which of them it is, and which are threads of a core, is nothing that matters.
        let own = cpuid::of_processor(model, 0, Topology::new(count, NonZeroU32::MIN)?)?;
        // Before version 3, processors had the signature of their level's oldest.
        let check = |own: &CpuId| {
            self.processors.iter().try_for_each(|processor| processor.check(own.as_slice(), version >= 3))
        };
        check(&own).or_else(|_| {
            // A KVM in software may tell of the host's processor whatever it is told, also when a machine is saved.
            first.set_cpuid2(&own).host("KVM did not take a processor's CPUID")?;
            let told =
                first.get_cpuid2(KVM_MAX_CPUID_ENTRIES).host("KVM did not tell a processor's CPUID")?;
            check(&told)
        })
    }

    /// That the machine had the disks and ports that it is to go on with.
    pub(crate) fn check(&self, spec: &RestoreSpec, most_processors: usize) -> Result<()> {
        let of = |role| self.virtio.iter().filter(|device| device.role == role).count();
        let gone = |role| self.gone.iter().filter(|(_, gone)| gone.role() == role).count();
        let in_order = self.virtio.is_sorted_by(|a, b| a.place < b.place);
        let last = self.virtio.last().map_or(0, |device| usize::from(device.place));
        let possible = (1..=most_processors).contains(&self.processors.len())
            && self.memory_mib > 0
            && self.gone.is_sorted_by(|a, b| a.0 < b.0)
            && self.gone.iter().all(|(place, gone)| self.role(*place) == Some(gone.role()))
            && of(Role::Disk) == self.disks.len() + gone(Role::Disk)
            && of(Role::Net) == self.nets.len() + gone(Role::Net)
            && in_order
            && last < self.transport.places()
            && self.others().all(|other| other.is_some_and(|other| self.count(other) == 1));
        if !possible {
            return Err(saved("the saved machine has more than a machine has on this host, or less"));
        }
        if !self.sizes_agree() {
            return Err(saved("the saved machine contradicts itself about the size of a disk"));
        }
        for (had, given) in self.disks.iter().zip(spec.disks.iter().map(Disk::of)) {
            if !given.can_be(had) {
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

//! What a hypervisor can do.

use std::num::NonZeroU32;

use ami_core::Architecture;

use super::{DiskSpec, MachineError, MachineErrorKind, MachineSpec, NetSpec};

/// What a hypervisor can do on this host.
///
/// ```
/// use ami_core::Architecture;
/// use instance_core::machine::Capabilities;
///
/// let mut can = Capabilities::new("mine", vec![Architecture::X86, Architecture::X86_64]);
/// can.max_vcpus = 32;
/// can.power_button = true;
/// assert_eq!((can.name, can.max_disks), ("mine", 1));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Its name, such as `kvm`.
    pub name: &'static str,
    /// The architectures whose machines it makes.
    pub architectures: Vec<Architecture>,
    /// The most vCPUs of one machine.
    pub max_vcpus: u32,
    /// The most memory of one machine, in MiB.
    pub max_memory_mib: u64,
    /// The most disks of one machine.
    pub max_disks: usize,
    /// The most network ports of one machine.
    pub max_nets: usize,
    /// The most disks and network ports of one machine together, if they share its places.
    pub max_devices: usize,
    /// Whether the frames of network ports are held to the limits of a [specification](NetSpec::receive_limits).
    pub net_limits: bool,
    /// Whether a network port may be on a [TAP device](crate::net::Tap) of the host's.
    pub tap: bool,
    /// Whether [`Machine::power_button`](super::Machine::power_button) works.
    pub power_button: bool,
    /// Whether [`Machine::attach_disk`](super::Machine::attach_disk) and [`Machine::detach_disk`](super::Machine::detach_disk) work.
    pub hot_plug: bool,
    /// Whether [`Machine::attach_net`](super::Machine::attach_net) and [`Machine::detach_net`](super::Machine::detach_net) work.
    pub net_hot_plug: bool,
    /// Whether [`Machine::disk_grown`](super::Machine::disk_grown) works.
    pub live_growth: bool,
    /// Whether [`Machine::save`](super::Machine::save) and [`Hypervisor::restore`](super::Hypervisor::restore) work.
    pub save: bool,
    /// Whether [`Machine::set_balloon`](super::Machine::set_balloon) and [`Machine::balloon`](super::Machine::balloon) work.
    pub balloon: bool,
    /// Whether a machine may have a [place for streams](MachineSpec::vsock).
    pub vsock: bool,
    /// Whether a machine may have a [virtio console](MachineSpec::virtio_console).
    pub virtio_console: bool,
}

impl Capabilities {
    /// Capabilities of a hypervisor called `name` that makes machines of these architectures: one
    /// vCPU, up to 1 TiB of memory, one disk, no network port, no TAP device, no power button, no disks or ports that come, go or
    /// grow while it runs, no balloon, no streams, no virtio console, unless the fields are then set otherwise.
    pub fn new(name: &'static str, architectures: Vec<Architecture>) -> Self {
        Self {
            name,
            architectures,
            max_vcpus: 1,
            max_memory_mib: 1 << 20,
            max_disks: 1,
            max_nets: 0,
            max_devices: usize::MAX,
            net_limits: false,
            tap: false,
            power_button: false,
            hot_plug: false,
            net_hot_plug: false,
            live_growth: false,
            save: false,
            balloon: false,
            vsock: false,
            virtio_console: false,
        }
    }

    /// Whether a machine can be made to this specification, as far as that can be told from the
    /// numbers alone. Every hypervisor begins [`Hypervisor::create`](super::Hypervisor::create) with it.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported), with what was asked and what is possible.
    pub fn check(&self, spec: &MachineSpec) -> Result<(), MachineError> {
        let unsupported = |what: String| Err(MachineError::new(MachineErrorKind::Unsupported, what));
        let name = self.name;
        if !self.architectures.contains(&spec.architecture) {
            let runs: Vec<&str> = self.architectures.iter().map(|a| a.as_str()).collect();
            let (asked, runs) = (spec.architecture, runs.join(", "));
            return unsupported(format!("{name} cannot run {asked} on this host; it runs {runs}"));
        }
        let processors = (spec.vcpus, spec.threads_per_core);
        self.check_size(processors, spec.memory_mib, spec.disks.len(), spec.nets.len())?;
        spec.disks.iter().try_for_each(DiskSpec::check)?;
        spec.nets.iter().try_for_each(|net| self.check_net(net))?;
        match &spec.vsock {
            Some(_) if !self.vsock => return unsupported(format!("{name} has no streams for machines")),
            Some(vsock) if !vsock.is_valid() => {
                return unsupported(format!("{} is no guest's address", vsock.cid));
            }
            Some(_) | None => {}
        }
        if spec.virtio_console.is_some() && !self.virtio_console {
            return unsupported(format!("{name} has no virtio consoles for machines"));
        }
        if spec.identity.as_ref().is_some_and(|identity| !identity.is_valid()) {
            return unsupported(format!("{name} cannot tell a guest of {:?}", spec.identity));
        }
        Ok(())
    }

    /// Whether a machine can have so much of everything: all that can be told before there is any of it.
    pub(crate) fn check_size(
        &self,
        (vcpus, threads_per_core): (NonZeroU32, NonZeroU32),
        memory_mib: NonZeroU32,
        disks: usize,
        nets: usize,
    ) -> Result<(), MachineError> {
        let unsupported = |what: String| Err(MachineError::new(MachineErrorKind::Unsupported, what));
        let name = self.name;
        if vcpus.get() > self.max_vcpus {
            let most = self.max_vcpus;
            return unsupported(format!("{name} cannot give a machine {vcpus} vCPUs; the most is {most}"));
        }
        if vcpus.get() % threads_per_core != 0 {
            return unsupported(format!("{vcpus} vCPUs are no cores of {threads_per_core} threads each"));
        }
        if u64::from(memory_mib.get()) > self.max_memory_mib {
            let most = self.max_memory_mib;
            return unsupported(format!(
                "{name} cannot give a machine {memory_mib} MiB of memory; the most is {most}"
            ));
        }
        if disks > self.max_disks {
            let most = self.max_disks;
            return unsupported(format!("{name} cannot give a machine {disks} disks; the most is {most}"));
        }
        if nets > self.max_nets {
            let most = self.max_nets;
            return unsupported(format!(
                "{name} cannot give a machine {nets} network ports; the most is {most}"
            ));
        }
        if disks.saturating_add(nets) > self.max_devices {
            let most = self.max_devices;
            return unsupported(format!(
                "{disks} disks and {nets} network ports are more than the {most} that {name} has room for"
            ));
        }
        Ok(())
    }

    /// Whether a machine may have this network port, as far as that can be told from it alone.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn check_net(&self, net: &NetSpec) -> Result<(), MachineError> {
        if net.is_limited() && !self.net_limits {
            let what = format!("{} does not hold network ports to limits", self.name);
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        if let (Some(tap), false) = (net.port.tap(), self.tap) {
            let what = format!("{} has no network ports on TAP devices, as {} is", self.name, tap.name());
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        net.check()
    }
}

/// How a [hypervisor](super::Hypervisor::execution) runs guest code.
///
/// ```
/// use instance_core::machine::Execution;
///
/// let measured = "guest kernel code: 2.9 G instructions/s".to_owned();
/// assert!(Execution::Hardware { measured }.is_hardware());
/// assert!(!Execution::Emulated { measured: "TCG of QEMU 7.2".to_owned() }.is_hardware());
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Execution {
    /// On the processor, at its speed.
    Hardware {
        /// What was measured, in words, such as `guest kernel code: 2.9 G instructions/s`.
        measured: String,
    },
    /// By an emulator or interpreter.
    Emulated {
        /// What was measured or known, in words.
        measured: String,
    },
}

impl Execution {
    /// Whether guest code runs on the processor itself.
    pub fn is_hardware(&self) -> bool {
        matches!(self, Self::Hardware { .. })
    }
}

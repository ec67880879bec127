//! A device in its place, and what it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use instance_core::machine::DiskEngine;
use instance_core::net::MacAddress;
use storage_block::Engine;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BALLOON, VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG, VIRTIO_ID_VSOCK};

use crate::gone::Gone;
use crate::saved;
use crate::thread::Thread;
use crate::virtio::VirtioDevice;

/// What a device is to the machine's user.
#[derive(Debug)]
pub(crate) enum Role {
    /// With what serves it, as the device says: see [`Block::engine`](crate::virtio::Block::engine).
    Disk(saved::Disk, Arc<OnceLock<Engine>>),
    Net(saved::Port),
    /// One of those that machines have besides.
    Other(Other),
}

/// A device that is neither a disk nor a network port, of which a machine has one of a type at most. In the order in
/// which machines have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Other {
    Entropy,
    /// Which machines have that were not saved before there was one.
    Balloon,
    /// A place for streams, if the specification says so.
    Vsock,
    /// A console, if the specification says so.
    Console,
}

impl Other {
    /// What a virtio device of this type is, if it is one of these.
    pub(crate) fn of(kind: u32) -> Option<Self> {
        Some(match kind {
            VIRTIO_ID_RNG => Self::Entropy,
            VIRTIO_ID_BALLOON => Self::Balloon,
            VIRTIO_ID_VSOCK => Self::Vsock,
            VIRTIO_ID_CONSOLE => Self::Console,
            _ => return None,
        })
    }
}

impl Role {
    /// The disk, if it is one.
    fn disk(&self) -> Option<&saved::Disk> {
        if let Self::Disk(disk, _) = self { Some(disk) } else { None }
    }

    /// The network port, if it is one.
    fn net(&self) -> Option<&saved::Port> {
        if let Self::Net(net) = self { Some(net) } else { None }
    }
}

/// A device in its place.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) number: usize,
    pub(crate) role: Role,
    pub(crate) device: VirtioDevice,
    /// A disk or a cable was taken away, while the guest has not let go of the device: its requests fail.
    hollow: AtomicBool,
    /// The thread that serves it, if one does.
    pub(crate) thread: Mutex<Option<Thread>>,
}

impl Placed {
    pub(crate) fn new(number: usize, role: Role, device: VirtioDevice) -> Self {
        Self { number, role, device, hollow: AtomicBool::new(false), thread: Mutex::default() }
    }

    /// The disk that it has, if it has one.
    pub(crate) fn disk(&self) -> Option<&saved::Disk> {
        self.role.disk().filter(|_| !self.is_hollow())
    }

    /// What serves the disk that it has, if it has one.
    pub(crate) fn disk_engine(&self) -> Option<DiskEngine> {
        let Role::Disk(disk, engine) = &self.role else { return None };
        (!self.is_hollow()).then(|| DiskEngine::new(disk.serial.clone(), engine.get().copied()))
    }

    /// The disk as the guest of the [saved](Self::save) device knows it: it may have grown since it was plugged in.
    pub(crate) fn known_disk(&self, saved: &saved::Device) -> Option<saved::Disk> {
        self.disk().map(|disk| saved.as_known(disk))
    }

    /// The network port that it is plugged into, if it is.
    pub(crate) fn net(&self) -> Option<&saved::Port> {
        self.role.net().filter(|_| !self.is_hollow())
    }

    /// Whether it is the disk with this serial number.
    pub(crate) fn is_disk(&self, serial: &str) -> bool {
        self.disk().is_some_and(|disk| disk.serial == serial)
    }

    /// Whether it is the network port with this address.
    pub(crate) fn is_net(&self, mac: MacAddress) -> bool {
        self.net().is_some_and(|net| net.mac == mac.0)
    }

    /// The place of the [saved](Self::save) device and what it has lost, if it has.
    pub(crate) fn gone(&self, saved: &saved::Device) -> Option<(u8, Gone)> {
        let gone = match &self.role {
            Role::Disk(disk, _) => Gone::Disk(saved.as_known(disk)),
            Role::Net(net) => Gone::Net(net.clone()),
            Role::Other(_) => return None,
        };
        self.is_hollow().then_some((self.number as u8, gone))
    }

    /// Takes its disk or its cable away, for which a request that is under way is waited for. False if that was done
    /// before.
    pub(crate) fn hollow_out(&self) -> bool {
        let first = !self.hollow.swap(true, Ordering::AcqRel);
        self.device.end();
        first
    }

    /// Whether it is a device whose disk or cable was taken away.
    pub(crate) fn is_hollow(&self) -> bool {
        self.hollow.load(Ordering::Acquire)
    }

    /// Whether it may leave the machine: a disk, but for the first, or a network port.
    pub(crate) fn can_go(&self) -> bool {
        match self.role {
            Role::Disk(..) => self.number > 0,
            Role::Net(_) => true,
            Role::Other(_) => false,
        }
    }

    /// As it is now. Nothing may be under way.
    pub(crate) fn save(&self) -> saved::Device {
        let role = match self.role {
            Role::Disk(..) => saved::Role::Disk,
            Role::Net(_) => saved::Role::Net,
            Role::Other(_) => saved::Role::Other,
        };
        saved::Device { place: self.number as u8, role, state: self.device.save() }
    }

    pub(crate) fn thread(&self) -> MutexGuard<'_, Option<Thread>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

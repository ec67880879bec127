//! What the transports have in common: the status, the features and the queues of a device (virtio 1.2,
//! sections 2 and 3).
//!
//! A function of what the driver does: no thread, no descriptor.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::chain::Malformed;
use super::device::{Device, Own};
use super::ring::{Description, Ring, RingState, Running};
use crate::memory::Memory;

/// What the transports offer for every device.
const TRANSPORT: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The bits of the status that a driver may set.
const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A device, and how far its driver has come with it.
#[derive(Debug)]
pub(crate) struct Core {
    device: Box<dyn Device>,
    offered: u64,
    accepted: u64,
    status: u32,
    /// Which configuration it is that the driver reads.
    generation: u32,
    rings: Vec<Ring>,
}

/// A device as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CoreState {
    pub(crate) kind: u32,
    pub(super) accepted: u64,
    status: u32,
    generation: u32,
    pub(crate) rings: Vec<RingState>,
    /// What is the device's own. Machines' files have it elsewhere: those of version 1 have none.
    #[serde(skip)]
    pub(crate) own: Own,
}

impl CoreState {
    pub(super) fn queues(&self) -> usize {
        self.rings.len()
    }
}

/// What else an access of the driver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// There may be requests in the queues.
    Notify,
    /// The device was reset: no interrupt of before is pending.
    Reset,
    /// The driver broke the rules and is told by a configuration change interrupt.
    Broken(Malformed),
}

/// What a device does on a queue. False if there was nothing to do.
type Work = fn(&mut dyn Device, usize, &mut Running<'_>, u64) -> Result<bool, Malformed>;

/// What [`Core::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is nothing to do before the next notification.
    Idle,
    /// Some work was done, and whether the driver wants to be interrupted.
    Served { interrupt: bool },
    /// As [`Effect::Broken`].
    Broken(Malformed),
}

impl Core {
    /// A device that nobody has used yet.
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        let rings = (0..device.queues()).map(|_| Ring::new()).collect();
        Self { offered: device.features() | TRANSPORT, accepted: 0, status: 0, generation: 0, rings, device }
    }

    /// The device as it is now.
    pub(crate) fn save(&self) -> CoreState {
        CoreState {
            kind: self.kind(),
            accepted: self.accepted,
            status: self.status,
            generation: self.generation,
            rings: self.rings.iter().map(Ring::save).collect(),
            own: self.device.save(),
        }
    }

    /// Goes on, as a device that nobody has used yet, where another was saved. Fails where that was of another
    /// type, or had what this one has not.
    pub(crate) fn restore(&mut self, memory: &Memory, state: &CoreState) -> Result<(), Malformed> {
        if state.kind != self.kind() || state.rings.len() != self.rings.len() {
            return Err(Malformed("the device is of another type"));
        }
        (self.accepted, self.generation) = (state.accepted, state.generation);
        // What it negotiated stays negotiated, also where it would not be offered any more.
        self.offered |= self.accepted & self.device.served();
        // Versions before took a feature also without what it requires, and a driver that has it so keeps it.
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_there() {
            return Err(Malformed("the device lacks features that the driver uses"));
        }
        self.status = state.status & (DRIVER_BITS | VIRTIO_CONFIG_S_NEEDS_RESET);
        let rings = state.rings.iter().map(|ring| Ring::restore(ring, memory, self.accepted));
        self.rings = rings.collect::<Result<_, _>>()?;
        self.device.restore(&state.own)
    }

    /// The device type.
    pub(crate) fn kind(&self) -> u32 {
        self.device.kind()
    }

    pub(crate) fn offered(&self) -> u64 {
        self.offered
    }

    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    pub(crate) fn status(&self) -> u32 {
        self.status
    }

    pub(crate) fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Whether a queue is ready; none that does not exist is.
    pub(crate) fn queue_ready(&self, n: usize) -> bool {
        self.rings.get(n).is_some_and(Ring::ready)
    }

    /// What the driver has said of a queue, if there is one.
    pub(crate) fn described(&self, n: usize) -> Option<&Description> {
        self.rings.get(n).map(Ring::described)
    }

    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub(crate) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// By which a driver tells whether the configuration has changed while it read it.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// The device's configuration changes with what is outside. Says whether the driver is to be told, which it
    /// is by a configuration change interrupt.
    pub(crate) fn refresh(&mut self) -> bool {
        self.device.refresh();
        self.generation = self.generation.wrapping_add(1);
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// See [`Device::due_in`].
    pub(crate) fn due_in(&self) -> Option<Duration> {
        self.device.due_in().filter(|_| self.is_working())
    }

    /// The machine has ended.
    pub(crate) fn end(&mut self) {
        self.device.end();
    }

    /// The driver changes the features that it accepts, which it may until they are settled.
    pub(crate) fn accept(&mut self, change: impl FnOnce(&mut u64)) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            change(&mut self.accepted);
        }
    }

    /// The driver describes a queue. What it says of one that does not exist is ignored.
    pub(crate) fn describe(&mut self, n: usize, change: impl FnOnce(&mut Description)) -> Effect {
        match self.rings.get_mut(n).map(|ring| ring.describe(change)) {
            Some(Err(why)) => self.break_down(why),
            _ => Effect::None,
        }
    }

    /// The driver says that a queue is ready, or takes it back.
    pub(crate) fn set_ready(&mut self, memory: &Memory, n: usize, ready: bool) -> Effect {
        let Some(ring) = self.rings.get_mut(n) else { return Effect::None };
        if !ready {
            ring.stop();
            self.device.stop(n);
            // Other queues may have something of what has ended meanwhile.
            return Effect::Notify;
        }
        match ring.make_ready(memory, self.accepted) {
            Ok(()) => Effect::None,
            Err(why) => self.break_down(why),
        }
    }

    /// The driver writes the status.
    pub(crate) fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.status = 0;
            self.accepted = 0;
            self.rings.iter_mut().for_each(|ring| *ring = Ring::new());
            self.device.reset();
            return Effect::Reset;
        }
        let mut added = value & DRIVER_BITS & !self.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_acceptable() {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.stop_all();
        }
        // Requests may have been put into the queue before the driver was done.
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 { Effect::Notify } else { Effect::None }
    }

    /// Whether the driver accepted what it was offered, and no feature without those that it requires.
    fn features_are_acceptable(&self) -> bool {
        let accepted = |bit: u32| self.accepted & 1 << bit != 0;
        let is_met = |&(feature, requires): &(u32, u32)| !accepted(feature) || accepted(requires);
        self.features_are_there() && self.device.requirements().iter().all(is_met)
    }

    fn features_are_there(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// Whether the driver is ready, and neither it nor the device has given up.
    fn is_working(&self) -> bool {
        const WORKING: u32 = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        const STOPPED: u32 = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status & (WORKING | STOPPED) == WORKING
    }

    fn break_down(&mut self, why: Malformed) -> Effect {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.stop_all();
        Effect::Broken(why)
    }

    fn stop_all(&mut self) {
        (0..self.rings.len()).for_each(|n| self.device.stop(n));
    }

    /// See [`Device::ended`].
    pub(crate) fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.device.ended()
    }

    /// Has the device do a piece of work on a queue, if there is any and the driver is ready.
    pub(crate) fn step(&mut self, memory: &Memory, n: usize) -> Step {
        self.work(memory, n, |device, n, ring, features| device.serve(n, ring, features))
    }

    /// Has the device finish what it has begun of a queue's requests.
    pub(crate) fn settle(&mut self, memory: &Memory, n: usize) -> Step {
        self.work(memory, n, |device, n, ring, _| device.settle(n, ring).map(|()| false))
    }

    fn work(&mut self, memory: &Memory, n: usize, work: Work) -> Step {
        if !self.is_working() || !self.queue_ready(n) {
            return Step::Idle;
        }
        match self.try_work(memory, n, work) {
            Ok(step) => step,
            Err(why) => {
                self.break_down(why);
                Step::Broken(why)
            }
        }
    }

    fn try_work(&mut self, memory: &Memory, n: usize, work: Work) -> Result<Step, Malformed> {
        let ready = self.rings.iter().take_while(|ring| ring.ready()).count();
        let Some(ring) = self.rings.get_mut(n) else { return Ok(Step::Idle) };
        let mut running = ring.run(memory).among(ready);
        let worked = work(&mut *self.device, n, &mut running, self.accepted)?;
        let interrupt = running.wants_interrupt()?;
        Ok(if worked || interrupt { Step::Served { interrupt } } else { Step::Idle })
    }
}

//! The virtio network device (virtio 1.2, 5.1): pairs of queues, of frames to the guest and of frames from it, and a
//! queue of commands where there are several.
//!
//! Frames go through a [`NetPort`]. What the network takes of checksums to be computed and long frames to be
//! cut is offered to the driver, and what the driver takes is told to the network. All frames go one after the other
//! through the port's limits, whichever pair they are of.

mod config;
mod control;
mod deliver;
mod header;
mod spares;
mod steering;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_pairs;
#[cfg(test)]
mod tests_of_taps;
mod vhost;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::{iter, mem};

use instance_core::machine::NetSpec;
use instance_core::net::{Frame, FrameLimits, NetPort, Offloads, SendError};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use self::config::{Config, REQUIREMENTS, taken_by_driver};
use self::deliver::{Delivery, deliver};
use self::header::{HEADER_LEN, Header};
pub(crate) use self::spares::{Shared as SharedSpares, Spares};
use self::steering::Steering;
pub(crate) use self::vhost::KernelNet;
pub use self::vhost::VhostNet;
use super::chain::{Chain, Malformed};
use super::device::{Device, Own};
use super::ring::Running;

/// The most pairs of queues: as many as EC2's interfaces have.
const MAX_PAIRS: usize = 8;

/// Addresses and type: what every frame has.
const ETHERNET_LEN: usize = 14;

/// How many frames are moved before the driver and other queues have their turn.
const BATCH: usize = 64;
/// How many descriptors are read for frames to the guest before that, the last frame's aside. A driver needs fewer for so many
/// frames; a hostile one may have a thousand read for each that its queue has no room for.
const DESCRIPTORS: usize = 4096;
/// How many frames wait for a pair before others for it are lost: as many as another pair hands over in its turn.
const WAITING_MAX: usize = BATCH;

/// A network device.
#[derive(Debug)]
pub(crate) struct Net {
    /// None when the machine has ended.
    port: Option<NetPort>,
    config: Config,
    /// What the network took when the machine was made, which is what is offered.
    offered: Offloads,
    /// The frames that wait, of each pair that there may be.
    pairs: Vec<Pair>,
    steering: Steering,
    state: State,
    receive: Pace,
    transmit: Pace,
    /// No frame waited in the port when the driver had room for one last, and nobody was told since when one does.
    dry: bool,
    spares: Arc<Spares>,
}

/// What is the device's own to remember.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// How many pairs the driver has frames for it put into.
    pairs: u16,
}

/// The frames of a pair of queues that wait.
#[derive(Debug, Default)]
struct Pair {
    /// Those that the guest has no buffers for yet, or whose turn it was not.
    inbound: VecDeque<Frame>,
    /// The last one for the guest found buffers: there will be room for others.
    flows: bool,
    /// The one that the network has no room for yet.
    outbound: Option<Frame>,
}

impl Pair {
    /// Keeps a frame for the guest until it is this pair's turn. False, and it is lost, if enough wait.
    fn keep(&mut self, frame: Frame) -> bool {
        let there_is_room = self.inbound.len() < WAITING_MAX;
        if there_is_room {
            self.inbound.push_back(frame);
        } else {
            tracing::trace!("a frame for a guest is lost: its pair of queues has no buffers");
        }
        there_is_room
    }
}

/// What frames of one direction are held to.
#[derive(Debug)]
struct Pace {
    limits: FrameLimits,
    /// How long the next one has to wait, where it has.
    delay: Option<Duration>,
}

impl Pace {
    fn new(limits: &FrameLimits) -> Self {
        Self { limits: limits.clone(), delay: None }
    }

    /// Whether the next frame may pass now.
    fn is_ready(&mut self) -> bool {
        self.delay = self.limits.delay();
        self.delay.is_none()
    }
}

impl Net {
    /// A device that is plugged in as `spec` says, with so many pairs of queues at most.
    pub(crate) fn new(spec: &NetSpec, pairs: usize) -> Self {
        let pairs = pairs.clamp(1, MAX_PAIRS);
        Self {
            port: Some(spec.port.clone()),
            config: Config::new(spec, pairs),
            offered: spec.port.peer_takes(),
            pairs: iter::repeat_with(Pair::default).take(pairs).collect(),
            steering: Steering::new(),
            state: State { pairs: 1 },
            receive: Pace::new(&spec.receive_limits),
            transmit: Pace::new(&spec.transmit_limits),
            dry: false,
            spares: Arc::default(),
        }
    }

    /// The same, with the memory of its frames from there.
    pub(crate) fn sharing(self, spares: Arc<Spares>) -> Self {
        Self { spares, ..self }
    }

    /// How many pairs there are where the device has so many queues.
    pub(crate) fn pairs_of(queues: usize) -> usize {
        (queues / 2).max(1)
    }

    /// What a queue is for, where the driver accepted these features: where that is one pair, commands come next.
    fn queue_of(&self, queue: usize, features: u64) -> Option<QueueKind> {
        let accepted = |bit: u32| features & 1 << bit != 0;
        let usable = if accepted(VIRTIO_NET_F_MQ) { self.pairs.len() } else { 1 };
        match (queue / 2, queue % 2) {
            (pair, 0) if pair < usable => Some(QueueKind::Receive(pair)),
            (pair, _) if pair < usable => Some(QueueKind::Transmit(pair)),
            (pair, 0) if pair == usable && accepted(VIRTIO_NET_F_CTRL_VQ) => Some(QueueKind::Control),
            _ => None,
        }
    }

    /// Moves frames from the network to a pair of the driver's, and those between them to where they belong. False if
    /// there is nothing to do before the next frame or buffer.
    ///
    /// Where there are several pairs, one whose driver gives it no buffers must not stop the others: what is for it is
    /// lost when enough of it waits. Where there is one, everything waits in the cable.
    fn receive(&mut self, pair: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(port) = self.port.clone() else { return Ok(false) };
        let takes = taken_by_driver(features);
        if port.takes() != takes {
            port.set_takes(takes);
        }
        let mut handed_over = false;
        for _ in 0..BATCH {
            let frame = match self.pairs[pair].inbound.pop_front() {
                Some(frame) => frame,
                None if !self.may_fetch(pair) || !self.receive.is_ready() => return Ok(handed_over),
                None => {
                    let Some(frame) = port.recv() else {
                        self.dry = true;
                        return Ok(handed_over);
                    };
                    self.dry = false;
                    self.receive.limits.charge(frame.data.len());
                    if !frame.is_sound() || !frame.is_taken_by(takes) || !self.config.is_short_enough(&frame)
                    {
                        tracing::trace!("a frame for a guest is not one that it takes");
                        continue;
                    }
                    let of = self.steering.pair_for(&frame, self.state.pairs.into());
                    if of != pair {
                        handed_over |= self.pairs[of].keep(frame);
                        continue;
                    }
                    frame
                }
            };
            let delivery = deliver(frame, ring, features)?;
            let own = &mut self.pairs[pair];
            own.flows = !matches!(delivery, Delivery::NoRoom(_));
            match delivery {
                Delivery::Done(frame) => self.spares.give(frame.data),
                Delivery::NoRoom(frame) => {
                    own.inbound.push_front(frame);
                    return Ok(handed_over);
                }
            }
            if ring.descriptors() >= DESCRIPTORS {
                break;
            }
        }
        Ok(true)
    }

    /// Whether a pair is to take frames from the cable: one in use, unless another has first to have its turn.
    fn may_fetch(&self, pair: usize) -> bool {
        let used = &self.pairs[..self.state.pairs.into()];
        pair < used.len() && !used.iter().any(|pair| pair.flows && pair.inbound.len() >= WAITING_MAX)
    }

    /// Moves frames from a pair of the driver's to the network. False if there is nothing to do before the next frame,
    /// or before the network has room.
    ///
    /// Also from a pair that is not in use, although no driver is to send by one (virtio 1.2, 5.1.6.5.6.1): Linux's has fewer
    /// used, while it sends by all, before it stops sending by the others, and some send by all before any are set.
    fn transmit(&mut self, pair: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(port) = self.port.clone() else { return Ok(false) };
        for _ in 0..BATCH {
            if let Some(frame) = self.pairs[pair].outbound.take() {
                if let Err(SendError::Full(frame)) = port.send(frame) {
                    self.pairs[pair].outbound = Some(frame);
                    return Ok(false);
                }
            }
            if !self.transmit.is_ready() {
                return Ok(false);
            }
            let Some(chain) = ring.next()? else { return Ok(false) };
            let frame = self.take_frame(&chain, ring, features)?;
            if let Some(frame) = &frame {
                self.transmit.limits.charge(frame.data.len());
                self.steering.learn(frame, pair);
            }
            self.pairs[pair].outbound = frame;
            ring.put_used(&chain, 0)?;
        }
        Ok(true)
    }

    /// Has frames for the driver put into so many pairs from now on, if there are so many. Those that wait for others
    /// are lost, as on a cable that was pulled.
    fn use_pairs(&mut self, pairs: u16) -> bool {
        let used = usize::from(pairs);
        let possible = (1..=self.pairs.len()).contains(&used);
        if possible {
            self.state.pairs = pairs;
            self.pairs.iter_mut().skip(used).for_each(|pair| pair.inbound.clear());
        }
        possible
    }

    /// Copies the frame of a chain, once. None where it is not one for the network.
    fn take_frame(
        &self,
        chain: &Chain,
        ring: &Running<'_>,
        features: u64,
    ) -> Result<Option<Frame>, Malformed> {
        if chain.writable.len() > 0 {
            return Err(Malformed("a frame's buffers are not for reading"));
        }
        let mut header = [0; HEADER_LEN];
        chain.readable.read(ring.memory(), 0, &mut header).map_err(|_| Malformed("a frame has no header"))?;
        let len = chain.readable.len() - HEADER_LEN as u64;
        if len < ETHERNET_LEN as u64 || len > Frame::MAX_LEN as u64 {
            return Ok(None);
        }
        let mut data = self.spares.take(len as usize);
        chain.readable.append_to(&mut data, ring.memory(), HEADER_LEN as u64, len as usize)?;
        let mut frame = Frame::new(data);
        Header::parse(header).apply(&mut frame, features)?;
        let sound =
            frame.is_sound() && frame.is_taken_by(self.offered) && self.config.is_short_enough(&frame);
        Ok(sound.then_some(frame))
    }
}

/// What a queue is for; of what pair.
enum QueueKind {
    Receive(usize),
    Transmit(usize),
    Control,
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.config.features(self.offered)
    }

    fn requirements(&self) -> &'static [(u32, u32)] {
        &REQUIREMENTS
    }

    fn queues(&self) -> usize {
        2 * self.pairs.len() + usize::from(self.pairs.len() > 1)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        match self.queue_of(queue, features) {
            Some(QueueKind::Receive(pair)) => self.receive(pair, ring, features),
            Some(QueueKind::Transmit(pair)) => self.transmit(pair, ring, features),
            Some(QueueKind::Control) => self.obey(ring, features),
            None => Ok(false),
        }
    }

    fn stop(&mut self, queue: usize) {
        // Other queues that wait for the limits say so when they are looked at, which they are now.
        (self.receive.delay, self.transmit.delay) = (None, None);
        if let Some(pair) = self.pairs.get_mut(queue / 2).filter(|_| queue.is_multiple_of(2)) {
            pair.flows = false;
        }
    }

    /// The frames that wait are lost, as on a cable that was pulled.
    fn reset(&mut self) {
        self.pairs.fill_with(Pair::default);
        (self.steering, self.state) = (Steering::new(), State { pairs: 1 });
        (self.receive.delay, self.transmit.delay, self.dry) = (None, None, false);
        if let Some(port) = &self.port {
            port.set_takes(Offloads::NONE);
            port.discard();
        }
    }

    fn due_in(&self) -> Option<Duration> {
        self.receive.delay.into_iter().chain(self.transmit.delay).min()
    }

    /// A TAP device's descriptor, which is readable as long as frames wait: only when it is for them alone that the driver
    /// waits.
    fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        let dry = mem::take(&mut self.dry);
        self.port.as_ref().filter(|port| dry && port.is_connected())?.descriptor()
    }

    fn end(&mut self) {
        (self.receive.delay, self.transmit.delay) = (None, None);
        if let Some(port) = self.port.take() {
            port.set_waker(None);
        }
    }

    fn save(&self) -> Own {
        if self.pairs.len() > 1 { Own::Net(self.state.clone()) } else { Own::None }
    }

    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        let fits = match own {
            Own::Net(State { pairs }) => self.pairs.len() > 1 && self.use_pairs(*pairs),
            _ => self.pairs.len() == 1 && *own == Own::None,
        };
        if fits { Ok(()) } else { Err(Malformed("the device is of another type")) }
    }
}

//! What a virtio device is to the transport that carries it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::chain::Malformed;
use super::ring::Running;
use super::{balloon, block, console, net, rng};

/// What a device has to remember beside its queues when it is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Own {
    #[default]
    None,
    Console(console::State),
    Net(net::State),
    /// Since version 3.
    Balloon(balloon::State),
    /// Since version 4.
    Block(block::State),
    /// Since version 4.
    Entropy(rng::State),
}

impl Own {
    /// Since which version saved machines have had it.
    pub(crate) fn since(&self) -> u32 {
        match self {
            Self::None => 1,
            Self::Console(_) | Self::Net(_) => 2,
            Self::Balloon(_) => 3,
            Self::Block(_) | Self::Entropy(_) => 4,
        }
    }
}

/// The logic of a device: a function of what the driver puts into its queues, without threads,
/// descriptors or registers.
///
/// The transport calls it with one thing at a time. What the driver breaks is [`Malformed`]: the device then
/// waits for a reset, and nothing else notices.
pub(crate) trait Device: fmt::Debug + Send {
    /// The device type (virtio 1.2, section 5).
    fn kind(&self) -> u32;

    /// The features of its type that are offered; those of the transport come to them.
    fn features(&self) -> u64;

    /// Which of its features require which others, by their bits, a feature and what it requires at a time: a driver is not to
    /// accept the one without the other (virtio 1.2, 2.2.1).
    fn requirements(&self) -> &'static [(u32, u32)] {
        &[]
    }

    /// The features that it has for a driver which was offered them where its machine was saved; all that are offered are
    /// among them.
    fn served(&self) -> u64 {
        self.features()
    }

    /// How many queues it has.
    fn queues(&self) -> usize;

    /// The driver reads its configuration. What lies beyond its end stays as it is in `data`, zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes its configuration; most have nothing that can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Does a bounded piece of work on a queue whose driver is ready, with the `features` that it accepted.
    /// False if there is nothing to do before the driver's next notification.
    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed>;

    /// How long until it has to be served again although nobody notifies, where it is.
    fn due_in(&self) -> Option<Duration> {
        None
    }

    /// Finishes what it has begun of a queue's requests, and begins nothing, since the machine is to stand still.
    fn settle(&mut self, _queue: usize, _ring: &mut Running<'_>) -> Result<(), Malformed> {
        Ok(())
    }

    /// Nothing of what the driver has put into a queue is to be done any more, and nothing is under way when this
    /// returns: the memory is the driver's again.
    fn stop(&mut self, _queue: usize) {}

    /// What is readable when something has ended that is under way outside, and that nobody wakes the device's
    /// thread for.
    fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        None
    }

    /// Takes up what has changed outside, such as a disk's size. Its configuration changes by nothing else but the
    /// driver's doing, so that one that is read in parts is of one piece.
    fn refresh(&mut self) {}

    /// The driver has reset it, or begins. Nothing is under way when this returns.
    fn reset(&mut self) {}

    /// The machine has ended: what is connected outside may go, and nothing is under way when this returns.
    fn end(&mut self) {}

    /// What it has to remember.
    fn save(&self) -> Own {
        Own::None
    }

    /// Goes on with what another had to remember; fails if that was of another type.
    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        if *own == Own::None { Ok(()) } else { Err(Malformed("the device is of another type")) }
    }
}

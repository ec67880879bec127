//! The virtio console (virtio 1.2, 5.3): one port, with a queue of bytes to the guest and one from it.
//!
//! What is typed stays in the [`ConsolePort`] until the guest has room for it, and what it writes goes there at once,
//! which never waits: nobody is held up by a guest that does not read, nor by one that does nothing else but write.

use instance_core::console::{ConsolePort, ConsoleSize};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::chain::Malformed;
use super::device::{Device, Own};
use super::ring::Running;

/// The queue of bytes to the guest.
pub(super) const RECEIVE: usize = 0;
/// The queue of bytes from the guest.
pub(super) const TRANSMIT: usize = 1;

/// The feature that the guest is told the terminal's size. Others, among them several ports, are not offered.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// How many bytes are moved before the driver and the other queue have their turn.
pub(super) const BATCH: u64 = 16 << 10;

/// A console.
#[derive(Debug)]
pub(crate) struct Console {
    /// None when the machine has ended.
    port: Option<ConsolePort>,
    /// The terminal's size as the driver is told it.
    size: ConsoleSize,
    state: State,
}

/// How far it has been served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// The bytes of the next chain from the guest that have been taken: a chain may be long, and is then looked at again.
    taken: u64,
}

impl Console {
    /// The guest's side of this port.
    pub(crate) fn new(port: ConsolePort) -> Self {
        Self { size: port.size(), port: Some(port), state: State::default() }
    }

    /// Gives the driver what was typed. False if there is nothing, or no room for it.
    fn receive(&self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Some(port) = self.port.as_ref().filter(|port| port.input_waiting() > 0) else { return Ok(false) };
        let Some(chain) = ring.next()? else { return Ok(false) };
        if chain.readable.len() > 0 || chain.writable.len() == 0 {
            return Err(Malformed("a buffer for what is typed is not for writing"));
        }
        let mut typed = vec![0; chain.writable.len().min(BATCH) as usize];
        let len = port.read_input(&mut typed);
        chain.writable.write(ring.memory(), 0, &typed[..len])?;
        ring.put_used(&chain, len as u32)?;
        Ok(true)
    }

    /// Takes what the driver writes. False if there is nothing.
    fn transmit(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let (Some(port), Some(chain)) = (&self.port, ring.next()?) else { return Ok(false) };
        if chain.writable.len() > 0 {
            return Err(Malformed("a buffer of what is written is not for reading"));
        }
        let rest = chain.readable.len().saturating_sub(self.state.taken);
        let mut written = vec![0; rest.min(BATCH) as usize];
        chain.readable.read(ring.memory(), self.state.taken, &mut written)?;
        port.write_output(&written);
        if written.len() as u64 == rest {
            self.state.taken = 0;
            ring.put_used(&chain, 0)?;
        } else {
            self.state.taken += written.len() as u64;
            ring.put_back(1);
        }
        Ok(true)
    }
}

impl Device for Console {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_SIZE
    }

    fn queues(&self) -> usize {
        2
    }

    /// `struct virtio_console_config`, as far as features of it are offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [c0, c1] = self.size.columns.to_le_bytes();
        let [r0, r1] = self.size.rows.to_le_bytes();
        let config = [c0, c1, r0, r1];
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, _features: u64) -> Result<bool, Malformed> {
        match queue {
            RECEIVE => self.receive(ring),
            TRANSMIT => self.transmit(ring),
            _ => Ok(false),
        }
    }

    fn refresh(&mut self) {
        if let Some(port) = &self.port {
            self.size = port.size();
        }
    }

    fn stop(&mut self, queue: usize) {
        if queue == TRANSMIT {
            // What of a buffer was taken says nothing of the next one.
            self.state = State::default();
        }
    }

    fn reset(&mut self) {
        self.state = State::default();
    }

    fn end(&mut self) {
        if let Some(port) = self.port.take() {
            port.set_input_notifier(None);
            port.set_resize_notifier(None);
        }
    }

    fn save(&self) -> Own {
        Own::Console(self.state.clone())
    }

    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        let Own::Console(state) = own else { return Err(Malformed("the device is of another type")) };
        self.state = state.clone();
        Ok(())
    }
}

//! The virtio entropy device (virtio 1.2, 5.4): random bytes of the host's kernel.
//!
//! A guest that has one need not wait at its first start until it has gathered randomness itself, and two
//! that began as one image do not share any.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::chain::Malformed;
use super::device::{Device, Own};
use super::ring::Running;

/// The most bytes of an answer; the driver may ask again.
const ANSWER_MAX: u64 = 4096;

/// What an entropy device has to remember beside its queue: nothing. Whoever goes on from a saved machine has other random
/// bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {}

/// An entropy device.
#[derive(Debug)]
pub(crate) struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        1
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn serve(&mut self, _queue: usize, ring: &mut Running<'_>, _features: u64) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        if chain.readable.len() > 0 {
            return Err(Malformed("a buffer for random bytes is not for writing"));
        }
        let mut bytes = vec![0; chain.writable.len().min(ANSWER_MAX) as usize];
        // A kernel without randomness is one that is booting: the driver gets none and asks again.
        let written = if getrandom::fill(&mut bytes).is_ok() { bytes.len() } else { 0 };
        chain.writable.write(ring.memory(), 0, &bytes[..written])?;
        ring.put_used(&chain, written as u32)?;
        Ok(true)
    }

    fn save(&self) -> Own {
        Own::Entropy(State {})
    }

    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        match own {
            // Machines of earlier versions do not tell.
            Own::Entropy(State {}) | Own::None => Ok(()),
            _ => Err(Malformed("the device is of another type")),
        }
    }
}

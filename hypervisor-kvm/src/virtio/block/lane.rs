//! A virtqueue's share of a block device: what of its requests is under way, and what it is to be told.

use std::mem;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::chain::Malformed;
use super::super::ring::Running;
use super::request::Request;
use super::unheard::Window;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// What its driver has still to be told.
    pub(super) answers: Vec<Answer>,
    /// How many of its requests are under way.
    pub(super) under_way: usize,
    /// How many bytes these read and write.
    pub(super) bytes: u64,
    /// How many of the requests that were last taken from it have never begun, and are the next ones again.
    pub(super) left: u16,
    /// Its driver has been asked to notify of the next request, which has not been taken.
    pub(super) asked: bool,
    /// As long as its driver has not been asked to notify.
    pub(super) unheard: Option<Window>,
}

/// A request that has ended.
#[derive(Debug)]
pub(super) struct Answer {
    head: u16,
    status_at: GuestAddress,
    pub(super) status: u32,
    /// The bytes of data that were written to the guest.
    pub(super) written: u32,
}

/// A request that is under way.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) lane: usize,
    pub(super) stage: Stage,
    pub(super) bytes: u64,
    /// If all goes well.
    pub(super) answer: Answer,
}

/// What of a request is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// All of it.
    Whole,
    /// What has to be durable before it is answered, since its driver cannot flush (virtio 1.2, 5.2.6.2).
    BeforeFlush,
    /// The flush after that.
    Flush,
}

impl Lane {
    /// Tells the driver of what has ended. False if nothing has.
    pub(super) fn answer(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        ring.put_back(mem::take(&mut self.left));
        if self.answers.is_empty() {
            return Ok(false);
        }
        for answer in &self.answers {
            let at = ring.memory().get_slice(answer.status_at, 1);
            let written = at.and_then(|at| Ok(at.write_obj(answer.status as u8, 0)?));
            written.map_err(|_| Malformed("a status lies outside the memory"))?;
        }
        ring.put_all_used(self.answers.drain(..).map(|answer| (answer.head, answer.written + 1)))?;
        Ok(true)
    }
}

impl Answer {
    pub(super) fn to(request: &Request<'_>, (status, written): (u32, u32)) -> Self {
        Self { head: request.chain.head, status_at: request.status_at, status, written }
    }
}

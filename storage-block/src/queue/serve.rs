//! How requests go to the engines and come back.

use std::collections::VecDeque;
use std::time::Duration;

use super::request::{Job, Memory, Request};
use super::{Completion, Queue};
use crate::disk::Op;
use crate::{Extent, Result};

/// A queue that waits for its disk's limits looks at them at least so often, since they may have changed.
const LIMITS_AGE: Duration = Duration::from_millis(100);

impl Queue {
    /// Begins as many requests as may be under way.
    pub(super) fn begin(&mut self) {
        self.delayed = false;
        while self.running() < self.depth && !self.backlog.is_empty() {
            if let Err(delay) = self.pass_limits() {
                self.delayed = true;
                self.signal.after(delay.min(LIMITS_AGE));
                break;
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
            self.slots[slot] = self.backlog.pop_front();
            self.start(slot);
        }
        if let Some(ring) = &mut self.ring {
            ring.submit();
            if ring.unsent() && self.signal.watched() {
                // Nothing tells when the kernel takes more; whoever polls tries again.
                self.signal.event.signal();
            }
        }
    }

    /// Lets the first of the backlog through the disk's limits, or says how long it has to wait for the next.
    fn pass_limits(&mut self) -> Result<(), Duration> {
        let (Some(limiters), Some(request)) = (&self.limiters, self.backlog.front_mut()) else {
            return Ok(());
        };
        for limiter in &limiters[request.passed..] {
            limiter.try_take(self.disk.cost(request.op, request.len))?;
            request.passed += 1;
        }
        Ok(())
    }

    /// Gives back to the disk's limits what requests have taken that do not begin any more.
    pub(super) fn give_back(&mut self) {
        let Some(limiters) = &self.limiters else { return };
        for request in &mut self.backlog {
            let passed = std::mem::take(&mut request.passed);
            let cost = self.disk.cost(request.op, request.len);
            limiters[..passed].iter().for_each(|limiter| limiter.give_back(cost));
        }
    }

    /// Gives what is left of a request to whoever serves it.
    fn start(&mut self, slot: usize) {
        let (Some(ring), Some(request)) = (&mut self.ring, &mut self.slots[slot]) else {
            return self.start_on_thread(slot);
        };
        // Whether a write goes where the block is already is for the backend to decide, and threads write faster.
        let extent = match request.op {
            Op::Read => self.disk.backend.extent(request.offset, request.len),
            _ => Extent::Backend { len: request.len },
        };
        match extent {
            // SAFETY: the file is open as long as the backend is, which the queue keeps until the ring is empty. The
            // memory is the request's, valid until it is reported; the request stays in its slot as it is until the
            // ring gives that back. No more slots are in use than the ring has entries.
            Extent::File { file, offset, len } if len >= request.len => unsafe {
                ring.push(slot, file, offset, &mut request.memory);
            },
            Extent::Zeroes { len } if len >= request.len => {
                request.memory.zero();
                self.finish(slot, Ok(()));
            }
            _ => self.start_on_thread(slot),
        }
    }

    fn start_on_thread(&mut self, slot: usize) {
        let Some(request) = &mut self.slots[slot] else { return };
        let memory = std::mem::replace(&mut request.memory, Memory::None);
        self.pool.push(Job { slot, op: request.op, offset: request.offset, len: request.len, memory });
    }

    /// Takes what has ended from the engines, and begins more.
    pub(super) fn collect(&mut self) {
        let mut again = std::mem::take(&mut self.unfinished);
        if let Some(mut ring) = self.ring.take() {
            ring.collect(|slot, result| match self.ended(slot, result) {
                Next::Done => self.finish(slot, Ok(())),
                next => again.push((slot, matches!(next, Next::Thread))),
            });
            self.ring = Some(ring);
        }
        for (slot, on_thread) in again.drain(..) {
            if on_thread { self.start_on_thread(slot) } else { self.start(slot) }
        }
        self.unfinished = again;
        let (slots, free, ready) = (&mut self.slots, &mut self.free, &mut self.ready);
        self.pool.collect(|(slot, result)| finish(slots, free, ready, slot, result));
        self.begin();
    }

    /// What to do after the ring has done some of a read.
    fn ended(&mut self, slot: usize, result: Result<usize, i32>) -> Next {
        const AGAIN: [i32; 2] = [libc::EINTR, libc::EAGAIN];
        let Some(request) = &mut self.slots[slot] else { return Next::Done };
        match result {
            Err(code) if AGAIN.contains(&code) => Next::Again,
            Ok(done) if done as u64 >= request.len => Next::Done,
            Ok(done) if done > 0 => {
                request.memory.advance(done);
                request.offset += done as u64;
                request.len -= done as u64;
                Next::Again
            }
            // The backend does better, or knows what is wrong.
            _ => Next::Thread,
        }
    }

    pub(super) fn finish(&mut self, slot: usize, result: Result<()>) {
        finish(&mut self.slots, &mut self.free, &mut self.ready, slot, result);
    }
}

/// How a request goes on that the ring is done with.
enum Next {
    Done,
    Again,
    Thread,
}

fn finish(
    slots: &mut [Option<Request>],
    free: &mut Vec<usize>,
    ready: &mut VecDeque<Completion>,
    slot: usize,
    result: Result<()>,
) {
    if let Some(request) = slots[slot].take() {
        free.push(slot);
        ready.push_back(Completion { token: request.token, result, buffer: request.owned });
    }
}

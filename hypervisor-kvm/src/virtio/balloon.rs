//! The virtio memory balloon (virtio 1.2, 5.5): pages that the guest leaves to the host.
//!
//! The host names a size, and the guest puts as many pages into the balloon as it can spare; it may take them
//! back when it has no others. Beside that it reports pages that are free by chance. What is given back is
//! there again when it is used, so that no page has to be asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::chain::{Buffers, Chain, Malformed};
use super::device::{Device, Own};
use super::ring::Running;
use crate::error::{Result, unsupported};
use crate::memory;

/// Features: the guest takes pages back when it has no others; it reports pages that are free.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// The queue of pages for the balloon.
pub(super) const INFLATE: usize = 0;
/// The queue of pages that the guest takes back.
pub(super) const DEFLATE: usize = 1;
/// All of them. Those after the first two are for reports: which one it is, drivers count in different ways, as
/// the queues between belong to features that are not offered.
pub(super) const QUEUES: usize = 5;

/// The bytes of a page, whatever pages the guest has.
const PAGE: u64 = 4096;
/// The bytes of a page's number.
const NUMBER_LEN: u64 = 4;
/// How many pages of a list are given back before others have their turn.
const BATCH: u64 = 1024;
/// How many bytes of what is reported, which is whole pieces of memory.
pub(super) const REPORT_BATCH: u64 = 64 << 20;
/// Where the configuration has how many pages are in the balloon, which the driver writes.
const ACTUAL: u64 = 4;

/// What the host wants of a balloon and hears of it.
#[derive(Debug)]
pub(crate) struct Wish {
    memory_mib: u32,
    pages: AtomicU32,
    actual: AtomicU32,
}

impl Wish {
    /// None, of a machine with so much memory.
    pub(crate) fn new(memory_mib: u32) -> Self {
        Self { memory_mib, pages: AtomicU32::new(0), actual: AtomicU32::new(0) }
    }

    /// Names the size of the balloon, which is less than all memory. The device must then be refreshed.
    pub(crate) fn set_mib(&self, mib: u32) -> Result<()> {
        let most = self.memory_mib;
        if mib >= most {
            return Err(unsupported(format!("a guest of {most} MiB cannot leave {mib} MiB to its host")));
        }
        self.pages.store(mib.saturating_mul(MIB_PAGES), Ordering::Release);
        Ok(())
    }

    /// How large the guest says that it is, which is no more than there can be.
    pub(crate) fn actual_mib(&self) -> u32 {
        (self.actual.load(Ordering::Acquire) / MIB_PAGES).min(self.memory_mib)
    }
}

const MIB_PAGES: u32 = (1 << 20) / PAGE as u32;

/// A memory balloon.
#[derive(Debug)]
pub(crate) struct Balloon {
    wish: Arc<Wish>,
    state: State,
    /// The bytes of the next report that are done, of each queue that may have some. Not to be remembered: what is reported
    /// may be given back twice.
    reported: [u64; QUEUES],
}

/// What the guest sees of a balloon, and how far it has been served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// The size that the driver is told, in pages.
    target: u32,
    /// The size that the driver tells.
    actual: u32,
    /// The bytes of the next list of pages that are done.
    done: u64,
}

impl Balloon {
    /// An empty balloon.
    pub(crate) fn new(wish: Arc<Wish>) -> Self {
        Self { wish, state: State::default(), reported: [0; QUEUES] }
    }

    fn set_actual(&mut self, pages: u32) {
        self.state.actual = pages;
        self.wish.actual.store(pages, Ordering::Release);
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.state.target.to_le_bytes());
        config[4..].copy_from_slice(&self.state.actual.to_le_bytes());
        config
    }

    /// Gives back some of the pages of a list: a list may be long, and is then looked at again.
    fn inflate(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        let list = list_of(&chain)?;
        let rest = list.len().saturating_sub(self.state.done);
        let mut bytes = vec![0; rest.min(BATCH * NUMBER_LEN) as usize];
        list.read(ring.memory(), self.state.done, &mut bytes)?;
        let numbers = bytes.chunks_exact(NUMBER_LEN as usize);
        let mut pages: Vec<u32> =
            numbers.map(|n| n.iter().rev().fold(0, |page, byte| page << 8 | u32::from(*byte))).collect();
        pages.sort_unstable();
        for (first, count) in runs(&pages) {
            let (start, len) = (u64::from(first) * PAGE, count * PAGE);
            memory::release(ring.memory(), start, len).ok_or(Malformed("a page is not of the memory"))?;
        }
        if bytes.len() as u64 == rest {
            self.state.done = 0;
            ring.put_used(&chain, 0)?;
        } else {
            self.state.done += bytes.len() as u64;
            ring.put_back(1);
        }
        Ok(true)
    }

    /// The guest takes pages back. There is nothing to do for it.
    fn deflate(ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        list_of(&chain)?;
        ring.put_used(&chain, 0)?;
        Ok(true)
    }

    /// Gives back some of the pages that are free until this has been answered, and that the guest may then use.
    fn report(&mut self, queue: usize, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        if chain.readable.len() > 0 {
            return Err(Malformed("pages are reported that are not for writing"));
        }
        let done = &mut self.reported[queue];
        let (mut skipped, mut most) = (*done, REPORT_BATCH);
        for (start, len) in chain.writable.segments() {
            // An empty one may be anywhere.
            let (from, end) = (start + skipped.min(len.into()), start + u64::from(len));
            skipped -= from - start;
            // Between pages, so that none is given back by halves, which is not at all.
            let until = if end - from <= most { end } else { from.max((from + most) / PAGE * PAGE) };
            memory::release(ring.memory(), from, until - from)
                .ok_or(Malformed("a page is not of the memory"))?;
            *done += until - from;
            if until < end {
                ring.put_back(1);
                return Ok(true);
            }
            most -= until - from;
        }
        *done = 0;
        ring.put_used(&chain, 0)?;
        Ok(true)
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn queues(&self) -> usize {
        QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, &[a, b, c, d]) = (offset, data) {
            self.set_actual(u32::from_le_bytes([a, b, c, d]));
        }
    }

    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        match queue {
            INFLATE => self.inflate(ring),
            DEFLATE => Self::deflate(ring),
            _ if features & 1 << VIRTIO_BALLOON_F_REPORTING != 0 => self.report(queue, ring),
            _ => Err(Malformed("a queue is used that was not agreed on")),
        }
    }

    fn refresh(&mut self) {
        self.state.target = self.wish.pages.load(Ordering::Acquire);
    }

    /// What of a buffer was done says nothing of the next one.
    fn stop(&mut self, queue: usize) {
        self.reported[queue] = 0;
        if queue == INFLATE {
            self.state.done = 0;
        }
    }

    fn save(&self) -> Own {
        Own::Balloon(self.state.clone())
    }

    /// What is wanted of it now is another matter.
    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        match own {
            Own::Balloon(state) => {
                self.state = state.clone();
                self.set_actual(state.actual);
                Ok(())
            }
            // Machines of earlier versions do not tell.
            Own::None => Ok(()),
            _ => Err(Malformed("the device is of another type")),
        }
    }

    /// The guest has all its pages back.
    fn reset(&mut self) {
        (self.state.done, self.reported) = (0, [0; QUEUES]);
        self.set_actual(0);
        self.refresh();
    }
}

/// The list of pages that a chain is.
fn list_of(chain: &Chain) -> Result<&Buffers, Malformed> {
    let is_list = chain.writable.len() == 0 && chain.readable.len().is_multiple_of(NUMBER_LEN);
    if is_list { Ok(&chain.readable) } else { Err(Malformed("a list of pages is none")) }
}

/// Pages in order as runs: the first and how many. One that is named twice counts once.
fn runs(pages: &[u32]) -> Vec<(u32, u64)> {
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first) + *count == u64::from(page) => *count += 1,
            Some((first, count)) if u64::from(*first) + *count > u64::from(page) => {}
            _ => runs.push((page, 1)),
        }
    }
    runs
}

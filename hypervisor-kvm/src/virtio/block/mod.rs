//! The virtio block device (virtio 1.2, 5.2): requests in, answers out, in any order.
//!
//! A request is a checked [`Chain`]. What it asks for is done by the disk's own [`Line`] while the device goes on,
//! straight from and to the guest's memory, and answered when it has been done.

mod config;
mod lane;
mod line;
mod request;
mod unheard;

use std::mem;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use slab::Slab;
use storage_block::{Completion, Disk, Engine, Error, ErrorKind, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::chain::{Chain, Malformed};
use super::device::{Device, Own};
use super::ring::{Running, Taken};
use crate::memory::Memory;
use config::Kind;
pub(crate) use config::State;
use lane::{Answer, Lane, Pending, Stage};
pub(crate) use line::check_descriptors;
use line::{DEPTH, Line};
use request::{Op, Request};
use unheard::{Ends, Window};

/// The most queues of a device: all are served by one thread, and more of them only spare the guest's processors
/// from waiting for each other.
pub(crate) const QUEUES_MAX: usize = 16;
/// How many requests are taken up before the driver hears of those that have ended: few enough for it to get on
/// meanwhile.
const BATCH: usize = 16;
/// The most bytes that are under way, but for a request of each queue that is larger by itself: who ends the machine, or takes
/// memory back, waits for them. Each queue has its share, so that none waits for what others begin, but for one of many some
/// more, which keeps the disk busy by itself.
const BYTES_MAX: u64 = 16 << 20;
const BYTES_OF_A_QUEUE: u64 = 4 << 20;

/// A block device.
#[derive(Debug)]
pub(crate) struct Block {
    /// None when the machine has ended, or the guest has let go.
    disk: Option<Disk>,
    /// What is under way on the disk. None while that is not in use.
    line: Option<Line>,
    /// What serves it: chosen when it is first used, and not again when the driver has reset the device.
    engine: Arc<OnceLock<Engine>>,
    /// It was said that the disk cannot be served.
    unserved: bool,
    /// The requests that are, by their tokens.
    pending: Slab<Pending>,
    /// What each virtqueue is to be told.
    lanes: Vec<Lane>,
    ends: Ends,
    state: State,
    kind: Kind,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// Why a request is not begun.
enum Refusal {
    Malformed(Malformed),
    /// It cannot be done.
    Io,
    /// It is not among those that the driver was offered.
    Unsupported,
    /// Too much is under way.
    NotYet,
}

impl From<Malformed> for Refusal {
    fn from(why: Malformed) -> Self {
        Self::Malformed(why)
    }
}

impl Block {
    /// A block device of these bytes with so many queues, one at least and [`QUEUES_MAX`] at most; of the serial number,
    /// the guest sees the first 20 bytes.
    pub(crate) fn new(disk: Disk, serial: &str, queues: usize) -> Self {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            state: State::of(&disk),
            kind: Kind::of(&disk),
            disk: Some(disk),
            line: None,
            engine: Arc::default(),
            unserved: false,
            pending: Slab::new(),
            lanes: (0..queues.clamp(1, QUEUES_MAX)).map(|_| Lane::default()).collect(),
            ends: Ends::default(),
            serial: id,
        }
    }

    /// What serves it, when that has been chosen.
    pub(crate) fn engine(&self) -> Arc<OnceLock<Engine>> {
        self.engine.clone()
    }

    /// Begins a request, or answers it at once: that only when nothing of its queue is under way, since what has not begun
    /// may have to go back to the queue, whose last requests these have to be. False if it is not its turn yet.
    /// `features` are those that the driver accepted.
    fn begin(
        &mut self,
        lane: usize,
        memory: &Memory,
        chain: &Chain,
        features: u64,
    ) -> Result<bool, Malformed> {
        let request = Request::read(memory, chain)?;
        let status = match self.try_begin(lane, memory, &request, features) {
            Ok(Some(written)) => (VIRTIO_BLK_S_OK, written),
            Ok(None) => return Ok(true),
            Err(Refusal::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::NotYet) => return Ok(false),
            Err(Refusal::Malformed(why)) => return Err(why),
        };
        let lane = &mut self.lanes[lane];
        if lane.under_way > 0 {
            return Ok(false);
        }
        lane.answers.push(Answer::to(&request, status));
        Ok(true)
    }

    /// Begins a request. Says how many bytes have been written to the guest where that was all.
    fn try_begin(
        &mut self,
        lane: usize,
        memory: &Memory,
        request: &Request<'_>,
        features: u64,
    ) -> Result<Option<u32>, Refusal> {
        let Some(op) = request.op(memory, features)? else {
            let len = (request.in_len as usize).min(self.serial.len());
            request.chain.writable.write(memory, 0, &self.serial[..len])?;
            return Ok(Some(len as u32));
        };
        let bytes = op.bytes();
        let share = (BYTES_MAX / self.lanes.len() as u64).max(BYTES_OF_A_QUEUE);
        let under_way = self.lanes[lane].bytes;
        if under_way > 0 && under_way + bytes > share {
            return Err(Refusal::NotYet);
        }
        let disk = self.disk.as_ref().ok_or(Refusal::Io)?;
        let line = match &mut self.line {
            Some(line) => line,
            none => {
                none.insert(Line::new(disk, memory, &self.engine, &self.serial).map_err(|error| {
                    // A guest asks as often as it likes.
                    match mem::replace(&mut self.unserved, true) {
                        false => tracing::warn!(%error, "a guest's disk cannot be served"),
                        true => tracing::debug!(%error, "a guest's disk cannot be served"),
                    }
                    Refusal::Io
                })?)
            }
        };
        let start = |sector: u64, len| {
            let start = sector.checked_mul(SECTOR).ok_or(Refusal::Io)?;
            let end = start.checked_add(len).filter(|end| *end <= disk.size());
            end.map(|_| start).ok_or(Refusal::Io)
        };
        match op {
            // Of these the disk would have nothing to do, and would say so before it has begun what was taken earlier.
            Op::Read { sector, len: 0 }
            | Op::Write { sector, len: 0 }
            | Op::Discard { sector, len: 0 }
            | Op::WriteZeroes { sector, len: 0 } => return start(sector, 0).map(|_| Some(0)),
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } if disk.read_only() => {
                return Err(Refusal::Io);
            }
            _ => {}
        }
        let entry = self.pending.vacant_entry();
        let (token, chain) = (entry.key() as u64, request.chain);
        let (mut written, mut stage) = (0, Stage::Whole);
        match op {
            Op::Read { sector, len } => {
                line.read(token, start(sector, len)?, &chain.writable, len)?;
                written = len as u32;
            }
            Op::Write { sector, len } => {
                line.write(token, start(sector, len)?, &chain.readable, request::HEADER_LEN, len)?;
                stage = Stage::BeforeFlush;
            }
            Op::Discard { sector, len } => line.queue().discard(token, start(sector, len)?, len),
            Op::WriteZeroes { sector, len } => {
                line.queue().write_zeroes(token, start(sector, len)?, len);
                stage = Stage::BeforeFlush;
            }
            Op::Flush => line.queue().flush(token),
        }
        if features & 1 << VIRTIO_BLK_F_FLUSH != 0 {
            stage = Stage::Whole;
        }
        let answer = Answer::to(request, (VIRTIO_BLK_S_OK, written));
        entry.insert(Pending { lane, stage, bytes, answer });
        self.lanes[lane].bytes += bytes;
        self.lanes[lane].under_way += 1;
        Ok(None)
    }

    /// Takes what has ended on the disk. False if nothing has.
    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.line.as_mut().and_then(|line| line.queue().completed()) {
            if let (Some(token), Some(line)) = (self.ended(done), &mut self.line) {
                line.queue().flush(token);
            }
            self.ends.add();
            any = true;
        }
        any
    }

    /// Takes note of what has ended. Says its token where it has to be flushed first.
    fn ended(&mut self, Completion { token, result, .. }: Completion) -> Option<u64> {
        let pending = self.pending.get_mut(token as usize)?;
        let cancelled = matches!(&result, Err(error) if error.kind() == ErrorKind::Cancelled);
        let is_durable = match pending.stage {
            Stage::BeforeFlush => result.is_err(),
            Stage::Flush => !cancelled,
            Stage::Whole => true,
        };
        if !is_durable && self.disk.is_some() {
            pending.stage = Stage::Flush;
            return Some(token);
        }
        let Pending { lane, stage, bytes, mut answer } = self.pending.remove(token as usize);
        let lane = &mut self.lanes[lane];
        lane.bytes -= bytes;
        lane.under_way -= 1;
        if cancelled && stage != Stage::Flush && self.disk.is_some() {
            lane.left += 1;
            return None;
        }
        if let Err(error) = &result {
            tracing::debug!(%error, "a disk request failed");
        }
        if result.is_err() || !is_durable {
            (answer.status, answer.written) = (VIRTIO_BLK_S_IOERR, 0);
        }
        lane.answers.push(answer);
        None
    }

    /// Waits for what has begun. What has not goes back to its queue, whose last requests these are, since they
    /// begin in the order in which they were taken. What has to be flushed is so by one flush, so that the disk's limits
    /// hold up no more than that.
    fn finish(&mut self) {
        if let Some(line) = &mut self.line {
            line.queue().cancel();
        }
        let mut unflushed = Vec::new();
        while let Some(done) = self.wait() {
            unflushed.extend(self.ended(done));
        }
        let (Some(token), Some(line)) = (unflushed.first(), &mut self.line) else { return };
        line.queue().flush(*token);
        let flushed = self.wait().is_some_and(|done| done.result.is_ok());
        for token in unflushed {
            let result =
                if flushed { Ok(()) } else { Err(Error::new(ErrorKind::Io, "the disk's flush failed")) };
            self.ended(Completion { token, result, buffer: None });
        }
    }

    /// Gives up what is not at work on the disk.
    fn abandon(&mut self) {
        if let Some(line) = &mut self.line {
            line.queue().abandon();
        }
    }

    /// Waits until something has ended. None if nothing is under way.
    fn wait(&mut self) -> Option<Completion> {
        self.line.as_mut()?.queue().wait()
    }

    /// Has the driver notify of its next request, unless that is [seen soon](unheard) anyway. True if it is there already.
    fn listen(&mut self, lane: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Lane { asked, unheard, .. } = &mut self.lanes[lane];
        if *asked {
            return Ok(false);
        }
        // A driver without event indices notifies whether or not it is asked.
        if features & 1 << VIRTIO_RING_F_EVENT_IDX != 0 && self.ends.one_is_near(self.pending.len()) {
            unheard.get_or_insert_with(|| self.ends.window());
            return Ok(false);
        }
        (*asked, *unheard) = (true, None);
        ring.ask()
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        config::features(self.lanes.len(), &self.kind)
    }

    fn served(&self) -> u64 {
        config::features(self.lanes.len(), &self.kind.with_discards())
    }

    fn queues(&self) -> usize {
        self.lanes.len()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.state.config(self.lanes.len(), &self.kind);
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn refresh(&mut self) {
        if let Some(disk) = &self.disk {
            self.state = State::of(disk);
        }
    }

    fn serve(&mut self, lane: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let ended = self.collect();
        let unheard = self.lanes[lane].unheard.take();
        self.lanes[lane].unheard = unheard.and_then(|window| self.ends.look(window));
        let mut worked = ended | self.lanes[lane].answer(ring)?;
        if let (true, Some(line)) = (self.pending.is_empty(), &mut self.line) {
            // What ends at once, as reads of what the host has in memory do, is seen here.
            line.queue().unwatch();
        }
        if lane > 0 && features & 1 << VIRTIO_BLK_F_MQ == 0 {
            return Err(Malformed("a queue is in use that was not negotiated"));
        }
        let (memory, room) = (ring.memory(), DEPTH as usize - self.pending.len());
        let mut waits = false;
        let begun = ring.take(room.min(BATCH), |chain| {
            let begun = self.begin(lane, memory, &chain, features)?;
            waits = !begun;
            Ok(if begun { Taken::Go } else { Taken::Not })
        })?;
        if begun > 0 {
            self.lanes[lane].asked = false;
            if let Some(line) = &mut self.line {
                line.queue().submit();
            }
            self.collect();
            self.lanes[lane].answer(ring)?;
            worked = true;
        }
        // Where too much is under way, or something has to end first, the next look is when something has ended.
        Ok(worked || room > 0 && !waits && self.listen(lane, ring, features)?)
    }

    fn settle(&mut self, lane: usize, ring: &mut Running<'_>) -> Result<(), Malformed> {
        self.finish();
        self.lanes[lane].answer(ring).map(|_| ())
    }

    fn stop(&mut self, lane: usize) {
        self.finish();
        self.lanes[lane] = Lane::default();
    }

    fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.line.as_mut().filter(|_| !self.pending.is_empty()).map(Line::watch)
    }

    fn due_in(&self) -> Option<Duration> {
        self.lanes.iter().filter_map(|lane| lane.unheard.as_ref()).map(Window::left).min()
    }

    fn reset(&mut self) {
        self.abandon();
        self.line = None;
        self.pending.clear();
        self.lanes.fill_with(Lane::default);
        self.ends = Ends::default();
        self.refresh();
    }

    fn end(&mut self) {
        self.disk = None;
        // It fails, as does what is taken up after it.
        self.abandon();
        self.finish();
        self.line = None;
    }

    fn save(&self) -> Own {
        Own::Block(self.state.clone())
    }

    fn restore(&mut self, own: &Own) -> Result<(), Malformed> {
        match own {
            Own::Block(state) => self.state = state.clone(),
            // Machines of earlier versions do not tell.
            Own::None => {}
            _ => return Err(Malformed("the device is of another type")),
        }
        Ok(())
    }
}

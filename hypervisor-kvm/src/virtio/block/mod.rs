//! The virtio block device (virtio 1.2, 5.2): requests in, answers out, in any order.
//!
//! A request is a checked [`Chain`]. What it asks for is done by the disk's own [`Line`] while the device goes on,
//! straight from and to the guest's memory, and answered when it has been done.

mod line;
mod request;

use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use slab::Slab;
use storage_block::{Completion, Disk, Engine, Error, ErrorKind, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::{Chain, Malformed};
use super::device::Device;
use super::ring::{Running, Taken};
use crate::memory::Memory;
pub(crate) use line::check_descriptors;
use line::{DEPTH, Line};
use request::{Op, RANGE_SECTORS_MAX, RANGES_MAX, Request, SEGMENT_BYTES_MAX, SEGMENTS_MAX};

/// The most queues of a device: all are served by one thread, and more of them only spare the guest's processors
/// from waiting for each other.
pub(crate) const QUEUES_MAX: usize = 16;
/// How many requests are taken up before the driver hears of those that have ended: few enough for it to get on
/// meanwhile.
const BATCH: usize = 16;
/// The bytes of the configuration space.
const CONFIG_LEN: usize = 60;

/// A block device.
#[derive(Debug)]
pub(crate) struct Block {
    /// None when the machine has ended, or the guest has let go.
    disk: Option<Disk>,
    /// What is under way on the disk. None while that is not in use.
    line: Option<Line>,
    /// What serves it: chosen when it is first used, and not again when the driver has reset the device.
    engine: Option<Engine>,
    /// It was said that the disk cannot be served.
    unserved: bool,
    /// The requests that are, by their tokens.
    pending: Slab<Pending>,
    /// What each virtqueue is to be told.
    lanes: Vec<Lane>,
    /// The capacity that the driver is told.
    sectors: u64,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// A virtqueue's share of the device.
#[derive(Debug, Default)]
struct Lane {
    answers: Vec<Answer>,
    /// How many of its requests are under way.
    under_way: usize,
    /// How many of the requests that were last taken from it have never begun, and are the next ones again.
    left: u16,
}

/// A request that has ended.
#[derive(Debug)]
struct Answer {
    head: u16,
    status_at: GuestAddress,
    status: u32,
    /// The bytes of data that were written to the guest.
    written: u32,
}

/// A request that is under way.
#[derive(Debug)]
struct Pending {
    lane: usize,
    stage: Stage,
    /// If all goes well.
    answer: Answer,
}

/// What of a request is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// All of it.
    Whole,
    /// What has to be durable before it is answered, since its driver cannot flush (virtio 1.2, 5.2.6.2).
    BeforeFlush,
    /// The flush after that.
    Flush,
}

/// Why a request is not begun.
enum Refusal {
    Malformed(Malformed),
    /// It cannot be done.
    Io,
    /// It is not among those that the driver was offered.
    Unsupported,
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
            sectors: disk.size() / SECTOR,
            disk: Some(disk),
            line: None,
            engine: None,
            unserved: false,
            pending: Slab::new(),
            lanes: (0..queues.clamp(1, QUEUES_MAX)).map(|_| Lane::default()).collect(),
            serial: id,
        }
    }

    /// The configuration space, `struct virtio_blk_config`.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &(self.lanes.len() as u16).to_le_bytes());
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // discard: sectors, ranges, alignment
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // write zeroes: sectors, ranges, may unmap
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        config
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
        let disk = self.disk.as_ref().ok_or(Refusal::Io)?;
        let line = match &mut self.line {
            Some(line) => line,
            none => {
                none.insert(Line::new(disk, memory, &mut self.engine, &self.serial).map_err(|error| {
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
            // Of these the disk would have nothing to do.
            Op::Read { sector, len: 0 } | Op::Write { sector, len: 0 } => {
                return start(sector, 0).map(|_| Some(0));
            }
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
        entry.insert(Pending { lane, stage, answer });
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
        let Pending { lane, stage, mut answer } = self.pending.remove(token as usize);
        let lane = &mut self.lanes[lane];
        lane.under_way -= 1;
        if cancelled && stage != Stage::Flush {
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

    /// Waits until something has ended. None if nothing is under way.
    fn wait(&mut self) -> Option<Completion> {
        self.line.as_mut()?.queue().wait()
    }

    /// Tells the driver of what has ended. False if nothing has.
    fn answer(&mut self, lane: usize, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Lane { answers, left, .. } = &mut self.lanes[lane];
        ring.put_back(mem::take(left));
        if answers.is_empty() {
            return Ok(false);
        }
        for answer in &*answers {
            let at = ring.memory().get_slice(answer.status_at, 1);
            let written = at.and_then(|at| Ok(at.write_obj(answer.status as u8, 0)?));
            written.map_err(|_| Malformed("a status lies outside the memory"))?;
        }
        ring.put_all_used(answers.drain(..).map(|answer| (answer.head, answer.written + 1)))?;
        Ok(true)
    }
}

impl Answer {
    fn to(request: &Request<'_>, (status, written): (u32, u32)) -> Self {
        Self { head: request.chain.head, status_at: request.status_at, status, written }
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut bits =
            vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH];
        if self.lanes.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.disk.as_ref().is_some_and(Disk::read_only) {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> usize {
        self.lanes.len()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn refresh(&mut self) {
        if let Some(disk) = &self.disk {
            self.sectors = disk.size() / SECTOR;
        }
    }

    fn serve(&mut self, lane: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let mut worked = self.collect() | self.answer(lane, ring)?;
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
            if let Some(line) = &mut self.line {
                line.queue().submit();
            }
            self.collect();
            self.answer(lane, ring)?;
            worked = true;
        }
        // Where too much is under way, or something has to end first, the next look is when something has ended.
        Ok(worked || room > 0 && !waits && ring.ask()?)
    }

    fn settle(&mut self, lane: usize, ring: &mut Running<'_>) -> Result<(), Malformed> {
        self.finish();
        self.answer(lane, ring).map(|_| ())
    }

    fn stop(&mut self, lane: usize) {
        self.finish();
        self.lanes[lane] = Lane::default();
    }

    fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.line.as_mut().filter(|_| !self.pending.is_empty()).map(Line::watch)
    }

    fn reset(&mut self) {
        self.line = None;
        self.pending.clear();
        self.lanes.fill_with(Lane::default);
        self.refresh();
    }

    fn end(&mut self) {
        self.disk = None;
        // What has not begun fails when it is taken up again.
        self.finish();
        self.line = None;
    }
}

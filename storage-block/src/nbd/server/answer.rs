//! A request and the disk it is for: what comes back.

use std::ops::Range;

use super::negotiation::{Agreed, CONTEXT_ID};
use super::replies::Replies;
use crate::disk::Op;
use crate::limit::{Cost, Stop};
use crate::nbd::proto::{self, Command, PAYLOAD_MAX, Request, ask, chunk};
use crate::{Disk, Error, ErrorKind, Result};

/// A hole is sent as one where that spares so many bytes; below, looking for it costs more.
const HOLE_MIN: u64 = 32 << 10;
/// The extents that a reply tells of at most.
const EXTENTS: usize = 32 << 10;
/// What is zeroed or discarded in one go: a backend that has to write that much is done soon, for who waits for its end.
const PART: u64 = 16 << 20;

static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// Puts the reply to a request, whose bytes to be written are `data`, behind those that wait.
pub(super) fn answer(
    agreed: &Agreed,
    request: &Request,
    data: &[u8],
    stopping: &Stop,
    replies: &mut Replies,
) {
    let before = replies.len();
    let done = check(agreed, request).and_then(|()| match request.command {
        Command::Read if agreed.structured => read_chunks(&agreed.disk, request, replies).map_err(errno),
        Command::Read => read(&agreed.disk, request, replies).map_err(errno),
        Command::BlockStatus => status(&agreed.disk, request, replies).map_err(errno),
        _ => {
            change(&agreed.disk, request, data, stopping)?;
            replies.put(&proto::simple(0, request.handle));
            Ok(())
        }
    });
    let Err(errno) = done else { return };
    replies.truncate(before);
    if agreed.structured && matches!(request.command, Command::Read | Command::BlockStatus) {
        // With an empty text: what there is to say is the host's business.
        replies.put(&proto::chunk(chunk::DONE, chunk::ERROR, request.handle, 6));
        replies.put(&errno.to_be_bytes());
        replies.put(&[0, 0]);
    } else {
        replies.put(&proto::simple(errno, request.handle));
    }
}

/// Before anything is reserved for it.
fn check(agreed: &Agreed, request: &Request) -> Result<(), u32> {
    let command = request.command;
    let whole = request.offset.checked_add(request.len.into()).is_some_and(|end| end <= agreed.disk.size());
    let known = match command {
        Command::Read if !agreed.structured => ask::FUA,
        _ => command.flags(),
    };
    match command {
        Command::Other(_) | Command::Disconnect => Err(proto::ENOTSUP),
        _ if request.flags & !known != 0 => Err(proto::EINVAL),
        Command::Flush => Ok(()),
        Command::BlockStatus if !agreed.status || request.len == 0 => Err(proto::EINVAL),
        Command::Read if request.len > PAYLOAD_MAX => Err(proto::EINVAL),
        Command::Read | Command::BlockStatus if !whole => Err(proto::EINVAL),
        _ if !whole => Err(proto::ENOSPC),
        _ => Ok(()),
    }
}

fn change(disk: &Disk, request: &Request, data: &[u8], stopping: &Stop) -> Result<(), u32> {
    match request.command {
        Command::Write => disk.write_at(data, request.offset).map_err(errno)?,
        Command::WriteZeroes if request.flags & ask::FAST != 0 && !is_fast(disk, request) => {
            return Err(proto::ENOTSUP);
        }
        Command::WriteZeroes if request.flags & ask::NO_HOLE != 0 => {
            // As many as there are to be written from.
            clear(disk, request, Op::Write, ZEROES.len() as u64, stopping)?;
        }
        Command::WriteZeroes => clear(disk, request, Op::WriteZeroes, PART, stopping)?,
        Command::Trim => clear(disk, request, Op::Discard, PART, stopping)?,
        Command::Flush => disk.flush().map_err(errno)?,
        _ => {}
    }
    force(disk, request.flags, request.command.writes())
}

/// Whether zeroes are there sooner than so many bytes would be written. Where the space has to be there
/// afterwards, only writing sees to that.
fn is_fast(disk: &Disk, request: &Request) -> bool {
    request.flags & ask::NO_HOLE == 0 && disk.capabilities().cheap_zeroes
}

/// Zeroes, by `op`, in parts for as long as the server is there. It is one operation however many parts that takes.
fn clear(disk: &Disk, request: &Request, op: Op, most: u64, stopping: &Stop) -> Result<(), u32> {
    let (mut at, len) = (request.offset, u64::from(request.len));
    let end = at + disk.check(op, at, Some(len)).map_err(errno)?;
    disk.pay(Cost { ops: 1, bytes: 0 }).map_err(errno)?;
    let free = disk.unlimited();
    while at < end {
        if stopping.is_set() {
            return Err(proto::ESHUTDOWN);
        }
        // They end at multiples, so that no block is cut in two.
        let part = (end - at).min(most - at % most);
        disk.pay(Cost { ops: 0, ..disk.cost(op, part) }).map_err(errno)?;
        let done = match op {
            Op::Write => free.write_at(&ZEROES[..part as usize], at),
            Op::Discard => free.discard(at, part),
            _ => free.write_zeroes(at, part),
        };
        done.map_err(errno)?;
        at += part;
    }
    Ok(())
}

fn force(disk: &Disk, flags: u16, writes: bool) -> Result<(), u32> {
    if writes && flags & ask::FUA != 0 { disk.flush().map_err(errno) } else { Ok(()) }
}

fn read(disk: &Disk, request: &Request, replies: &mut Replies) -> Result<()> {
    replies.put(&proto::simple(0, request.handle));
    disk.read_at(replies.room(request.len as usize), request.offset)
}

/// Data and holes, each in a chunk of its own.
fn read_chunks(disk: &Disk, request: &Request, replies: &mut Replies) -> Result<()> {
    let (offset, len) = (request.offset, u64::from(request.len));
    if len == 0 {
        replies.put(&proto::chunk(chunk::DONE, chunk::NONE, request.handle, 0));
        return Ok(());
    }
    let whole = len < HOLE_MIN || request.flags & ask::DONT_FRAGMENT != 0;
    // It is one operation however many parts it is answered in, and the bytes are those that are read.
    disk.pay(Cost { ops: 1, bytes: 0 })?;
    let free = disk.unlimited();
    let extents = if whole {
        vec![Extent { end: offset + len, hole: false }]
    } else {
        extents(&free, offset..offset + len, HOLE_MIN, usize::MAX)?
    };
    let mut at = offset;
    for extent in extents {
        let flags = if extent.end == offset + len { chunk::DONE } else { 0 };
        let len = (extent.end - at) as u32;
        if extent.hole {
            replies.put(&proto::chunk(flags, chunk::HOLE, request.handle, 12));
            replies.put(&at.to_be_bytes());
            replies.put(&len.to_be_bytes());
        } else {
            replies.put(&proto::chunk(flags, chunk::DATA, request.handle, len + 8));
            replies.put(&at.to_be_bytes());
            disk.pay(Cost { ops: 0, bytes: len.into() })?;
            free.read_at(replies.room(len as usize), at)?;
        }
        at = extent.end;
    }
    Ok(())
}

/// Which parts of the range are holes. To look for them is an operation, of no bytes.
fn status(disk: &Disk, request: &Request, replies: &mut Replies) -> Result<()> {
    disk.pay(Cost { ops: 1, bytes: 0 })?;
    let range = request.offset..request.offset + u64::from(request.len);
    let limit = if request.flags & ask::ONE != 0 { 1 } else { EXTENTS };
    let extents = extents(disk, range.clone(), 1, limit)?;
    replies.put(&proto::chunk(
        chunk::DONE,
        chunk::BLOCK_STATUS,
        request.handle,
        4 + 8 * extents.len() as u32,
    ));
    replies.put(&CONTEXT_ID.to_be_bytes());
    let mut at = range.start;
    for extent in extents {
        let state = if extent.hole { proto::STATE_HOLE | proto::STATE_ZERO } else { 0 };
        replies.put(&((extent.end - at) as u32).to_be_bytes());
        replies.put(&state.to_be_bytes());
        at = extent.end;
    }
    Ok(())
}

/// A part of a range, from the end of the part before.
struct Extent {
    end: u64,
    hole: bool,
}

/// Cuts a range, which is not empty, into holes of at least `hole_min` bytes and what may be data, in turn; the first
/// `limit` parts of it.
fn extents(disk: &Disk, range: Range<u64>, hole_min: u64, limit: usize) -> Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut push = |end, hole| match found.last_mut() {
        Some(last) if last.hole == hole => {
            last.end = end;
            true
        }
        _ => {
            let room = found.len() < limit;
            if room {
                found.push(Extent { end, hole });
            }
            room
        }
    };
    let mut at = range.start;
    while at < range.end {
        let data = disk.next_data(at)?.filter(|data| data.start < range.end);
        let data = data.map_or(range.end..range.end, |data| data.start..data.end.min(range.end));
        let room = (data.start == at || push(data.start, data.start - at >= hole_min))
            && (data.is_empty() || push(data.end, false));
        if !room {
            break;
        }
        at = data.end;
    }
    Ok(found)
}

/// The protocol's number for an error.
fn errno(error: Error) -> u32 {
    match error.kind() {
        ErrorKind::NoSpace => proto::ENOSPC,
        ErrorKind::ReadOnly => proto::EPERM,
        ErrorKind::OutOfBounds => proto::EINVAL,
        ErrorKind::Cancelled => proto::ESHUTDOWN,
        _ => {
            tracing::warn!(%error, "a request over NBD has failed");
            proto::EIO
        }
    }
}

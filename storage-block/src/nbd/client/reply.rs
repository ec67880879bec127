//! Replies of a server that may lie: what is taken of them, and no more than was asked for.

use std::collections::BTreeMap;
use std::io;

use crate::nbd::proto::{CHUNK_LEN, CHUNK_MAGIC, Command, Fields, SIMPLE_LEN, SIMPLE_MAGIC, chunk};
use crate::{Error, ErrorKind, Result};

/// The longest text that goes with an error, as the protocol has it, and what stands before it.
const ERROR_MAX: u32 = 4096 + 14;
/// Errors that one reply may hold.
const ERRORS: u32 = 16;

/// Where the bytes of replies come from.
pub(in crate::nbd) trait Source {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()>;
}

/// How a reply, or a part of one, begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nbd) struct Head {
    pub(in crate::nbd) handle: u64,
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Simple { errno: u32 },
    Chunk { flags: u16, kind: u16, len: u32 },
}

impl Head {
    pub(in crate::nbd) fn receive(source: &mut impl Source) -> Result<Self> {
        let mut bytes = [0; CHUNK_LEN];
        source.fill(&mut bytes[..SIMPLE_LEN]).map_err(lost)?;
        let mut fields = Fields(&bytes[4..SIMPLE_LEN]);
        let (first, handle) = (fields.u32().unwrap_or(0), fields.u64().unwrap_or(0));
        let part = match u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) {
            SIMPLE_MAGIC => Part::Simple { errno: first },
            CHUNK_MAGIC => {
                let mut len = [0; 4];
                source.fill(&mut len).map_err(lost)?;
                let (flags, kind) = ((first >> 16) as u16, first as u16);
                Part::Chunk { flags, kind, len: u32::from_be_bytes(len) }
            }
            _ => return Err(lie("what the NBD server sends is no reply")),
        };
        Ok(Self { handle, part })
    }
}

/// What a request will bring, and where it is put.
#[derive(Debug)]
pub(in crate::nbd) struct Expected<'b> {
    pub(in crate::nbd) command: Command,
    pub(in crate::nbd) structured: bool,
    /// Where the bytes that are read begin.
    pub(in crate::nbd) offset: u64,
    /// Is filled with what is read.
    pub(in crate::nbd) data: &'b mut [u8],
    /// The parts of `data` that have come, from their beginnings to their ends.
    covered: BTreeMap<usize, usize>,
    /// The number of the metadata that is asked for, and what has come of it: an extent's length and state.
    pub(in crate::nbd) context: Option<u32>,
    pub(in crate::nbd) extent: Option<(u32, u32)>,
    errno: Option<u32>,
    errors: u32,
}

impl<'b> Expected<'b> {
    pub(in crate::nbd) fn new(command: Command, structured: bool, offset: u64, data: &'b mut [u8]) -> Self {
        Self {
            command,
            structured,
            offset,
            data,
            covered: BTreeMap::new(),
            context: None,
            extent: None,
            errno: None,
            errors: 0,
        }
    }

    /// Takes what follows a head. `None` if there is more to come; then how it ended, with the server's error
    /// number.
    ///
    /// # Errors
    ///
    /// When the server lies, or the connection fails; it is then of no use any more.
    pub(in crate::nbd) fn take(
        &mut self,
        head: Head,
        source: &mut impl Source,
    ) -> Result<Option<Result<(), u32>>> {
        match head.part {
            Part::Simple { errno } => {
                let structured =
                    self.structured && matches!(self.command, Command::Read | Command::BlockStatus);
                if structured {
                    return Err(lie("the NBD server answers with a simple reply where there can be none"));
                }
                if errno == 0 {
                    source.fill(self.data).map_err(lost)?;
                }
                Ok(Some(if errno == 0 { Ok(()) } else { Err(errno) }))
            }
            Part::Chunk { .. } if !self.structured => {
                Err(lie("the NBD server sends structured replies without being asked to"))
            }
            Part::Chunk { flags, kind, len } => {
                self.chunk(flags, kind, len, source)?;
                if flags & chunk::DONE == 0 { Ok(None) } else { self.done().map(Some) }
            }
        }
    }

    fn chunk(&mut self, flags: u16, kind: u16, len: u32, source: &mut impl Source) -> Result<()> {
        match (kind, self.command) {
            (chunk::NONE, _) if len == 0 && flags & chunk::DONE != 0 => Ok(()),
            (chunk::DATA, Command::Read) if len > 8 && (len - 8) as usize <= self.data.len() => {
                let at = fill::<8>(source)?;
                let part = self.cover(u64::from_be_bytes(at), u64::from(len - 8))?;
                source.fill(part).map_err(lost)
            }
            (chunk::HOLE, Command::Read) if len == 12 => {
                let at = u64::from_be_bytes(fill(source)?);
                let len = u32::from_be_bytes(fill(source)?);
                self.cover(at, len.into())?.fill(0);
                Ok(())
            }
            (chunk::BLOCK_STATUS, Command::BlockStatus) if len == 12 && self.extent.is_none() => {
                let context = u32::from_be_bytes(fill(source)?);
                let (len, state) = (u32::from_be_bytes(fill(source)?), u32::from_be_bytes(fill(source)?));
                if Some(context) != self.context || len == 0 {
                    return Err(lie("the NBD server tells of other blocks than it was asked for"));
                }
                self.extent = Some((len, state));
                Ok(())
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 && (4..=ERROR_MAX).contains(&len) => {
                self.error(len, source)
            }
            _ => Err(lie(format!("the NBD server sends a chunk of kind {kind:#x} and {len} bytes"))),
        }
    }

    /// An error, whose text nobody reads.
    fn error(&mut self, len: u32, source: &mut impl Source) -> Result<()> {
        self.errors += 1;
        let errno = u32::from_be_bytes(fill(source)?);
        if errno == 0 || self.errors > ERRORS {
            return Err(lie("the NBD server sends errors that are none"));
        }
        source.fill(&mut vec![0; len as usize - 4]).map_err(lost)?;
        self.errno.get_or_insert(errno);
        Ok(())
    }

    /// The part of `data` that a chunk is about, which no other has been.
    fn cover(&mut self, at: u64, len: u64) -> Result<&mut [u8]> {
        let start = at.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(usize::try_from(len).ok()?)?));
        let range = range.filter(|range| !range.is_empty() && range.end <= self.data.len());
        let Some(mut part) = range.clone() else {
            return Err(lie("the NBD server sends bytes from beyond what it was asked for"));
        };
        // Parts that touch are one, so that most replies never have a second.
        let before = self.covered.range(..=part.start).next_back().map(|(start, end)| (*start, *end));
        let after = self.covered.range(part.start..).next().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, end)| end > part.start) || after.is_some_and(|(start, _)| start < part.end)
        {
            return Err(lie("the NBD server sends the same bytes twice"));
        }
        if let Some((start, _)) = before.filter(|(_, end)| *end == part.start) {
            part.start = start;
        }
        if let Some((start, end)) = after.filter(|(start, _)| *start == part.end) {
            self.covered.remove(&start);
            part.end = end;
        }
        self.covered.insert(part.start, part.end);
        Ok(range.and_then(|range| self.data.get_mut(range)).unwrap_or_default())
    }

    fn done(&self) -> Result<Result<(), u32>> {
        if let Some(errno) = self.errno {
            return Ok(Err(errno));
        }
        let whole = match self.command {
            Command::Read => self.covered.get(&0) == Some(&self.data.len()),
            Command::BlockStatus => self.extent.is_some(),
            _ => true,
        };
        if whole { Ok(Ok(())) } else { Err(lie("the NBD server does not send all that it was asked for")) }
    }
}

fn fill<const N: usize>(source: &mut impl Source) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    source.fill(&mut bytes).map_err(lost)?;
    Ok(bytes)
}

fn lie(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, what)
}

fn lost(error: io::Error) -> Error {
    super::handshake::lost(error)
}

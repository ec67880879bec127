//! The client: an export of a server as a disk.

mod handshake;
mod line;
pub(super) mod reply;

use std::io;
use std::ops::Range;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use self::handshake::Agreed;
use self::line::Line;
use self::reply::Expected;
use super::Address;
use super::channel::Channel;
use super::proto::{self, Command, ask, flag};
use crate::store::{read, write};
use crate::{BlockBackend, Capabilities, Disk, Error, ErrorKind, Result};

/// The handshake has to be over by then.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A request has to be answered by then.
const REQUEST: Duration = Duration::from_secs(60);
/// What is zeroed with one request at most.
const ZERO_MAX: u64 = 1 << 30;
/// How often in a row the server is asked whether more zeroes follow.
const ASK_MAX: usize = 1 << 10;

static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// An export of an NBD server, ours or any other, as a disk.
///
/// Requests of several threads are on their way at the same time over one connection, 64 at most. The connection
/// ends when the disk is dropped, or when the server breaks the protocol, hangs up or does not answer: then all requests,
/// also those to come, are errors. It is not made again: whoever does so has to know what the
/// server has lost meanwhile.
///
/// Where the server cannot flush, each write is durable when it returns, if the server knows how (FUA).
///
/// ```
/// use storage_block::{MemoryDisk, nbd};
///
/// # let dir = tempfile::tempdir()?;
/// # let socket = dir.path().join("disk.sock");
/// # let served = MemoryDisk::new(1 << 20)?.into_disk();
/// # let _server = nbd::Server::bind(&socket, served)?;
/// let disk = nbd::Client::connect(socket, "")?.into_disk();
/// disk.write_at(b"hello", 4096)?;
/// disk.flush()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client {
    line: Line,
    agreed: Agreed,
    read_only: bool,
    /// The flags of what changes bytes.
    writing: u16,
    address: Address,
    /// Held for writing where a block is read, changed in part and written back, as the server wants whole ones.
    gate: RwLock<()>,
}

/// A connection in the making; see [`Client::builder`], which shows it in use.
#[derive(Debug)]
pub struct ClientBuilder {
    export: String,
    read_only: bool,
    handshake: Duration,
    request: Duration,
    #[cfg(feature = "tls")]
    tls: Option<super::TlsClient>,
}

impl ClientBuilder {
    /// Whether requests that change bytes are refused here, whatever the server would say to them.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// How long it may take to connect, ten seconds if not said, and how long until a request is answered, a
    /// minute if not said. A request that takes longer fails, after twice that time at most, and the connection
    /// with it.
    pub fn timeouts(mut self, connect: Duration, request: Duration) -> Self {
        (self.handshake, self.request) = (connect, request);
        self
    }

    /// Talks to the server encrypted, or not at all.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: super::TlsClient) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Connects to a server.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound) if there is no such socket or export;
    /// [`Untrusted`](ErrorKind::Untrusted) if the server's certificate or ours is not good enough, or one side wants TLS
    /// and the other has none; [`Protocol`](ErrorKind::Protocol) if what answers is no NBD server;
    /// [`InvalidSize`](ErrorKind::InvalidSize) if the export's size is not a multiple of 512 bytes;
    /// [`Unsupported`](ErrorKind::Unsupported) if it can be written, and the server can make nothing durable that is:
    /// it can be [only read](Self::read_only);
    /// [`Io`](ErrorKind::Io).
    pub fn connect(self, address: impl Into<Address>) -> Result<Client> {
        let address = address.into();
        let deadline = Instant::now() + self.handshake;
        let socket = address.connect(self.handshake);
        let socket = socket.map_err(|e| Error::io(e, format!("cannot connect to {address}")))?;
        self.agree(Arc::new(socket), address, deadline)
    }

    /// Over a socket that is connected.
    pub(super) fn agree(
        self,
        socket: Arc<std::os::fd::OwnedFd>,
        address: Address,
        deadline: Instant,
    ) -> Result<Client> {
        let mut channel = Channel::new(socket);
        channel.limit(deadline);
        let agreed = handshake::handshake(&mut channel, &self)?;
        let read_only = self.read_only || agreed.has(flag::READ_ONLY);
        let flushes = agreed.has(flag::FLUSH);
        if !read_only && !flushes && !agreed.has(flag::FUA) {
            let what = format!("the NBD server at {address} cannot make durable what is written");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let failed = |e| Error::io(e, format!("cannot set up the connection to {address}"));
        channel.unlimit(Some(self.request), Some(self.request)).map_err(failed)?;
        Ok(Client {
            line: Line::new(channel, self.request),
            read_only,
            writing: if flushes { 0 } else { ask::FUA },
            agreed,
            address,
            gate: RwLock::default(),
        })
    }
}

impl Client {
    /// Connects to an export, whose name may be empty.
    ///
    /// # Errors
    ///
    /// As [`ClientBuilder::connect`].
    pub fn connect(address: impl Into<Address>, export: &str) -> Result<Self> {
        Self::builder(export).connect(address)
    }

    /// A connection with more to say about it.
    ///
    /// ```
    /// use std::time::Duration;
    /// use storage_block::{ErrorKind, MemoryDisk, nbd};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let socket = dir.path().join("disk.sock");
    /// # let served = MemoryDisk::new(1 << 20)?.into_disk();
    /// # let _server = nbd::Server::builder().export("vol-1", served).bind(socket.as_path())?;
    /// let client = nbd::Client::builder("vol-1")
    ///     .read_only(true)
    ///     .timeouts(Duration::from_secs(1), Duration::from_secs(5))
    ///     .connect(socket.as_path())?;
    /// assert!(client.into_disk().read_only());
    /// let none = nbd::Client::connect(socket.as_path(), "vol-2");
    /// assert_eq!(none.err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder(export: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            export: export.into(),
            read_only: false,
            handshake: HANDSHAKE,
            request: REQUEST,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// A handle to it.
    pub fn into_disk(self) -> Disk {
        Disk::from_backend(self)
    }

    /// Sends a request, and has its reply put into `buf`.
    fn call(&self, command: Command, place: (u64, u32), data: &[u8], buf: &mut [u8]) -> Result<()> {
        let mut expected = Expected::new(command, self.agreed.structured, place.0, buf);
        let flags = if command.writes() { self.writing } else { 0 };
        self.finish(self.line.call(flags, place, data, &mut expected)?, command)
    }

    fn finish(&self, done: Result<(), u32>, command: Command) -> Result<()> {
        let Err(errno) = done else { return Ok(()) };
        let kind = match errno {
            proto::EPERM => ErrorKind::ReadOnly,
            proto::ENOSPC => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        let source = io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX));
        let what = format!("the NBD server at {} cannot do what was asked of it: {command:?}", self.address);
        Err(Error::with_source(kind, what, source))
    }

    fn read_blocks(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for part in buf.chunks_mut(self.agreed.max as usize) {
            self.call(Command::Read, (at, part.len() as u32), &[], part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_blocks(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for part in buf.chunks(self.agreed.max as usize) {
            self.call(Command::Write, (at, part.len() as u32), part, &mut [])?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn zero_blocks(&self, range: Range<u64>) -> Result<()> {
        let cheap = self.agreed.has(flag::WRITE_ZEROES);
        let mut at = range.start;
        while at < range.end {
            let part = (range.end - at).min(if cheap { ZERO_MAX } else { ZEROES.len() as u64 });
            if cheap {
                self.call(Command::WriteZeroes, (at, part as u32), &[], &mut [])?;
            } else {
                self.write_blocks(&ZEROES[..part as usize], at)?;
            }
            at += part;
        }
        Ok(())
    }

    /// The whole blocks around a range.
    fn around(&self, range: &Range<u64>) -> Range<u64> {
        let block = u64::from(self.agreed.block);
        range.start / block * block..range.end.next_multiple_of(block)
    }

    /// Changes a range in parts: whole blocks by `whole`, and what is not one by `part`, which gets where in the range
    /// it is and the bytes to change.
    fn change(
        &self,
        range: Range<u64>,
        whole: impl FnOnce(Range<u64>) -> Result<()>,
        part: impl Fn(Range<usize>, &mut [u8]),
    ) -> Result<()> {
        if self.around(&range) == range {
            let _gate = read(&self.gate);
            return whole(range);
        }
        let _gate = write(&self.gate);
        let block = u64::from(self.agreed.block);
        let first = range.start.next_multiple_of(block).min(range.end);
        let last = (range.end / block * block).max(first);
        for piece in [range.start..first, last..range.end] {
            if piece.is_empty() {
                continue;
            }
            let blocks = self.around(&piece);
            let mut buf = vec![0; (blocks.end - blocks.start) as usize];
            self.read_blocks(&mut buf, blocks.start)?;
            let at = (piece.start - blocks.start) as usize;
            let len = (piece.end - piece.start) as usize;
            let from = (piece.start - range.start) as usize;
            part(from..from + len, &mut buf[at..at + len]);
            self.write_blocks(&buf, blocks.start)?;
        }
        if first < last { whole(first..last) } else { Ok(()) }
    }

    /// How long the extent at `at` is, and whether it reads as zeroes.
    fn extent(&self, context: u32, at: u64) -> Result<(u64, bool)> {
        let len = (self.agreed.size - at).min(ZERO_MAX) as u32;
        let mut expected = Expected::new(Command::BlockStatus, true, at, &mut []);
        expected.context = Some(context);
        let done = self.line.call(proto::ask::ONE, (at, len), &[], &mut expected)?;
        self.finish(done, Command::BlockStatus)?;
        let (found, state) = expected.extent.unwrap_or((len, 0));
        Ok((found.min(len).into(), state & proto::STATE_ZERO != 0))
    }
}

impl BlockBackend for Client {
    fn size(&self) -> u64 {
        self.agreed.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    // Requests that the server wants in whole blocks are made such here, so that any sector can be counted in. Zeroes are
    // asked for in a few bytes, whatever they cost the server.
    fn capabilities(&self) -> Capabilities {
        let zeroes = self.agreed.has(flag::WRITE_ZEROES);
        Capabilities {
            physical_block: self.agreed.preferred,
            discard_frees: zeroes && self.agreed.has(flag::TRIM),
            cheap_zeroes: zeroes,
            knows_holes: self.agreed.context.is_some(),
            ..Capabilities::default()
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        let around = self.around(&range);
        if around == range {
            return self.read_blocks(buf, offset);
        }
        let mut blocks = vec![0; (around.end - around.start) as usize];
        self.read_blocks(&mut blocks, around.start)?;
        buf.copy_from_slice(&blocks[(offset - around.start) as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let within = |range: &Range<u64>| (range.start - offset) as usize..(range.end - offset) as usize;
        self.change(
            offset..offset + buf.len() as u64,
            |whole| self.write_blocks(&buf[within(&whole)], whole.start),
            |from, bytes| bytes.copy_from_slice(&buf[from]),
        )
    }

    fn flush(&self) -> Result<()> {
        // Without, what was written has been durable since the server said so.
        if self.read_only || !self.agreed.has(flag::FLUSH) {
            return Ok(());
        }
        self.call(Command::Flush, (0, 0), &[], &mut [])
    }

    // A trim says nothing of what is read afterwards; zeroes do, and give the space back as well.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(offset..offset + len, |whole| self.zero_blocks(whole), |_, bytes| bytes.fill(0))
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.agreed.size;
        let Some(context) = self.agreed.context else { return Ok((offset < size).then_some(offset..size)) };
        let mut at = self.around(&(offset..offset)).start;
        for _ in 0..ASK_MAX {
            if at >= size {
                return Ok(None);
            }
            let (len, zero) = self.extent(context, at)?;
            if !zero && at + len > offset {
                return Ok(Some(at..at + len));
            }
            at += len;
        }
        // It may go on like this for long. What follows may be data, as far as anybody here knows.
        Ok((at < size).then_some(at..size.min(at + ZERO_MAX)))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.line.close();
    }
}

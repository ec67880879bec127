//! The network block device protocol as bytes: no socket, no disk.
//!
//! All numbers on the wire are big-endian.

pub(super) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle, and no zeroes after an export name.
pub(super) const HANDSHAKE_FLAGS: u16 = 1 | 2;
/// The client wants no zeroes after an export name.
pub(super) const NO_ZEROES: u32 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub(super) const REP_ERR_INVALID: u32 = 0x8000_0003;
pub(super) const REP_ERR_UNKNOWN: u32 = 0x8000_0006;

/// An option longer than this is nothing an honest client sends.
pub(super) const OPTION_MAX: u32 = 8192;
/// The longest read or write, as nearly every server has it.
pub(super) const PAYLOAD_MAX: u32 = 32 << 20;

pub(super) const REQUEST_LEN: usize = 28;
pub(super) const REPLY_LEN: usize = 16;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const ENOTSUP: u32 = 95;

/// What a client asks for once the handshake is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    /// One that this server has not offered.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    /// Force unit access: what is written is durable before the reply.
    pub(super) fua: bool,
    /// Flags were set that the command does not have.
    pub(super) bad_flags: bool,
    pub(super) handle: [u8; 8],
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    /// `None` if it does not begin as a request does; the stream is then of no use any more.
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *bytes;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC {
            return None;
        }
        let [h0, h1, h2, h3, h4, h5, h6, h7, o0, o1, o2, o3, o4, o5, o6, o7, len @ ..] = rest;
        let flags = u16::from_be_bytes([f0, f1]);
        // FUA (1) may be on every command and changes only those that write.
        let (command, known) = match u16::from_be_bytes([t0, t1]) {
            0 => (Command::Read, 1),
            1 => (Command::Write, 1),
            2 => (Command::Disconnect, u16::MAX),
            3 => (Command::Flush, 1),
            4 => (Command::Trim, 1),
            // "No hole" (2) is a hint.
            6 => (Command::WriteZeroes, 1 | 2),
            _ => (Command::Other, u16::MAX),
        };
        Some(Self {
            command,
            fua: flags & 1 != 0,
            bad_flags: flags & !known != 0,
            handle: [h0, h1, h2, h3, h4, h5, h6, h7],
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes(len),
        })
    }
}

/// The head of a simple reply.
pub(super) fn reply(errno: u32, handle: [u8; 8]) -> [u8; REPLY_LEN] {
    let mut bytes = [0; REPLY_LEN];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&errno.to_be_bytes());
    bytes[8..].copy_from_slice(&handle);
    bytes
}

pub(super) fn greeting() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(18);
    bytes.extend(GREETING_MAGIC.to_be_bytes());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(HANDSHAKE_FLAGS.to_be_bytes());
    bytes
}

pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What a client is told of the disk: that flags follow, flush, FUA, trim, write-zeroes, and that a
/// flush on one connection covers the writes of all.
pub(super) fn transmission_flags(read_only: bool) -> u16 {
    let flags = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;
    if read_only { flags | 1 << 1 } else { flags }
}

/// The answer to an export name, which ends the handshake.
pub(super) fn export(size: u64, read_only: bool, zeroes: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(134);
    bytes.extend(size.to_be_bytes());
    bytes.extend(transmission_flags(read_only).to_be_bytes());
    bytes.extend(std::iter::repeat_n(0, if zeroes { 124 } else { 0 }));
    bytes
}

/// The two pieces of information that go with "info" and "go": the export, and its block sizes.
pub(super) fn infos(size: u64, read_only: bool) -> [Vec<u8>; 2] {
    let mut export = vec![0, 0];
    export.extend(size.to_be_bytes());
    export.extend(transmission_flags(read_only).to_be_bytes());
    let mut block_size = vec![0, 3];
    for size in [1, 4096, PAYLOAD_MAX] {
        block_size.extend(size.to_be_bytes());
    }
    [export, block_size]
}

/// The name that an "info" or a "go" asks for; `None` if the option is malformed.
pub(super) fn asked_name(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
    let name = rest.get(..len)?;
    let (count, infos) = rest[len..].split_first_chunk::<2>()?;
    (infos.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}

//! What the client and a server agree on before the first request.

use std::io;

use super::ClientBuilder;
use crate::nbd::channel::Channel;
use crate::nbd::proto::{self, Fields, PAYLOAD_MAX};
use crate::{Error, ErrorKind, Result, SECTOR};

/// The longest answer to an option that a server gives.
const ANSWER_MAX: u32 = 64 << 10;
/// What most servers like best.
const PREFERRED: u32 = 4096;
/// So many answers to one option are enough.
const ANSWERS: usize = 1 << 10;

/// What an export is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Replies are structured.
    pub(super) structured: bool,
    /// The number of `base:allocation`, if the server tells of it.
    pub(super) context: Option<u32>,
    /// Requests begin and end at multiples of this.
    pub(super) block: u32,
    /// What is best written whole: the server says so, or it is a block of 4 KiB.
    pub(super) preferred: u32,
    /// The longest read or write.
    pub(super) max: u32,
}

/// Comes to terms over a new connection.
pub(super) fn handshake(channel: &mut Channel, wanted: &ClientBuilder) -> Result<Agreed> {
    if receive_u64(channel)? != proto::GREETING_MAGIC || receive_u64(channel)? != proto::OPTION_MAGIC {
        return Err(protocol("what answers is no NBD server, or one of the old style"));
    }
    let flags = u16::from_be_bytes(channel.receive_array().map_err(lost)?);
    if flags & proto::FIXED_NEWSTYLE == 0 {
        return Err(protocol("the NBD server does not know the fixed newstyle handshake"));
    }
    let flags = flags & proto::HANDSHAKE_FLAGS;
    channel.send(&u32::from(flags).to_be_bytes(), &[]).map_err(lost)?;
    start_tls(channel, wanted)?;

    let structured = match ask(channel, proto::OPT_STRUCTURED_REPLY, &[], |_, _| Ok(()))? {
        Said::Yes => true,
        Said::No(proto::REP_ERR_TLS_REQD) => return Err(tls_required()),
        Said::No(_) => false,
    };
    let context = if structured { ask_for_context(channel, &wanted.export)? } else { None };
    let mut agreed =
        Agreed { size: 0, flags: 0, structured, context, block: 1, preferred: PREFERRED, max: PAYLOAD_MAX };
    go(channel, wanted, flags, &mut agreed)?;
    agreed.check()
}

#[cfg(feature = "tls")]
fn start_tls(channel: &mut Channel, wanted: &ClientBuilder) -> Result<()> {
    let Some(tls) = &wanted.tls else { return Ok(()) };
    let Said::Yes = ask(channel, proto::OPT_STARTTLS, &[], |_, _| Ok(()))? else {
        return Err(Error::new(ErrorKind::Untrusted, "the NBD server does not offer TLS"));
    };
    tls.connect().and_then(|connection| channel.start_tls(connection)).map_err(lost)
}

#[cfg(not(feature = "tls"))]
fn start_tls(_: &mut Channel, _: &ClientBuilder) -> Result<()> {
    Ok(())
}

/// The number that the server gives to `base:allocation`.
fn ask_for_context(channel: &Channel, export: &str) -> Result<Option<u32>> {
    let mut data = proto::counted(export);
    data.extend(1u32.to_be_bytes());
    data.extend(proto::counted(proto::ALLOCATION));
    let mut context = None;
    let said = ask(channel, proto::OPT_SET_META_CONTEXT, &data, |kind, data| {
        let mut fields = Fields(data);
        match (kind, fields.u32(), context) {
            (proto::REP_META_CONTEXT, Some(id), None) if fields.0 == proto::ALLOCATION.as_bytes() => {
                context = Some(id);
                Ok(())
            }
            _ => Err(protocol("the NBD server names metadata that nobody has asked for")),
        }
    })?;
    Ok(context.filter(|_| said == Said::Yes))
}

fn go(channel: &Channel, wanted: &ClientBuilder, flags: u16, agreed: &mut Agreed) -> Result<()> {
    let mut data = proto::counted(&wanted.export);
    data.extend([1, proto::INFO_BLOCK_SIZE].map(u16::to_be_bytes).as_flattened());
    let mut known = false;
    let said = ask(channel, proto::OPT_GO, &data, |kind, data| {
        let mut fields = Fields(data);
        let unclear = || protocol("the NBD server says unclear things about its export");
        match (kind, fields.u16().ok_or_else(unclear)?) {
            (proto::REP_INFO, proto::INFO_EXPORT) => {
                agreed.size = fields.u64().ok_or_else(unclear)?;
                agreed.flags = fields.u16().ok_or_else(unclear)?;
                known = true;
            }
            (proto::REP_INFO, proto::INFO_BLOCK_SIZE) => {
                agreed.block = fields.u32().ok_or_else(unclear)?;
                agreed.preferred = fields.u32().ok_or_else(unclear)?;
                agreed.max = fields.u32().ok_or_else(unclear)?;
            }
            // There is more to be said of an export than we want to know.
            (proto::REP_INFO, _) => return Ok(()),
            _ => return Err(unclear()),
        }
        if fields.0.is_empty() { Ok(()) } else { Err(unclear()) }
    })?;
    match said {
        Said::Yes if known => Ok(()),
        Said::Yes => Err(protocol("the NBD server does not say how large its export is")),
        Said::No(proto::REP_ERR_UNSUP) => export_name(channel, wanted, flags, agreed),
        Said::No(proto::REP_ERR_UNKNOWN) => {
            let what = format!("the NBD server has no export {:?}", wanted.export);
            Err(Error::new(ErrorKind::NotFound, what))
        }
        Said::No(proto::REP_ERR_TLS_REQD) => Err(tls_required()),
        Said::No(kind) => {
            let what = format!("the NBD server refuses its export {:?} (answer {kind:#x})", wanted.export);
            Err(Error::new(ErrorKind::Io, what))
        }
    }
}

/// The old way in.
fn export_name(channel: &Channel, wanted: &ClientBuilder, flags: u16, agreed: &mut Agreed) -> Result<()> {
    channel.send(&proto::option(proto::OPT_EXPORT_NAME, wanted.export.as_bytes()), &[]).map_err(lost)?;
    agreed.size = receive_u64(channel)?;
    agreed.flags = u16::from_be_bytes(channel.receive_array().map_err(lost)?);
    // Whoever does not know the new way cannot have agreed on it before.
    agreed.context = None;
    if flags & proto::NO_ZEROES == 0 {
        channel.receive_array::<124>().map_err(lost)?;
    }
    Ok(())
}

/// How an option was answered in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Yes,
    /// With the kind of the refusal.
    No(u32),
}

/// Sends an option; `each` gets every answer to it before the last.
fn ask(
    channel: &Channel,
    option: u32,
    data: &[u8],
    mut each: impl FnMut(u32, &[u8]) -> Result<()>,
) -> Result<Said> {
    channel.send(&proto::option(option, data), &[]).map_err(lost)?;
    for _ in 0..ANSWERS {
        let head: [u8; 20] = channel.receive_array().map_err(lost)?;
        let mut fields = Fields(&head);
        let (magic, to) = (fields.u64(), fields.u32());
        let (Some(kind), Some(len)) = (fields.u32(), fields.u32()) else { break };
        if magic != Some(proto::OPTION_REPLY_MAGIC) || to != Some(option) || len > ANSWER_MAX {
            return Err(protocol("what the NBD server answers is no answer to an option"));
        }
        let mut data = vec![0; len as usize];
        channel.receive_exact(&mut data).map_err(lost)?;
        match kind {
            proto::REP_ACK => return Ok(Said::Yes),
            kind if kind & 1 << 31 != 0 => return Ok(Said::No(kind)),
            kind => each(kind, &data)?,
        }
    }
    Err(protocol("the NBD server does not come to an end with its answers"))
}

impl Agreed {
    fn check(mut self) -> Result<Self> {
        if self.size > i64::MAX as u64 {
            return Err(protocol("the NBD server has an export that is larger than any can be"));
        }
        let block = u64::from(self.block);
        if !self.block.is_power_of_two() || self.block > 64 << 10 || self.max < self.block {
            return Err(protocol("the NBD server wants requests of sizes that cannot be"));
        }
        if self.size % SECTOR != 0 || self.size % block != 0 {
            let what = format!("is not a multiple of 512 bytes and of the {block} that the server wants");
            return Err(Error::invalid_size(self.size, &what));
        }
        self.max = self.max.min(PAYLOAD_MAX) / self.block * self.block;
        // It is advice, and what cannot be followed is none.
        if !self.preferred.is_power_of_two() || self.preferred > self.max {
            self.preferred = PREFERRED;
        }
        self.preferred = self.preferred.max(self.block).max(SECTOR as u32);
        Ok(self)
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

fn receive_u64(channel: &Channel) -> Result<u64> {
    Ok(u64::from_be_bytes(channel.receive_array().map_err(lost)?))
}

fn tls_required() -> Error {
    Error::new(ErrorKind::Untrusted, "the NBD server wants TLS")
}

pub(super) fn protocol(what: &str) -> Error {
    Error::new(ErrorKind::Protocol, what)
}

/// The connection has gone, or is not what both want.
pub(super) fn lost(error: io::Error) -> Error {
    #[cfg(feature = "tls")]
    if crate::nbd::tls::is_about_trust(&error) {
        return Error::with_source(
            ErrorKind::Untrusted,
            "the NBD server and we do not trust each other",
            error,
        );
    }
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return Error::with_source(ErrorKind::Io, "the NBD server has hung up", error);
    }
    Error::with_source(ErrorKind::Io, "the connection to the NBD server is lost", error)
}

//! What a client and the server agree on before the first request: options as bytes and their answers, with
//! no socket.

use super::exports::Exports;
use crate::nbd::proto::{self, Fields, flag};
use crate::{Capabilities, Disk};

/// How far the two have come.
#[derive(Debug)]
pub(in crate::nbd) struct Negotiation<'e> {
    exports: &'e Exports,
    tls: Tls,
    structured: bool,
    /// The export whose allocation the client wants to be told of.
    context: Option<Vec<u8>>,
}

/// Whether the stream is encrypted, or has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nbd) enum Tls {
    /// The server has no certificate.
    Off,
    /// Nothing else is talked about before.
    Required,
    On,
}

/// What is sent, and what comes after it.
#[derive(Debug)]
pub(in crate::nbd) struct Answer {
    pub(in crate::nbd) bytes: Vec<u8>,
    pub(in crate::nbd) then: Then,
}

#[derive(Debug)]
pub(in crate::nbd) enum Then {
    More,
    /// The stream is encrypted from here on.
    StartTls,
    Serve(Agreed),
    HangUp,
}

/// What the requests will be about.
#[derive(Debug, Clone)]
pub(in crate::nbd) struct Agreed {
    pub(in crate::nbd) disk: Disk,
    /// Replies are structured.
    pub(in crate::nbd) structured: bool,
    /// Block status was asked for.
    pub(in crate::nbd) status: bool,
}

/// The number that block status replies bear.
pub(in crate::nbd) const CONTEXT_ID: u32 = 1;

impl<'e> Negotiation<'e> {
    pub(in crate::nbd) fn new(exports: &'e Exports, tls: Tls) -> Self {
        Self { exports, tls, structured: false, context: None }
    }

    /// The stream is encrypted now; what was said before could have been said by anybody, and is forgotten.
    pub(in crate::nbd) fn encrypted(&mut self) {
        *self = Self::new(self.exports, Tls::On);
    }

    /// Answers an option. `zeroes` says whether the client wants the old padding after an export's name.
    pub(in crate::nbd) fn option(&mut self, option: u32, data: &[u8], zeroes: bool) -> Answer {
        let reply = |kind, then| Answer { bytes: proto::option_reply(option, kind, &[]), then };
        let refuse = |kind| reply(kind, Then::More);
        match option {
            proto::OPT_ABORT => reply(proto::REP_ACK, Then::HangUp),
            // The old way in has no way to refuse but to hang up.
            proto::OPT_EXPORT_NAME => self.export_name(data, zeroes).unwrap_or(Answer::HANG_UP),
            proto::OPT_STARTTLS => match self.tls {
                Tls::Off => refuse(proto::REP_ERR_UNSUP),
                Tls::On => refuse(proto::REP_ERR_INVALID),
                Tls::Required if data.is_empty() => reply(proto::REP_ACK, Then::StartTls),
                Tls::Required => refuse(proto::REP_ERR_INVALID),
            },
            _ if self.tls == Tls::Required => refuse(proto::REP_ERR_TLS_REQD),
            proto::OPT_LIST | proto::OPT_STRUCTURED_REPLY if !data.is_empty() => {
                refuse(proto::REP_ERR_INVALID)
            }
            proto::OPT_LIST => Answer { bytes: self.list(), then: Then::More },
            proto::OPT_STRUCTURED_REPLY => {
                self.structured = true;
                refuse(proto::REP_ACK)
            }
            proto::OPT_INFO | proto::OPT_GO => match self.go(option, data) {
                Ok(answer) => answer,
                Err(kind) => refuse(kind),
            },
            proto::OPT_LIST_META_CONTEXT | proto::OPT_SET_META_CONTEXT => {
                match self.meta_context(option, data) {
                    Ok(bytes) => Answer { bytes, then: Then::More },
                    Err(kind) => refuse(kind),
                }
            }
            _ => refuse(proto::REP_ERR_UNSUP),
        }
    }

    fn export_name(&self, name: &[u8], zeroes: bool) -> Option<Answer> {
        if self.tls == Tls::Required {
            return None;
        }
        let agreed = self.agreed(name)?;
        let mut bytes = Vec::with_capacity(134);
        bytes.extend(agreed.disk.size().to_be_bytes());
        bytes.extend(agreed.flags().to_be_bytes());
        bytes.extend(std::iter::repeat_n(0, if zeroes { 124 } else { 0 }));
        Some(Answer { bytes, then: Then::Serve(agreed) })
    }

    fn list(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for name in self.exports.names() {
            bytes.extend(proto::option_reply(proto::OPT_LIST, proto::REP_SERVER, &proto::counted(&name)));
        }
        bytes.extend(proto::option_reply(proto::OPT_LIST, proto::REP_ACK, &[]));
        bytes
    }

    /// What an export is like, and the way in.
    fn go(&self, option: u32, data: &[u8]) -> Result<Answer, u32> {
        let (name, asked) = asked_name(data).ok_or(proto::REP_ERR_INVALID)?;
        let agreed = self.agreed(name).ok_or(proto::REP_ERR_UNKNOWN)?;
        let mut bytes = Vec::new();
        let mut info = |kind: u16, parts: &[&[u8]]| {
            let data = [&kind.to_be_bytes()[..], &parts.concat()].concat();
            bytes.extend(proto::option_reply(option, proto::REP_INFO, &data));
        };
        info(proto::INFO_EXPORT, &[&agreed.disk.size().to_be_bytes(), &agreed.flags().to_be_bytes()]);
        let sizes = [1, agreed.preferred(), proto::PAYLOAD_MAX].map(u32::to_be_bytes);
        info(proto::INFO_BLOCK_SIZE, &[sizes.as_flattened()]);
        if asked.contains(&proto::INFO_NAME) {
            info(proto::INFO_NAME, &[name]);
        }
        bytes.extend(proto::option_reply(option, proto::REP_ACK, &[]));
        let then = if option == proto::OPT_GO { Then::Serve(agreed) } else { Then::More };
        Ok(Answer { bytes, then })
    }

    /// Lists the kinds of metadata that are asked for and that there are, or agrees on them.
    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<Vec<u8>, u32> {
        let set = option == proto::OPT_SET_META_CONTEXT;
        if set {
            // Whatever comes of it, what was agreed on before is no more.
            self.context = None;
        }
        let (name, queries) = queries(data).ok_or(proto::REP_ERR_INVALID)?;
        if !self.structured {
            return Err(proto::REP_ERR_INVALID);
        }
        self.exports.get(name).ok_or(proto::REP_ERR_UNKNOWN)?;
        // All of a namespace, or just all, may be listed and not chosen.
        let all = !set && queries.is_empty();
        let found = all
            || queries
                .iter()
                .any(|query| *query == proto::ALLOCATION.as_bytes() || !set && *query == b"base:");
        let mut bytes = Vec::new();
        if found {
            let id = if set { CONTEXT_ID } else { 0 };
            let data = [&id.to_be_bytes(), proto::ALLOCATION.as_bytes()].concat();
            bytes.extend(proto::option_reply(option, proto::REP_META_CONTEXT, &data));
        }
        if found && set {
            self.context = Some(name.to_vec());
        }
        bytes.extend(proto::option_reply(option, proto::REP_ACK, &[]));
        Ok(bytes)
    }

    fn agreed(&self, name: &[u8]) -> Option<Agreed> {
        let status = self.context.as_deref() == Some(name);
        Some(Agreed { disk: self.exports.get(name)?, structured: self.structured, status })
    }
}

impl Answer {
    const HANG_UP: Self = Self { bytes: Vec::new(), then: Then::HangUp };
}

impl Agreed {
    /// What the client is told that it may do. A flush on one connection covers the writes of all.
    fn flags(&self) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::FLUSH | flag::FUA | flag::MULTI_CONN;
        if self.disk.read_only() {
            flags |= flag::READ_ONLY;
        } else {
            let Capabilities { discard_frees, cheap_zeroes, .. } = self.disk.capabilities();
            flags |= flag::WRITE_ZEROES;
            flags |= if discard_frees { flag::TRIM } else { 0 };
            flags |= if cheap_zeroes { flag::FAST_ZERO } else { 0 };
        }
        if self.structured { flags | flag::DONT_FRAGMENT } else { flags }
    }

    /// The block that is best written whole, if a client can be told of one of that size.
    fn preferred(&self) -> u32 {
        let block = self.disk.capabilities().physical_block;
        let can_be = block.is_power_of_two() && (512..=proto::PAYLOAD_MAX).contains(&block);
        if can_be { block } else { Capabilities::default().physical_block }
    }
}

/// The name that an "info" or a "go" asks for, and what it wants to be told; `None` if it is malformed.
pub(in crate::nbd) fn asked_name(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let (name, count) = (fields.counted()?, fields.u16()?);
    let asked = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
    fields.0.is_empty().then_some((name, asked))
}

/// The export and the queries of an option about metadata; `None` if it is malformed.
pub(in crate::nbd) fn queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let (name, count) = (fields.counted()?, fields.u32()?);
    // Each takes four bytes at least, so that the count cannot be far from the truth for long.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.counted()?);
    }
    fields.0.is_empty().then_some((name, queries))
}

//! One client: the handshake, and then requests served by a few threads.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use rustix::net::{SendFlags, Shutdown};

use super::proto::{self, Command, PAYLOAD_MAX, REPLY_LEN, REQUEST_LEN, Request};
use crate::store::{lock, read};
use crate::{Disk, ErrorKind, Result};

/// Requests of one connection that are served at the same time.
const WORKERS: usize = 4;
/// A client that is silent for so long in the handshake is cut off.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a worker keeps of its buffer between requests.
const BUFFER_KEPT: usize = 1 << 20;

pub(super) struct Connection<'s> {
    pub(super) disk: &'s Disk,
    pub(super) stream: &'s UnixStream,
    /// Held for reading while a request is at the disk.
    pub(super) gate: &'s RwLock<()>,
}

impl Connection<'_> {
    /// Serves the client until it goes, or does what no client may.
    pub(super) fn serve(&self) -> io::Result<()> {
        self.stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        self.stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
        if !self.handshake()? {
            return Ok(());
        }
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;

        let (requests, replies) = (Mutex::new(true), Mutex::new(()));
        std::thread::scope(|scope| {
            for _ in 1..WORKERS {
                let worker = || self.work(&requests, &replies);
                // With fewer threads it is slower and no less right.
                let _ = std::thread::Builder::new().name("nbd-worker".to_owned()).spawn_scoped(scope, worker);
            }
            self.work(&requests, &replies);
        });
        Ok(())
    }

    /// Haggles over options; whether the client wants the disk in the end.
    fn handshake(&self) -> io::Result<bool> {
        let (size, read_only) = (self.disk.size(), self.disk.read_only());
        self.send(&proto::greeting())?;
        let client_flags = u32::from_be_bytes(self.receive()?);
        if client_flags & !u32::from(proto::HANDSHAKE_FLAGS) != 0 {
            return Ok(false);
        }
        loop {
            if u64::from_be_bytes(self.receive()?) != proto::OPTION_MAGIC {
                return Ok(false);
            }
            let option = u32::from_be_bytes(self.receive()?);
            let len = u32::from_be_bytes(self.receive()?);
            if len > proto::OPTION_MAX {
                return Ok(false);
            }
            let mut data = vec![0; len as usize];
            { self.stream }.read_exact(&mut data)?;
            let reply = |kind, data: &[u8]| self.send(&proto::option_reply(option, kind, data));
            match option {
                // The old way in; there is no way to refuse a name but to hang up.
                proto::OPT_EXPORT_NAME if !data.is_empty() => return Ok(false),
                proto::OPT_EXPORT_NAME => {
                    self.send(&proto::export(size, read_only, client_flags & proto::NO_ZEROES == 0))?;
                    return Ok(true);
                }
                proto::OPT_ABORT => {
                    reply(proto::REP_ACK, &[])?;
                    return Ok(false);
                }
                proto::OPT_LIST if !data.is_empty() => reply(proto::REP_ERR_INVALID, &[])?,
                proto::OPT_LIST => {
                    reply(proto::REP_SERVER, &0u32.to_be_bytes())?;
                    reply(proto::REP_ACK, &[])?;
                }
                proto::OPT_INFO | proto::OPT_GO => match proto::asked_name(&data) {
                    None => reply(proto::REP_ERR_INVALID, &[])?,
                    Some(name) if !name.is_empty() => reply(proto::REP_ERR_UNKNOWN, &[])?,
                    Some(_) => {
                        for info in proto::infos(size, read_only) {
                            reply(proto::REP_INFO, &info)?;
                        }
                        reply(proto::REP_ACK, &[])?;
                        if option == proto::OPT_GO {
                            return Ok(true);
                        }
                    }
                },
                _ => reply(proto::REP_ERR_UNSUP, &[])?,
            }
        }
    }

    /// Takes one request after the other off the stream, each thread in its turn, and answers it when it is
    /// done. `requests` says whether there is more to come.
    fn work(&self, requests: &Mutex<bool>, replies: &Mutex<()>) {
        let mut buf = Vec::new();
        loop {
            let request = {
                let mut more = lock(requests);
                match if *more { self.next(&mut buf) } else { Ok(None) } {
                    Ok(Some(request)) => request,
                    _ => {
                        *more = false;
                        return;
                    }
                }
            };
            let errno = self.answer(&request, &mut buf);
            if errno != 0 || request.command != Command::Read {
                buf.resize(REPLY_LEN, 0);
            }
            buf[..REPLY_LEN].copy_from_slice(&proto::reply(errno, request.handle));
            let sent = {
                let _replies = lock(replies);
                self.send(&buf)
            };
            if sent.is_err() {
                // Wakes the thread that waits for the next request.
                let _ = rustix::net::shutdown(self.stream, Shutdown::Both);
                return;
            }
            if buf.capacity() > BUFFER_KEPT {
                buf = Vec::new();
            }
        }
    }

    /// The next request; what it brings along is put into `buf`, behind the room for the reply's head.
    fn next(&self, buf: &mut Vec<u8>) -> io::Result<Option<Request>> {
        let head: [u8; REQUEST_LEN] = self.receive()?;
        let Some(request) = Request::parse(&head) else { return Ok(None) };
        match request.command {
            Command::Disconnect => return Ok(None),
            // What follows cannot be skipped at a price worth paying.
            Command::Write if request.len > PAYLOAD_MAX => return Ok(None),
            Command::Write => {
                buf.resize(REPLY_LEN + request.len as usize, 0);
                { self.stream }.read_exact(&mut buf[REPLY_LEN..])?;
            }
            _ => buf.resize(REPLY_LEN, 0),
        }
        Ok(Some(request))
    }

    /// Does what is asked; the protocol's error number, or zero.
    fn answer(&self, request: &Request, buf: &mut Vec<u8>) -> u32 {
        let (offset, len) = (request.offset, u64::from(request.len));
        if request.bad_flags || request.command == Command::Read && request.len > PAYLOAD_MAX {
            return proto::EINVAL;
        }
        // Before anything is reserved for it.
        let whole = offset.checked_add(len).is_some_and(|end| end <= self.disk.size());
        if !whole && request.command != Command::Flush && request.command != Command::Other {
            return if request.command == Command::Read { proto::EINVAL } else { proto::ENOSPC };
        }
        let _gate = read(self.gate);
        let done = match request.command {
            Command::Read => {
                buf.resize(REPLY_LEN + request.len as usize, 0);
                self.disk.read_at(&mut buf[REPLY_LEN..], offset)
            }
            Command::Write => self.disk.write_at(&buf[REPLY_LEN..], offset),
            Command::Trim => self.disk.discard(offset, len),
            Command::WriteZeroes => self.disk.write_zeroes(offset, len),
            Command::Flush => self.disk.flush(),
            Command::Disconnect | Command::Other => return proto::ENOTSUP,
        };
        let writes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        errno(done.and_then(|()| if request.fua && writes { self.disk.flush() } else { Ok(()) }))
    }

    fn receive<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        { self.stream }.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes all of it, without the signal that a write to a closed socket sends otherwise.
    fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::net::send(self.stream, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn errno(done: Result<()>) -> u32 {
    let Err(error) = done else { return 0 };
    match error.kind() {
        ErrorKind::NoSpace => proto::ENOSPC,
        ErrorKind::ReadOnly => proto::EPERM,
        ErrorKind::OutOfBounds => proto::EINVAL,
        _ => {
            tracing::warn!(%error, "a request over NBD has failed");
            proto::EIO
        }
    }
}

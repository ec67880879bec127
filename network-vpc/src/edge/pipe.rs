//! A connection of the host's, and the guest's that goes on in it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::TcpStream;
use smoltcp::socket::tcp;
use socket2::{SockRef, TcpKeepalive};

use super::budget::Permit;

/// How long a host may be silent before it is asked whether it is there, and how often it is asked before it is not: whoever
/// vanishes without a word has a place for four minutes more.
const SILENCE: Duration = Duration::from_secs(120);
const ASKED_AGAIN: Duration = Duration::from_secs(30);
const ASKED: u32 = 4;

/// How long a host may take nothing of what a guest that is gone has left for it.
const TAKES_WITHIN: Duration = Duration::from_secs(120);

/// Has the host's kernel send at once what is written to a connection, and look whether the other end is still there.
pub(super) fn settle(host: &TcpStream) {
    let keep_alive = TcpKeepalive::new().with_time(SILENCE).with_interval(ASKED_AGAIN).with_retries(ASKED);
    let settled = host.set_nodelay(true).and_then(|()| SockRef::from(host).set_tcp_keepalive(&keep_alive));
    if let Err(error) = settled {
        tracing::debug!(%error, "a connection goes on without its options");
    }
}

/// Whether a connection that was begun is there.
pub(super) fn is_connected(host: &TcpStream) -> io::Result<bool> {
    if let Some(error) = host.take_error()? {
        return Err(error);
    }
    match host.peer_addr() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}

/// A connection of the host's.
pub(super) struct Pipe {
    host: TcpStream,
    _permit: Permit,
    /// Whether the host may have something to be read, and room for something to be written: it is not asked
    /// again until it has said so.
    readable: bool,
    writable: bool,
    /// The guest has said that it sends no more, and of what it has said this is left: what the stack forgets when the conversation
    /// is over for it, which may be long before the host takes it. No more than the stack has room for.
    guest_ended: bool,
    left: VecDeque<u8>,
    /// Since when the host takes nothing of it, where the guest is gone.
    waits: Option<Instant>,
    /// The host has said that it sends no more.
    host_done: bool,
    /// The host has been told that the guest sends no more.
    guest_done: bool,
}

impl Pipe {
    pub(super) fn new(host: TcpStream, permit: Permit) -> Self {
        settle(&host);
        Self {
            host,
            _permit: permit,
            readable: true,
            writable: true,
            guest_ended: false,
            left: VecDeque::new(),
            waits: None,
            host_done: false,
            guest_done: false,
        }
    }

    /// Something has happened to the host's socket.
    pub(super) fn notice(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// Whether both have said that they say no more, and the host has all that the guest has said and the stack all that the host
    /// has; or the guest is gone.
    pub(super) fn is_over(&self) -> bool {
        self.host_done && self.guest_done
    }

    /// Moves bytes both ways. An error is the end of both.
    pub(super) fn pump(&mut self, guest: &mut tcp::Socket<'_>) -> io::Result<()> {
        if guest.state() == tcp::State::Closed {
            if !self.guest_ended {
                return Err(ErrorKind::ConnectionReset.into());
            }
            // What it has said is whole; of what the host still says nobody hears.
            self.host_done = true;
        }
        while !self.left.is_empty() && self.writable {
            match self.host.write(self.left.as_slices().0) {
                Ok(len) => {
                    self.left.drain(..len);
                    self.waits = None;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if guest.state() == tcp::State::Closed && !self.left.is_empty() {
            let since = *self.waits.get_or_insert_with(Instant::now);
            if since.elapsed() >= TAKES_WITHIN {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        while guest.can_recv() && self.writable {
            let mut written = Ok(0);
            let received = guest.recv(|bytes| {
                written = self.host.write(bytes);
                (*written.as_ref().unwrap_or(&0), ())
            });
            match written {
                _ if received.is_err() => return Err(ErrorKind::ConnectionReset.into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.guest_ended |= matches!(
            guest.state(),
            tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
        );
        while self.guest_ended && guest.can_recv() {
            let received = guest.recv(|bytes| (bytes.len(), self.left.extend(&*bytes)));
            received.map_err(|_| ErrorKind::ConnectionReset)?;
        }
        if self.guest_ended && self.left.is_empty() && !self.guest_done {
            self.guest_done = true;
            // Fails where the other side has gone, which is seen below.
            let _ = self.host.shutdown(Shutdown::Write);
        }
        while guest.can_send() && self.readable && !self.host_done {
            let mut read = Ok(0);
            let sent = guest.send(|room| {
                read = self.host.read(room);
                (*read.as_ref().unwrap_or(&0), ())
            });
            match read {
                _ if sent.is_err() => return Err(ErrorKind::ConnectionReset.into()),
                Ok(0) => self.host_done = true,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.host_done && guest.may_send() {
            guest.close();
        }
        Ok(())
    }
}

impl Drop for Pipe {
    /// Has the other side hear that the guest has broken off what it was saying, if it has: an orderly end would say that all has
    /// come.
    fn drop(&mut self) {
        if !self.guest_done {
            // Fails where the other side is gone.
            let _ = SockRef::from(&self.host).set_linger(Some(Duration::ZERO));
        }
    }
}

#[cfg(test)]
mod tests;

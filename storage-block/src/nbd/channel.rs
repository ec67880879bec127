//! A connected socket, plain or encrypted, with what a thread that waits on it must not wait for longer than.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown};

/// One thread at a time may receive; sending is put in order by whoever calls.
#[derive(Debug)]
pub(super) struct Channel {
    wire: Wire,
    #[cfg(feature = "tls")]
    tls: Option<super::tls::Session>,
}

/// The socket itself.
#[derive(Debug)]
pub(super) struct Wire {
    socket: Arc<OwnedFd>,
    /// When the handshake has to be over.
    deadline: Option<Instant>,
}

impl Channel {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            wire: Wire { socket, deadline: None },
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// From here on everything has to be over by `deadline`.
    pub(super) fn limit(&mut self, deadline: Instant) {
        self.wire.deadline = Some(deadline);
    }

    /// Ends the limit; from here on each single wait may take as long as this.
    pub(super) fn unlimit(&mut self, receive: Option<Duration>, send: Option<Duration>) -> io::Result<()> {
        self.wire.deadline = None;
        sockopt::set_socket_timeout(&*self.wire.socket, Timeout::Recv, receive)?;
        sockopt::set_socket_timeout(&*self.wire.socket, Timeout::Send, send)?;
        Ok(())
    }

    #[cfg(feature = "tls")]
    pub(super) fn start_tls(&mut self, connection: rustls::Connection) -> io::Result<()> {
        self.tls = Some(super::tls::Session::start(connection, &self.wire)?);
        Ok(())
    }

    /// What has come, at least a byte of it; zero when nothing will any more.
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.receive(&self.wire, buf);
        }
        self.wire.receive(buf)
    }

    pub(super) fn receive_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.receive(buf)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => buf = &mut buf[received..],
            }
        }
        Ok(())
    }

    pub(super) fn receive_array<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends all of both.
    pub(super) fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.send(&self.wire, head, data);
        }
        self.wire.send(head, data)
    }

    /// Wakes whoever waits on it: there is nothing to wait for any more.
    pub(super) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&*self.wire.socket, Shutdown::Both);
    }
}

impl Wire {
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.hurry(Timeout::Recv)?;
            match rustix::io::read(&*self.socket, &mut *buf) {
                Ok(received) => return Ok(received),
                Err(Errno::INTR) => {}
                Err(error) => return Err(late(error)),
            }
        }
    }

    /// Without the signal that a write to a closed socket sends otherwise.
    pub(super) fn send(&self, mut head: &[u8], mut data: &[u8]) -> io::Result<()> {
        while !head.is_empty() || !data.is_empty() {
            self.hurry(Timeout::Send)?;
            let parts = [IoSlice::new(head), IoSlice::new(data)];
            let mut control = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&*self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    let of_head = sent.min(head.len());
                    head = &head[of_head..];
                    data = &data[sent - of_head..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(late(error)),
            }
        }
        Ok(())
    }

    /// Sees to it that the next wait ends with the time there is.
    fn hurry(&self, which: Timeout) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(sockopt::set_socket_timeout(&*self.socket, which, Some(left.max(Duration::from_millis(1))))?)
    }
}

fn late(error: Errno) -> io::Error {
    if error == Errno::AGAIN { io::ErrorKind::TimedOut.into() } else { error.into() }
}

//! The machine of an interface, where it is behind a stream socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use instance_core::net::{Again, ServedStream, Waker};
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

/// The token of the machine's socket.
pub(super) const MACHINE: Token = Token(1);

/// See the [module](self).
pub(super) struct Machine {
    stream: ServedStream,
    /// Whether there may be something to be read: the socket is not asked again until it has said so.
    readable: bool,
    /// The machine has closed its end, which is seen when all has been read that it sent before.
    closed: bool,
    /// Whether the socket tells that it is writable. It is not asked to without need: it does so whenever the machine
    /// has read anything.
    tells_of_room: bool,
}

impl Machine {
    /// Begins to serve it.
    pub(super) fn begin(stream: ServedStream, registry: &Registry, wake: Waker) -> io::Result<Self> {
        stream.watch(|socket| {
            registry.register(&mut SourceFd(&socket.as_raw_fd()), MACHINE, Interest::READABLE)
        })?;
        stream.begin(wake)?;
        Ok(Self { stream, readable: true, closed: false, tells_of_room: false })
    }

    /// Something has happened to the socket.
    pub(super) fn notice(&mut self, event: &Event) {
        self.closed |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.closed;
    }

    /// Takes what it has sent. Says after how long there may be more although nothing tells of it.
    pub(super) fn receive(&mut self) -> io::Result<Option<Duration>> {
        if !self.readable {
            return Ok(None);
        }
        match self.stream.receive()? {
            Again::WhenReadable if self.closed => Ok(Some(Duration::ZERO)),
            again => {
                self.readable = again != Again::WhenReadable;
                Ok(again.after())
            }
        }
    }

    /// Gives it what waits for it. Says the same.
    pub(super) fn send(&mut self, registry: &Registry) -> io::Result<Option<Duration>> {
        let again = self.stream.send()?;
        let is_behind = again == Again::WhenWritable;
        if self.tells_of_room != is_behind {
            let interest =
                if is_behind { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            // It tells of what is there already.
            let watch = |socket: BorrowedFd<'_>| {
                registry.reregister(&mut SourceFd(&socket.as_raw_fd()), MACHINE, interest)
            };
            self.stream.watch(watch)?;
            self.tells_of_room = is_behind;
        }
        Ok(again.after())
    }
}

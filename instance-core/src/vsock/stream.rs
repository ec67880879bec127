//! A stream, as a program uses it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Condvar};
use std::time::Instant;

use super::Shared;
use super::connection::{Connection, State, Ways};
use super::hub::{Hub, Id};

/// A stream of bytes between the host and a guest, as [`connect`](super::Vsock::connect) and
/// [`accept`](super::Listener::accept) make it. Clones are the same stream, which ends both ways when the last
/// one is dropped; each has a deadline of its own.
///
/// Reads return what there is, and nothing after the guest's end. They wait, and so do writes for which there is
/// no room, until the deadline: [`TimedOut`](io::ErrorKind::TimedOut). A stream that was broken off is
/// [`ConnectionReset`](io::ErrorKind::ConnectionReset), writing to one that the guest reads no more
/// [`BrokenPipe`](io::ErrorKind::BrokenPipe). Where there is no machine any more,
/// what has come can still be read.
#[derive(Clone)]
pub struct Stream {
    handle: Arc<Handle>,
    deadline: Option<Instant>,
}

struct Handle {
    shared: Arc<Shared>,
    id: Id,
    changed: Arc<Condvar>,
}

impl Stream {
    pub(super) fn new(shared: Arc<Shared>, id: Id, changed: Arc<Condvar>) -> Self {
        Self { handle: Arc::new(Handle { shared, id, changed }), deadline: None }
    }

    /// Sets until when reads and writes wait; without one they wait for as long as it takes.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The port at the host.
    pub fn host_port(&self) -> u32 {
        self.handle.shared.lock().ports(self.handle.id).0
    }

    /// The port at the guest.
    pub fn guest_port(&self) -> u32 {
        self.handle.shared.lock().ports(self.handle.id).1
    }

    /// Ends a direction or both. What was written before still goes to the guest; what was not read is lost.
    pub fn shutdown(&self, how: Shutdown) {
        let ways = Ways { receive: how != Shutdown::Write, send: how != Shutdown::Read };
        let Handle { shared, id, changed } = &*self.handle;
        shared.with(|hub| hub.with(*id, |connection| connection.end(ways)));
        changed.notify_all();
    }

    /// Tries until the stream has an answer.
    fn wait_for(
        &self,
        mut attempt: impl FnMut(&mut Connection) -> Option<Result<usize, State>>,
    ) -> io::Result<usize> {
        let Handle { shared, id, changed } = &*self.handle;
        let attempt = |hub: &mut Hub| hub.with(*id, &mut attempt).flatten();
        shared.wait_for(changed, self.deadline, attempt)?.map_err(|state| match state {
            State::Closed => io::Error::new(io::ErrorKind::BrokenPipe, "the guest reads this stream no more"),
            State::Connecting | State::Connected | State::Refused | State::Broken => broken(),
        })
    }
}

/// That a stream was broken off.
pub(super) fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the guest broke the stream off")
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.wait_for(|connection| connection.read(buf))
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait_for(|connection| connection.write(buf))
    }

    /// Does nothing: what was written goes to the guest by itself.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buf)
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self).write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host_port, guest_port) = self.handle.shared.lock().ports(self.handle.id);
        let mut text = f.debug_struct("Stream");
        text.field("host_port", &host_port).field("guest_port", &guest_port).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.with(|hub| hub.release(self.id));
    }
}

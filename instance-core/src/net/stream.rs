//! A machine whose frames come and go on a stream socket, each behind its length.

mod carrier;
mod run;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use self::carrier::Carrier;
use super::Waker;
use crate::machine::NetSpec;

/// What is handed the streams of the other end's. See [`NetPort::set_stream_server`](super::NetPort::set_stream_server).
pub type StreamServer = Arc<dyn Fn(ServedStream) + Send + Sync>;

/// A machine that is plugged into its port by a stream socket, on which each frame stands behind its length in four
/// bytes, the highest first: that of QEMU's `-netdev socket`, and of `passt`.
///
/// Who serves the socket is the network at the other end of the cable, where that
/// [does so](super::NetPort::set_stream_server): a thread of its own takes the frames and does with them what is to be
/// done. Otherwise it is a thread of this stream's. What is longer than the network's packets is cut as it is written.
///
/// The machine is not trusted. Where it sends what is no frame, or closes its end, the port is unplugged; where it takes
/// no frames, those for it wait in the cable.
///
/// ```
/// use std::io::Write;
/// use std::os::unix::net::UnixStream;
///
/// use instance_core::machine::NetSpec;
/// use instance_core::net::{self, FrameStream, MacAddress};
///
/// let (port, network) = net::link();
/// let (mut machine, socket) = UnixStream::pair()?;
/// let spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
/// let plugged = FrameStream::plug(socket, &spec, "net0")?;
/// machine.write_all(&[&60u32.to_be_bytes()[..], &[0xff; 60]].concat())?;
/// # let (came, comes) = std::sync::mpsc::channel();
/// # network.set_waker(Some(std::sync::Arc::new(move || drop(came.send(())))));
/// # while network.waiting() == 0 { comes.recv()?; }
/// assert_eq!(network.recv().map(|frame| frame.data.len()), Some(60));
/// drop(plugged);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FrameStream(Served);

#[derive(Debug)]
enum Served {
    ByPeer(Arc<Line>),
    ByThread(Arc<Stop>, Option<JoinHandle<()>>),
}

/// What a stream and who serves it share; empty when it is over.
#[derive(Debug)]
struct Line(Mutex<Option<Carrier>>);

impl Line {
    fn lock(&self) -> MutexGuard<'_, Option<Carrier>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        let carrier = self.lock().take();
        drop(carrier); // outside the lock: it may be the last to hold the port, whose end is told to others
    }
}

impl FrameStream {
    /// Plugs in the machine at the other end of a socket. `thread_name` is that of the thread, if one is needed.
    ///
    /// # Errors
    ///
    /// What the host refused.
    pub fn plug(socket: UnixStream, spec: &NetSpec, thread_name: &str) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let carrier = Carrier::new(socket, spec);
        if let Some(serve) = spec.port.stream_server() {
            let line = Arc::new(Line(Mutex::new(Some(carrier))));
            serve(ServedStream(line.clone()));
            return Ok(Self(Served::ByPeer(line)));
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { wake, over: AtomicBool::new(false) });
        let name: String = thread_name.chars().take(15).collect();
        let of_thread = stop.clone();
        let thread = thread::Builder::new().name(name).spawn(move || of_thread.serve(carrier))?;
        Ok(Self(Served::ByThread(stop, Some(thread))))
    }
}

/// Unplugs the machine. No frame is under way any more when this returns.
impl Drop for FrameStream {
    fn drop(&mut self) {
        match &mut self.0 {
            Served::ByPeer(line) => line.end(),
            Served::ByThread(stop, thread) => {
                stop.over.store(true, Ordering::SeqCst);
                stop.wake();
                // It panics only where a waker of the network's does.
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}

/// The stream of a machine's, for who serves it. It is over with this or with its [`FrameStream`], whichever is dropped
/// first.
#[derive(Debug)]
pub struct ServedStream(Arc<Line>);

impl ServedStream {
    /// Begins to serve: `wake` is called when there may be something to [send](Self::send) or room for what is
    /// [received](Self::receive), as a [waker of a port](super::NetPort::set_waker) is. `watch` is given the socket, whose
    /// being readable and writable are two more reasons.
    ///
    /// # Errors
    ///
    /// That of `watch`, or that the stream is over.
    pub fn begin(&self, wake: Waker, watch: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
        self.with(|carrier| {
            watch(carrier.socket.as_fd())?;
            carrier.port.set_waker(Some(wake));
            Ok(())
        })
    }

    /// Takes what has come from the machine, as much as is good at a time, and sends it to the network. Says after how
    /// long there may be more although nothing tells of it, if there may.
    ///
    /// # Errors
    ///
    /// That the stream is over, and why.
    pub fn receive(&self) -> io::Result<Option<Duration>> {
        self.with(Carrier::receive)
    }

    /// Gives the machine what waits for it, as far as it takes it. Says the same.
    ///
    /// # Errors
    ///
    /// That the stream is over, and why.
    pub fn send(&self) -> io::Result<Option<Duration>> {
        self.with(Carrier::send)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Carrier) -> io::Result<T>) -> io::Result<T> {
        self.0.lock().as_mut().map_or_else(|| Err(io::ErrorKind::NotConnected.into()), work)
    }
}

impl Drop for ServedStream {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// How the thread of a stream is woken and ended.
#[derive(Debug)]
struct Stop {
    wake: OwnedFd,
    over: AtomicBool,
}

impl Stop {
    fn wake(&self) {
        // It fails only where the counter is full, and then the thread is about to wake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Serves a stream until it is over.
    fn serve(self: Arc<Self>, mut carrier: Carrier) {
        let stop = self.clone();
        carrier.port.set_waker(Some(Arc::new(move || stop.wake())));
        let end = self.serve_until_the_end(&mut carrier);
        tracing::debug!(?end, "a network port is unplugged");
    }

    fn serve_until_the_end(&self, carrier: &mut Carrier) -> io::Result<()> {
        loop {
            // It fails only where nobody woke it.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            if self.over.load(Ordering::SeqCst) {
                return Ok(());
            }
            let (from_machine, to_machine) = (carrier.receive()?, carrier.send()?);
            // What waits for a limit is looked at again when it may pass.
            let due_in = [to_machine, from_machine].into_iter().flatten().min();
            let timeout = due_in.and_then(|due_in| Timespec::try_from(due_in).ok());
            // A TAP device calls no waker; it is heard as long as the machine takes frames.
            let hears = !carrier.is_behind() && to_machine.is_none() && carrier.port.is_connected();
            let heard = carrier.port.descriptor().filter(|_| hears);
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, from_machine.is_none() && !carrier.is_held_up());
            wanted.set(PollFlags::OUT, carrier.is_behind());
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(heard.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)));
            // That the machine has closed it is told although nothing is wanted of it. What it had sent is received first.
            if !wanted.is_empty() {
                fds.push(PollFd::new(&carrier.socket, wanted));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

//! Streams between the host and a guest that need no network: virtio's sockets, `AF_VSOCK` in Linux.
//!
//! A [`cable`] has two ends. A machine holds one as the [`VsockPort`] of its
//! [`MachineSpec`](crate::machine::MachineSpec); the program that embeds it holds the other, a [`Vsock`], by which it
//! connects to the guest's ports and listens to be connected to.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use std::time::{Duration, Instant};
//! # use instance_core::machine::MachineSpec;
//! # fn launch(spec: MachineSpec) {}
//! # fn example(mut spec: MachineSpec) -> std::io::Result<()> {
//! use instance_core::vsock::{self, VsockSpec};
//!
//! let (port, vsock) = vsock::cable();
//! spec.vsock = Some(VsockSpec::new(port));
//! launch(spec);
//! // In the guest: socat - VSOCK-CONNECT:2:5000
//! let soon = Instant::now() + Duration::from_secs(10);
//! let mut stream = vsock.listen(5000)?.accept(soon)?;
//! stream.set_deadline(Some(soon));
//! stream.write_all(b"who are you?\n")?;
//! let mut answer = String::new();
//! stream.read_to_string(&mut answer)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What may be relied on
//!
//! - Nothing is process-wide: no address family of the host's, no file, no thread. Every machine has ports of its
//!   own, and its guest sees the host and no other machine.
//! - A guest makes the host keep at most 128 KiB for each of at most 512 streams, of which at most 128 wait at a
//!   listener.
//! - What is written to a stream before it is dropped goes to the guest, if it takes it.
//! - A guest that breaks the rules of a stream has it broken off
//!   ([`ConnectionReset`](std::io::ErrorKind::ConnectionReset)), and all of them when it restarts.

mod connection;
mod hub;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use connection::State;
use hub::Hub;
pub use packet::{Op, Packet};
pub use stream::Stream;

/// What an end is woken by. See [`VsockPort::set_waker`].
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// How many bytes a stream keeps each way.
const BUFFER: usize = 128 << 10;
/// The most bytes of a packet for a guest.
const DATA_MAX: usize = 64 << 10;
/// The most streams of a machine.
const STREAMS: usize = 512;
/// The most streams that wait at a listener.
const BACKLOG: usize = 128;
/// The most streams that nobody holds any more and whose bytes the guest has still to take.
const LINGERING: usize = 64;
/// How many answers to packets that belong to no stream wait before no more packets are taken.
const REPLIES: usize = 64;

/// A machine's place for streams. Its [module](self) shows it in use.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct VsockSpec {
    /// The machine's end of the cable.
    pub port: VsockPort,
    /// The guest's address, which is known to nobody else.
    pub cid: u32,
}

impl VsockSpec {
    /// The host's address.
    pub const HOST_CID: u32 = 2;

    /// A place with the address 3, the first that is not reserved.
    pub fn new(port: VsockPort) -> Self {
        Self { port, cid: 3 }
    }

    /// Whether the address is one that a guest may have.
    pub fn is_valid(&self) -> bool {
        self.cid > Self::HOST_CID && self.cid < u32::MAX
    }
}

/// A cable between a machine and the program that embeds it.
pub fn cable() -> (VsockPort, Vsock) {
    let shared = Arc::new(Shared::default());
    (VsockPort(Arc::new(End(shared.clone()))), Vsock(shared))
}

/// What both ends share.
#[derive(Default)]
struct Shared {
    hub: Mutex<Hub>,
    waker: Mutex<Option<Waker>>,
    /// The machine's end has gone.
    unplugged: AtomicBool,
    /// Notified when it has.
    gone: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the streams, and has the machine look if there then is a packet for its guest.
    fn with<T>(&self, action: impl FnOnce(&mut Hub) -> T) -> T {
        let mut hub = self.lock();
        let done = action(&mut hub);
        let wake = hub.has_next();
        drop(hub);
        if wake {
            self.wake();
        }
        done
    }

    fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            waker();
        }
    }

    /// Tries until there is something, and waits for a change between. An error after the deadline, if there is
    /// one, and when the machine's end has gone.
    fn wait_for<T>(
        &self,
        changed: &Condvar,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Hub) -> Option<T>,
    ) -> io::Result<T> {
        let mut hub = self.lock();
        loop {
            if let Some(done) = attempt(&mut hub) {
                let wake = hub.has_next();
                drop(hub);
                if wake {
                    self.wake();
                }
                return Ok(done);
            }
            if self.unplugged.load(Ordering::Acquire) {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "there is no machine any more"));
            }
            hub = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the guest did not answer in time"));
                }
                Some(left) => changed.wait_timeout(hub, left).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(hub).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// The program's end of a cable. Clones are the same end.
#[derive(Clone)]
pub struct Vsock(Arc<Shared>);

impl Vsock {
    /// Listens on a port of the host's, from now on and until the listener is dropped.
    ///
    /// # Errors
    ///
    /// [`AddrInUse`](io::ErrorKind::AddrInUse) where another listener does.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        let changed = self.0.lock().listen(port);
        let changed = changed.ok_or_else(|| {
            io::Error::new(io::ErrorKind::AddrInUse, format!("another listener has the port {port}"))
        })?;
        Ok(Listener { shared: self.0.clone(), port, changed })
    }

    /// Connects to a port of the guest's, as soon as the guest can be asked.
    ///
    /// # Errors
    ///
    /// [`ConnectionRefused`](io::ErrorKind::ConnectionRefused) where nobody listens there,
    /// [`ConnectionReset`](io::ErrorKind::ConnectionReset) where the guest restarted meanwhile,
    /// [`TimedOut`](io::ErrorKind::TimedOut) after the deadline,
    /// [`NotConnected`](io::ErrorKind::NotConnected) where there is no machine any more, and
    /// [`QuotaExceeded`](io::ErrorKind::QuotaExceeded) where the machine has as many streams as it may have.
    pub fn connect(&self, port: u32, deadline: Instant) -> io::Result<Stream> {
        let (id, changed) = self.0.with(|hub| hub.connect(port)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::QuotaExceeded, format!("a machine has at most {STREAMS} streams"))
        })?;
        let stream = Stream::new(self.0.clone(), id, changed.clone());
        let answer = |hub: &mut Hub| Some(hub.state(id)).filter(|state| *state != State::Connecting);
        match self.0.wait_for(&changed, Some(deadline), answer)? {
            State::Refused => {
                let what = format!("nobody listens on the guest's port {port}");
                Err(io::Error::new(io::ErrorKind::ConnectionRefused, what))
            }
            State::Broken => Err(stream::broken()),
            State::Connecting | State::Connected | State::Closed => Ok(stream),
        }
    }
}

impl Vsock {
    /// Whether these are the same end of the same cable.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits until there is no machine any more, or until the deadline; says whether there is none.
    pub(crate) fn ends_by(&self, deadline: Instant) -> bool {
        let never = |_: &mut Hub| None::<Infallible>;
        let ended = self.0.wait_for(&self.0.gone, Some(deadline), never);
        ended.is_err_and(|e| e.kind() == io::ErrorKind::NotConnected)
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock").finish_non_exhaustive()
    }
}

/// A port of the host's that a guest may connect to. See [`Vsock::listen`].
pub struct Listener {
    shared: Arc<Shared>,
    port: u32,
    changed: Arc<Condvar>,
}

impl Listener {
    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next stream that the guest makes. It may have ended already.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) after the deadline,
    /// [`NotConnected`](io::ErrorKind::NotConnected) where there is no machine any more.
    pub fn accept(&self, deadline: Instant) -> io::Result<Stream> {
        let (id, changed) =
            self.shared.wait_for(&self.changed, Some(deadline), |hub| hub.accept(self.port))?;
        Ok(Stream::new(self.shared.clone(), id, changed))
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.with(|hub| hub.close(self.port));
    }
}

/// The machine's end of a cable, for the hypervisor. Clones are the same end, and when the last one is dropped
/// there is no machine any more.
///
/// Every method may be called from any thread, and none blocks.
#[derive(Clone)]
pub struct VsockPort(Arc<End>);

struct End(Arc<Shared>);

impl VsockPort {
    /// Whether [`deliver`](Self::deliver) may be called. If not, it may after [`next`](Self::next).
    pub fn has_room(&self) -> bool {
        self.0.0.lock().has_room()
    }

    /// Takes a packet of the guest's.
    pub fn deliver(&self, packet: Packet) {
        self.0.0.lock().deliver(packet);
    }

    /// Whether there is a packet for the guest.
    pub fn has_next(&self) -> bool {
        self.0.0.lock().has_next()
    }

    /// The next packet for the guest, with at most `room` bytes of data.
    pub fn next(&self, room: usize) -> Option<Packet> {
        self.0.0.lock().next(room)
    }

    /// The guest has forgotten all streams: its driver begins anew, or the machine has ended.
    pub fn reset(&self) {
        self.0.0.lock().reset();
    }

    /// Sets what is called, in the thread of whoever brings it about, when there may be a packet for the guest. One
    /// that is set is called at once, so that nothing of before is missed. It must not block.
    pub fn set_waker(&self, waker: Option<Waker>) {
        let mut slot = self.0.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
        let replaced = std::mem::replace(&mut *slot, waker.clone());
        drop(slot);
        drop(replaced); // outside the lock: it may hold the last clone of a port
        if let Some(wake) = waker {
            wake();
        }
    }
}

impl fmt::Debug for VsockPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockPort").finish_non_exhaustive()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(waker);
        let mut hub = self.0.lock();
        self.0.unplugged.store(true, Ordering::Release);
        hub.reset();
        hub.wake_all();
        self.0.gone.notify_all();
    }
}

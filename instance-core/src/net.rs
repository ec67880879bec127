//! Network ports: how frames pass between a machine and the network that it is plugged into.
//!
//! A [`link`] is a cable with two equal ends. A machine holds one as a [`NetPort`] of its
//! [`MachineSpec`](crate::machine::MachineSpec); who holds the other is the network: a switch, a test, another
//! machine. Frames wait in a bounded queue each way, so neither end ever waits for the other.
//!
//! Who has the privilege may plug a machine into the host's own network instead, by a [`Tap`] device.

mod cable;
mod frame;
mod header;
mod limits;
mod offload;
mod stream;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use self::cable::End;
pub use self::frame::{Checksum, Frame, InvalidMacAddress, MacAddress, Offloads, Protocol, Segmentation};
pub use self::limits::FrameLimits;
pub use self::stream::{FrameStream, ServedStream, StreamServer};
pub use self::tap::Tap;

/// How many frames wait each way at most.
pub const FRAMES_KEPT: usize = 1024;

/// How many bytes of frames wait each way at most, but for one frame, for which there is room always.
pub const BYTES_KEPT: usize = 4 << 20;

/// What an end is woken by. See [`NetPort::set_waker`].
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A cable: what is sent at one end is received at the other.
///
/// ```
/// use instance_core::net::{self, Frame};
///
/// let (machine, network) = net::link();
/// machine.send(Frame::new(vec![0xff; 60]))?;
/// assert_eq!(network.recv().map(|frame| frame.data.len()), Some(60));
/// drop(machine);
/// assert!(!network.is_connected());
/// # Ok::<(), net::SendError>(())
/// ```
pub fn link() -> (NetPort, NetPort) {
    let (one, other) = cable::ends();
    let port = |end| NetPort(Kind::Cable(Arc::new(end)));
    (port(one), port(other))
}

/// One end of a cable, or a port on a [`Tap`] device of the host's. Clones are the same end, which is unplugged when the
/// last one is dropped.
///
/// Every method may be called from any thread, and none waits for the other end.
#[derive(Clone)]
pub struct NetPort(Kind);

/// What is at the other end.
#[derive(Clone)]
enum Kind {
    /// Another port.
    Cable(Arc<End>),
    /// A device of the host's.
    Tap(Arc<Tap>),
}

impl NetPort {
    /// Sends a frame to the other end.
    ///
    /// What the frame leaves to be done must be among what the other end [takes](Self::peer_takes).
    /// Whoever receives a frame all the same drops it.
    ///
    /// # Errors
    ///
    /// [`Full`](SendError::Full), with the frame, while the other end does not take its frames: to be dropped,
    /// or sent again after a wake-up; [`Disconnected`](SendError::Disconnected) when the other end has gone.
    pub fn send(&self, frame: Frame) -> Result<(), SendError> {
        match &self.0 {
            Kind::Cable(end) => end.send(frame),
            Kind::Tap(tap) => tap.send(&frame),
        }
    }

    /// Sends frames in turn, as far as the other end takes them, which it is woken for once. Says whether it took all;
    /// what is left is to be sent again after a wake-up. What is sent to an end that has gone is lost.
    ///
    /// ```
    /// use instance_core::net::{self, Frame};
    ///
    /// let (machine, network) = net::link();
    /// let mut frames = [60, 61].map(|len| Frame::new(vec![0xff; len])).into();
    /// assert!(machine.send_all(&mut frames) && frames.is_empty());
    /// assert_eq!(network.waiting(), 2);
    /// ```
    pub fn send_all(&self, frames: &mut VecDeque<Frame>) -> bool {
        match &self.0 {
            Kind::Cable(end) => end.send_all(frames),
            Kind::Tap(tap) => {
                frames.drain(..).for_each(|frame| drop(tap.send(&frame)));
                true
            }
        }
    }

    /// The oldest frame that the other end sent, if one waits.
    pub fn recv(&self) -> Option<Frame> {
        match &self.0 {
            Kind::Cable(end) => end.recv(),
            Kind::Tap(tap) => tap.recv(),
        }
    }

    /// How many frames wait to be received. Nobody knows it of a [`Tap`] device's, where it is none.
    pub fn waiting(&self) -> usize {
        match &self.0 {
            Kind::Cable(end) => end.waiting(),
            Kind::Tap(_) => 0,
        }
    }

    /// Sets what is called, in the thread of whoever brings it about, when a frame comes where none waited,
    /// when there is room again after [`Full`](SendError::Full), and when the other end goes. One that is set
    /// is called at once, so that nothing of before is missed. After a wake-up, receive until there is no more:
    /// frames that come while others wait wake nobody.
    ///
    /// It may use this port, must not block, and may be called once more while it is being replaced. Where the port has
    /// a [`descriptor`](Self::descriptor), that says it instead.
    pub fn set_waker(&self, waker: Option<Waker>) {
        match &self.0 {
            Kind::Cable(end) => end.set_waker(waker),
            Kind::Tap(_) => waker.into_iter().for_each(|wake| wake()),
        }
    }

    /// What is readable while a frame waits to be received, and when the other end has gone, where no
    /// [waker](Self::set_waker) is called for them: of a [`Tap`] device.
    pub fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        self.tap().map(|tap| tap.descriptor())
    }

    /// The host's device at the other end, if it is one: a hypervisor may have the host's kernel move its frames.
    pub fn tap(&self) -> Option<&Arc<Tap>> {
        match &self.0 {
            Kind::Cable(_) => None,
            Kind::Tap(tap) => Some(tap),
        }
    }

    fn on_tap(tap: Arc<Tap>) -> Self {
        Self(Kind::Tap(tap))
    }

    /// Says that this end serves streams: a machine at the other end that is plugged in by a [`FrameStream`] is handed to
    /// `server`, and needs no thread of its own.
    pub fn set_stream_server(&self, server: Option<StreamServer>) {
        if let Kind::Cable(end) = &self.0 {
            end.set_stream_server(server);
        }
    }

    /// What serves streams at the other end, if that does.
    fn stream_server(&self) -> Option<StreamServer> {
        match &self.0 {
            Kind::Cable(end) => end.peer_stream_server(),
            Kind::Tap(_) => None,
        }
    }

    /// Drops the frames that wait to be received.
    ///
    /// ```
    /// use instance_core::net::{self, Frame};
    ///
    /// let (machine, network) = net::link();
    /// network.send(Frame::new(vec![0xff; 60]))?;
    /// machine.discard();
    /// assert!(machine.recv().is_none());
    /// # Ok::<(), net::SendError>(())
    /// ```
    pub fn discard(&self) {
        match &self.0 {
            Kind::Cable(end) => end.discard(),
            Kind::Tap(tap) => tap.discard(),
        }
    }

    /// Says what this end takes from now on; nothing, before it has said so.
    pub fn set_takes(&self, takes: Offloads) {
        match &self.0 {
            Kind::Cable(end) => end.set_takes(takes),
            Kind::Tap(tap) => tap.set_takes(takes),
        }
    }

    /// What this end has said that it takes.
    pub fn takes(&self) -> Offloads {
        match &self.0 {
            Kind::Cable(end) => end.takes(),
            Kind::Tap(tap) => tap.takes(),
        }
    }

    /// What the other end takes.
    pub fn peer_takes(&self) -> Offloads {
        match &self.0 {
            Kind::Cable(end) => end.peer_takes(),
            Kind::Tap(_) => Offloads::ALL,
        }
    }

    /// Whether the other end is there.
    pub fn is_connected(&self) -> bool {
        match &self.0 {
            Kind::Cable(end) => end.is_connected(),
            Kind::Tap(tap) => tap.is_there(),
        }
    }
}

impl fmt::Debug for NetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Cable(end) => {
                f.debug_struct("NetPort").field("waiting", &end.waiting()).finish_non_exhaustive()
            }
            Kind::Tap(tap) => f.debug_struct("NetPort").field("tap", &tap.name()).finish_non_exhaustive(),
        }
    }
}

/// Why a frame was not sent. See [`NetPort::send`].
#[derive(Debug, PartialEq, Eq)]
pub enum SendError {
    /// The other end does not take its frames; here is the frame again.
    Full(Frame),
    /// There is no other end any more.
    Disconnected,
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "the other end of the cable does not take its frames",
            Self::Disconnected => "the cable has no other end",
        })
    }
}

impl std::error::Error for SendError {}

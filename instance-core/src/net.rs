//! Network ports: how frames pass between a machine and the network that it is plugged into.
//!
//! A [`link`] is a cable with two equal ends. A machine holds one as a [`NetPort`] of its
//! [`MachineSpec`](crate::machine::MachineSpec); who holds the other is the network: a switch, a test, another
//! machine. Frames wait in a bounded queue each way, so neither end ever waits for the other.

mod frame;
mod limits;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::frame::{Checksum, Frame, InvalidMacAddress, MacAddress, Offloads, Protocol, Segmentation};
pub use self::limits::FrameLimits;

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
    let cable = Arc::new(Cable::default());
    let end = |side| NetPort(Arc::new(End { cable: cable.clone(), side }));
    (end(0), end(1))
}

/// One end of a cable. Clones are the same end, which is unplugged when the last one is dropped.
///
/// Every method may be called from any thread, and none blocks.
#[derive(Clone)]
pub struct NetPort(Arc<End>);

struct End {
    cable: Arc<Cable>,
    side: usize,
}

#[derive(Default)]
struct Cable(Mutex<[Side; 2]>);

/// What is known of one end.
#[derive(Default)]
struct Side {
    /// The frames that it is to receive.
    inbox: VecDeque<Frame>,
    /// Their bytes.
    bytes: usize,
    /// Whether the other end was told that there is no room in the inbox.
    turned_away: bool,
    gone: bool,
    takes: Offloads,
    waker: Option<Waker>,
}

impl Cable {
    fn lock(&self) -> MutexGuard<'_, [Side; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Side {
    fn has_room_for(&self, frame: &Frame) -> bool {
        self.inbox.is_empty() || self.inbox.len() < FRAMES_KEPT && self.bytes + frame.data.len() <= BYTES_KEPT
    }

    /// Whether so much room has been made that it is worth waking the sender.
    fn is_half_empty(&self) -> bool {
        self.inbox.len() <= FRAMES_KEPT / 2 && self.bytes <= BYTES_KEPT / 2
    }
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
        let wake = {
            let mut sides = self.0.cable.lock();
            let to = &mut sides[1 - self.0.side];
            if to.gone {
                return Err(SendError::Disconnected);
            }
            if !to.has_room_for(&frame) {
                to.turned_away = true;
                return Err(SendError::Full(frame));
            }
            let first = to.inbox.is_empty();
            to.bytes += frame.data.len();
            to.inbox.push_back(frame);
            to.waker.clone().filter(|_| first)
        };
        if let Some(wake) = wake {
            wake();
        }
        Ok(())
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
        let wake = {
            let mut sides = self.0.cable.lock();
            let to = &mut sides[1 - self.0.side];
            if to.gone {
                frames.clear();
                return true;
            }
            let was_empty = to.inbox.is_empty();
            while frames.front().is_some_and(|frame| to.has_room_for(frame)) {
                let Some(frame) = frames.pop_front() else { break };
                to.bytes += frame.data.len();
                to.inbox.push_back(frame);
            }
            to.turned_away |= !frames.is_empty();
            to.waker.clone().filter(|_| was_empty && !to.inbox.is_empty())
        };
        if let Some(wake) = wake {
            wake();
        }
        frames.is_empty()
    }

    /// The oldest frame that the other end sent, if one waits.
    pub fn recv(&self) -> Option<Frame> {
        let (frame, wake) = {
            let mut sides = self.0.cable.lock();
            let own = &mut sides[self.0.side];
            let frame = own.inbox.pop_front()?;
            own.bytes -= frame.data.len();
            let make_known = own.turned_away && own.is_half_empty();
            if make_known {
                own.turned_away = false;
            }
            (frame, sides[1 - self.0.side].waker.clone().filter(|_| make_known))
        };
        if let Some(wake) = wake {
            wake();
        }
        Some(frame)
    }

    /// How many frames wait to be received.
    pub fn waiting(&self) -> usize {
        self.0.cable.lock()[self.0.side].inbox.len()
    }

    /// Sets what is called, in the thread of whoever brings it about, when a frame comes where none waited,
    /// when there is room again after [`Full`](SendError::Full), and when the other end goes. One that is set
    /// is called at once, so that nothing of before is missed. After a wake-up, receive until there is no more:
    /// frames that come while others wait wake nobody.
    ///
    /// It may use this port, must not block, and may be called once more while it is being replaced.
    pub fn set_waker(&self, waker: Option<Waker>) {
        let replaced = std::mem::replace(&mut self.0.cable.lock()[self.0.side].waker, waker.clone());
        drop(replaced); // outside the lock: it may hold the last clone of a port
        if let Some(wake) = waker {
            wake();
        }
    }

    /// Says what this end takes from now on; nothing, before it has said so.
    pub fn set_takes(&self, takes: Offloads) {
        self.0.cable.lock()[self.0.side].takes = takes;
    }

    /// What this end has said that it takes.
    pub fn takes(&self) -> Offloads {
        self.0.cable.lock()[self.0.side].takes
    }

    /// What the other end takes.
    pub fn peer_takes(&self) -> Offloads {
        self.0.cable.lock()[1 - self.0.side].takes
    }

    /// Whether the other end is there.
    pub fn is_connected(&self) -> bool {
        !self.0.cable.lock()[1 - self.0.side].gone
    }
}

impl fmt::Debug for NetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetPort").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let (inbox, own_waker, wake) = {
            let mut sides = self.cable.lock();
            let own = &mut sides[self.side];
            own.gone = true;
            own.bytes = 0;
            let left = (std::mem::take(&mut own.inbox), own.waker.take());
            (left.0, left.1, sides[1 - self.side].waker.clone())
        };
        drop((inbox, own_waker)); // outside the lock: the waker may hold the last clone of a port
        if let Some(wake) = wake {
            wake();
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn counter(port: &NetPort) -> Arc<AtomicUsize> {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        port.set_waker(Some(Arc::new(move || {
            counted.fetch_add(1, SeqCst);
        })));
        count.store(0, SeqCst);
        count
    }

    #[test]
    fn frames_come_in_order_and_wake_once() {
        let (a, b) = link();
        let woken = counter(&b);
        for n in 0..10 {
            a.send(Frame::new(vec![n])).expect("there is room");
        }
        assert_eq!((b.waiting(), woken.load(SeqCst)), (10, 1));
        let got: Vec<u8> = std::iter::from_fn(|| b.recv()).map(|frame| frame.data[0]).collect();
        assert_eq!(got, (0..10).collect::<Vec<u8>>());
        a.send(Frame::new(vec![])).expect("there is room");
        assert_eq!(woken.load(SeqCst), 2);
    }

    #[test]
    fn a_full_cable_gives_the_frame_back_and_says_when_there_is_room() {
        // Each length fills the cable to the last frame or byte.
        for (len, most) in [(1, FRAMES_KEPT), (64 << 10, BYTES_KEPT / (64 << 10)), (BYTES_KEPT + 1, 1)] {
            let (a, b) = link();
            let woken = counter(&a);
            let sent = (0..).take_while(|_| a.send(Frame::new(vec![7; len])).is_ok()).count();
            assert_eq!(sent, most, "frames of {len} bytes");
            assert!(
                matches!(a.send(Frame::new(vec![7; 5])), Err(SendError::Full(frame)) if frame.data.len() == 5)
            );
            assert_eq!(woken.load(SeqCst), 0);
            while b.recv().is_some() {}
            assert_eq!(woken.load(SeqCst), 1, "frames of {len} bytes");
            a.send(Frame::new(vec![7; len])).expect("there is room again");
        }
    }

    #[test]
    fn many_frames_wake_once_and_what_finds_no_room_stays() {
        let (a, b) = link();
        let (woken, has_room) = (counter(&b), counter(&a));
        let mut frames: VecDeque<_> = (0..FRAMES_KEPT + 3).map(|n| Frame::new(vec![n as u8])).collect();
        assert!(!a.send_all(&mut frames));
        assert_eq!((frames.len(), woken.load(SeqCst), has_room.load(SeqCst)), (3, 1, 0));
        assert!(!a.send_all(&mut frames), "there is no room yet");
        while b.recv().is_some() {}
        assert_eq!(has_room.load(SeqCst), 1);
        assert!(a.send_all(&mut frames) && a.send_all(&mut frames));
        assert_eq!((b.recv(), woken.load(SeqCst)), (Some(Frame::new(vec![FRAMES_KEPT as u8])), 2));
        drop(b);
        assert!(a.send_all(&mut [Frame::default()].into()), "it is lost");
    }

    #[test]
    fn an_end_that_goes_is_noticed() {
        let (a, b) = link();
        let woken = counter(&a);
        let other = b.clone();
        drop(b);
        assert!(a.is_connected());
        drop(other);
        assert_eq!((a.is_connected(), woken.load(SeqCst)), (false, 1));
        assert_eq!(a.send(Frame::new(vec![])), Err(SendError::Disconnected));
    }

    #[test]
    fn a_waker_may_use_its_port_and_hold_it() {
        let (a, b) = link();
        let echo = b.clone();
        b.set_waker(Some(Arc::new(move || {
            while let Some(frame) = echo.recv() {
                let _ = echo.send(frame);
            }
        })));
        a.send(Frame::new(vec![1, 2, 3])).expect("there is room");
        assert_eq!(a.recv().map(|frame| frame.data), Some(vec![1, 2, 3]));
        b.set_waker(None); // what held the last clone but one goes with it
        drop(b);
        assert!(!a.is_connected());
    }

    #[test]
    fn what_was_sent_before_a_waker_was_set_is_not_missed() {
        let (a, b) = link();
        a.send(Frame::new(vec![])).expect("there is room");
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        b.set_waker(Some(Arc::new(move || {
            counted.fetch_add(1, SeqCst);
        })));
        assert_eq!(count.load(SeqCst), 1);
    }
}

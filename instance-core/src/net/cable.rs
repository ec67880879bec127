//! A cable: a bounded queue of frames each way, and who is woken for them.

use std::collections::VecDeque;
use std::iter;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BYTES_KEPT, FRAMES_KEPT, Frame, Offloads, SendError, StreamServer, Waker};

/// One end of a cable, which is unplugged when it is dropped.
pub(super) struct End {
    cable: Arc<Cable>,
    side: usize,
}

/// Both ends.
pub(super) fn ends() -> (End, End) {
    let cable = Arc::new(Cable::default());
    (End { cable: cable.clone(), side: 0 }, End { cable, side: 1 })
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
    stream_server: Option<StreamServer>,
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

impl End {
    pub(super) fn send(&self, frame: Frame) -> Result<(), SendError> {
        let wake = {
            let mut sides = self.cable.lock();
            let to = &mut sides[1 - self.side];
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

    pub(super) fn send_all(&self, frames: &mut VecDeque<Frame>) -> bool {
        let wake = {
            let mut sides = self.cable.lock();
            let to = &mut sides[1 - self.side];
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

    pub(super) fn recv(&self) -> Option<Frame> {
        let (frame, wake) = {
            let mut sides = self.cable.lock();
            let own = &mut sides[self.side];
            let frame = own.inbox.pop_front()?;
            own.bytes -= frame.data.len();
            let make_known = own.turned_away && own.is_half_empty();
            if make_known {
                own.turned_away = false;
            }
            (frame, sides[1 - self.side].waker.clone().filter(|_| make_known))
        };
        if let Some(wake) = wake {
            wake();
        }
        Some(frame)
    }

    pub(super) fn waiting(&self) -> usize {
        self.cable.lock()[self.side].inbox.len()
    }

    pub(super) fn set_waker(&self, waker: Option<Waker>) {
        let replaced = std::mem::replace(&mut self.cable.lock()[self.side].waker, waker.clone());
        drop(replaced); // outside the lock: it may hold the last clone of a port
        if let Some(wake) = waker {
            wake();
        }
    }

    pub(super) fn set_stream_server(&self, server: Option<StreamServer>) {
        let replaced = std::mem::replace(&mut self.cable.lock()[self.side].stream_server, server);
        drop(replaced); // outside the lock, as a waker
    }

    pub(super) fn peer_stream_server(&self) -> Option<StreamServer> {
        self.cable.lock()[1 - self.side].stream_server.clone()
    }

    pub(super) fn set_takes(&self, takes: Offloads) {
        self.cable.lock()[self.side].takes = takes;
    }

    pub(super) fn takes(&self) -> Offloads {
        self.cable.lock()[self.side].takes
    }

    pub(super) fn peer_takes(&self) -> Offloads {
        self.cable.lock()[1 - self.side].takes
    }

    pub(super) fn is_connected(&self) -> bool {
        !self.cable.lock()[1 - self.side].gone
    }

    /// Drops the frames that wait now.
    pub(super) fn discard(&self) {
        let waiting = self.waiting();
        iter::from_fn(|| self.recv()).take(waiting).for_each(drop);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let (left, wake) = {
            let mut sides = self.cable.lock();
            let own = &mut sides[self.side];
            own.gone = true;
            own.bytes = 0;
            let left = (std::mem::take(&mut own.inbox), own.waker.take(), own.stream_server.take());
            (left, sides[1 - self.side].waker.clone())
        };
        drop(left); // outside the lock: the waker may hold the last clone of a port
        if let Some(wake) = wake {
            wake();
        }
    }
}

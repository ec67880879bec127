//! How a machine is given its frames: by one thread at a time, in turn, and without waiting for each other. The machine
//! may answer a frame in the thread that gives it, and the answer may lead to another for the same machine.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use instance_core::net::{Frame, NetPort, SendError};

use crate::backlog::{Backlog, Sender};

/// How many frames that waited a thread gives before it leaves the others to the edge: who sends one is not held up by those
/// who flood the same machine.
const AT_ONCE: usize = 64;

pub(crate) struct Outlet {
    cable: NetPort,
    /// Never held while the machine is given something.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    backlog: Backlog,
    /// A thread gives the machine frames, and looks at what waits before it stops.
    is_giving: bool,
    /// The machine has made room, which nobody has looked at yet. Not set where nothing waits for it.
    has_room: bool,
}

/// What became of frames that waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Given {
    /// The machine was given some.
    pub(crate) some: bool,
    /// Others wait for which it may have room, and somebody has to [catch up](Outlet::catch_up).
    pub(crate) is_behind: bool,
}

impl Outlet {
    pub(crate) fn new(cable: NetPort) -> Self {
        Self { cable, state: Mutex::default() }
    }

    /// Gives the machine frames in their order, or has them wait for their turn, and leaves those that there is no room for.
    pub(crate) fn give(&self, sender: Sender, frames: &mut VecDeque<Frame>) -> Given {
        let mut state = self.lock();
        if state.is_giving || !state.backlog.is_empty() {
            state.backlog.fill(sender, frames);
            let is_left_to_others = state.is_giving || !state.has_room;
            return if is_left_to_others { Given::default() } else { self.give_on(state) };
        }
        state.is_giving = true;
        drop(state);
        let took_all = self.cable.send_all(frames);
        let mut state = self.lock();
        state.backlog.fill(sender, frames);
        state.has_room |= took_all;
        self.give_on(state)
    }

    /// Gives the machine what has waited for it, as far as it has room.
    pub(crate) fn catch_up(&self) -> Given {
        let mut state = self.lock();
        if !state.is_giving && state.backlog.is_empty() {
            return Given::default();
        }
        state.has_room = true;
        if state.is_giving { Given::default() } else { self.give_on(state) }
    }

    /// Goes on in the thread that gives, until there is nothing more or no room, or it has done enough.
    fn give_on<'a>(&'a self, mut state: MutexGuard<'a, State>) -> Given {
        state.is_giving = true;
        let mut gave = 0;
        while gave < AT_ONCE && mem::take(&mut state.has_room) {
            while let Some((sender, frame)) = state.backlog.next() {
                drop(state);
                let refused = self.offer(frame).err();
                state = self.lock();
                if let Some(frame) = refused {
                    state.backlog.put_back(sender, frame);
                    break;
                }
                gave += 1;
                if gave == AT_ONCE {
                    state.has_room = true;
                    break;
                }
            }
        }
        state.is_giving = false;
        state.has_room &= !state.backlog.is_empty();
        Given { some: gave > 0, is_behind: state.has_room }
    }

    /// Gives the machine a frame, which comes back if it has no room.
    fn offer(&self, frame: Frame) -> Result<(), Frame> {
        match self.cable.send(frame) {
            Err(SendError::Full(frame)) => Err(frame),
            Ok(()) | Err(SendError::Disconnected) => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use instance_core::net::{self, FRAMES_KEPT};

    use super::*;

    const SENDER: Sender = Sender::Network;

    fn frames(count: usize) -> VecDeque<Frame> {
        (0..count).map(|n| Frame::new(vec![n as u8; 60])).collect()
    }

    #[test]
    fn what_a_machine_brings_about_while_it_is_given_a_frame_comes_behind_it() {
        let (machine, network) = net::link();
        let outlet = Arc::new(Outlet::new(network));
        let (again, left) = (outlet.clone(), AtomicUsize::new(3));
        let port = machine.clone();
        machine.set_waker(Some(Arc::new(move || {
            while let Some(frame) = port.recv() {
                let depth = left.load(Ordering::Relaxed);
                assert_eq!(frame.data.len(), 60 + 3 - depth);
                if depth > 0 {
                    left.store(depth - 1, Ordering::Relaxed);
                    again.give(SENDER, &mut [Frame::new(vec![0; 60 + 4 - depth])].into());
                    assert_eq!(port.waiting(), 0, "it waits for its turn");
                }
            }
        })));
        assert_eq!(outlet.give(SENDER, &mut frames(1)), Given { some: true, is_behind: false });
        assert!(!outlet.lock().is_giving && outlet.lock().backlog.is_empty());
        machine.set_waker(None);
    }

    /// It may never end what others have for the same machine.
    #[test]
    fn who_gives_one_frame_does_not_give_all_that_come_meanwhile() {
        let (machine, network) = net::link();
        let outlet = Arc::new(Outlet::new(network));
        let (again, port, taken) = (outlet.clone(), machine.clone(), Arc::new(AtomicUsize::new(0)));
        let count = taken.clone();
        machine.set_waker(Some(Arc::new(move || {
            while port.recv().is_some() {
                if count.fetch_add(1, Ordering::Relaxed) < 1000 {
                    again.give(SENDER, &mut frames(1));
                }
            }
        })));
        let behind = Given { some: true, is_behind: true };
        assert_eq!(outlet.give(SENDER, &mut frames(1)), behind);
        assert_eq!(taken.load(Ordering::Relaxed), 1 + AT_ONCE);
        // Who comes next goes on, and what comes with it has its turn.
        assert_eq!(outlet.give(SENDER, &mut frames(1)), behind);
        assert_eq!(taken.load(Ordering::Relaxed), 1 + 2 * AT_ONCE);
        while outlet.catch_up().is_behind {}
        assert_eq!(taken.load(Ordering::Relaxed), 1002);
        assert!(!outlet.lock().has_room && outlet.lock().backlog.is_empty());
        machine.set_waker(None);
    }

    #[test]
    fn what_there_was_no_room_for_comes_when_there_is_and_in_its_order() {
        let (machine, network) = net::link();
        let outlet = Arc::new(Outlet::new(network.clone()));
        let gives_on = outlet.clone();
        network.set_waker(Some(Arc::new(move || while gives_on.catch_up().is_behind {})));
        let mut many: VecDeque<_> = (0..FRAMES_KEPT + 100).map(|n| Frame::new(vec![0; 60 + n])).collect();
        outlet.give(SENDER, &mut many);
        assert!(!many.is_empty() && many.len() < 100, "some wait and some are left: {}", many.len());
        let kept = FRAMES_KEPT + 100 - many.len();
        for n in 0..kept {
            assert_eq!(machine.recv().map(|frame| frame.data.len()), Some(60 + n));
        }
        assert!(machine.recv().is_none());
        network.set_waker(None);
    }

    /// With threads that give, and a machine that takes at times in theirs and at times in its own.
    #[test]
    fn threads_that_give_at_once_leave_nothing_behind() {
        let (machine, network) = net::link();
        let outlet = Arc::new(Outlet::new(network.clone()));
        let gives_on = outlet.clone();
        network.set_waker(Some(Arc::new(move || while gives_on.catch_up().is_behind {})));
        let given = AtomicUsize::new(0);
        let mut taken = 0;
        thread::scope(|scope| {
            let threads: Vec<_> = (0..4u8)
                .map(|n| {
                    let (outlet, given) = (&outlet, &given);
                    scope.spawn(move || {
                        for _ in 0..5000 {
                            let mut one = [Frame::new(vec![n; 60])].into();
                            let mut behind = outlet.give(Sender::Peer([10, 0, 0, n].into()), &mut one);
                            while behind.is_behind {
                                behind = outlet.catch_up();
                            }
                            given.fetch_add(1 - one.len(), Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            while !threads.iter().all(thread::ScopedJoinHandle::is_finished) {
                taken += std::iter::from_fn(|| machine.recv()).count();
            }
        });
        taken += std::iter::from_fn(|| machine.recv()).count();
        assert_eq!(taken, given.into_inner());
        assert!(!outlet.lock().is_giving && outlet.lock().backlog.is_empty());
        network.set_waker(None);
    }
}

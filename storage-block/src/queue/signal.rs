//! The descriptor by which a queue says that there is something to collect.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::{Error, Result};

/// An event counter that can be polled.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    pub(super) fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        eventfd(0, flags).map(Self).map_err(|e| failed(e, "an event descriptor"))
    }

    pub(super) fn signal(&self) {
        // It fails only when it is full of signals already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The event counter, and for a disk with limits a timer beside it.
#[derive(Debug)]
pub(super) struct Signal {
    pub(super) event: std::sync::Arc<Event>,
    timer: Option<Timer>,
    /// Somebody may wait for the descriptor, so it has to tell the truth.
    watched: bool,
}

#[derive(Debug)]
struct Timer {
    timer: OwnedFd,
    /// Ready when the event counter or the timer is.
    both: OwnedFd,
}

impl Signal {
    pub(super) fn new(with_timer: bool) -> Result<Self> {
        let event = Event::new()?;
        let timer = if with_timer { Some(Timer::new(&event)?) } else { None };
        Ok(Self { event: event.into(), timer, watched: false })
    }

    pub(super) fn watched(&self) -> bool {
        self.watched
    }

    pub(super) fn set_watched(&mut self, watched: bool) {
        self.watched = watched;
    }

    /// The descriptor to wait for.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_ref().map_or(self.event.fd(), |timer| timer.both.as_fd())
    }

    /// Forgets what was signalled; done before looking for it.
    pub(super) fn reset(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(self.event.fd(), &mut count);
        if let Some(timer) = &self.timer {
            let _ = rustix::io::read(&timer.timer, &mut count);
        }
    }

    /// Signals once more after a while; once is enough for several calls.
    pub(super) fn after(&self, delay: Duration) {
        let Some(timer) = &self.timer else { return };
        let delay = delay.max(Duration::from_nanos(1)); // zero would stop the timer
        let it_value = Timespec { tv_sec: delay.as_secs() as i64, tv_nsec: delay.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // It cannot fail for a timer and a time that are right.
        let _ = timerfd_settime(&timer.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// Waits until something is signalled. It may return for nothing.
    pub(super) fn wait(&self) {
        let _ = poll(&mut [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)], None);
    }
}

impl Timer {
    fn new(event: &Event) -> Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|e| failed(e, "a timer"))?;
        let both =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed(e, "an epoll descriptor"))?;
        for fd in [event.fd(), timer.as_fd()] {
            epoll::add(&both, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
                .map_err(|e| failed(e, "an epoll descriptor"))?;
        }
        Ok(Self { timer, both })
    }
}

fn failed(error: rustix::io::Errno, what: &str) -> Error {
    Error::io(error.into(), format!("cannot make {what} for a disk's queue"))
}

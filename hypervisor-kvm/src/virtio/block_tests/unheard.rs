//! When a driver is asked to notify of what it adds.

use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// As many as have to be under way, and to have ended, for a driver not to be asked at once.
const MANY: u16 = 8;

impl Guest {
    /// One whose driver goes by event indices, where so many requests have ended.
    fn listening(disk: &Disk, queues: usize, ended: u16) -> Self {
        let block = Block::new(disk.clone(), "vol-1", queues);
        let mut guest = Self(Driver::with_event_indices(block, queues));
        guest.end(ended);
        guest
    }

    /// Has so many requests end.
    fn end(&mut self, count: u16) {
        (0..count).for_each(|n| self.offer(0, n, IN, 1));
        self.serve(0, count);
    }

    /// Begins so many requests that do not end.
    fn begin(&mut self, count: u16) {
        (0..count).for_each(|n| self.offer(0, n, IN, 0));
        self.rest();
    }

    fn rest(&mut self) {
        while self.0.step(0) != Step::Idle {}
    }

    /// Whether the driver has been asked to notify, and whether the device waits for nothing but that and ends.
    fn is_heard(&self) -> (bool, bool) {
        (self.0.is_asked(0), self.0.device.due_in().is_none())
    }

    /// Waits until the device has to look at its queues, and has it look.
    fn look_when_due(&mut self) {
        while self.0.device.due_in().is_some_and(|due_in| !due_in.is_zero()) {
            thread::yield_now();
        }
        self.rest();
    }
}

#[test]
fn a_driver_is_asked_for_more_at_once_unless_many_end_soon() {
    for (ended, requests, at_once) in
        [(MANY, 1, true), (MANY, 7, true), (MANY, 8, false), (MANY, 19, false), (MANY - 1, 19, true)]
    {
        let (disk, _did, go_on) = gated(1);
        let mut guest = Guest::listening(&disk, 1, ended);
        guest.begin(requests);
        let at_first = guest.is_heard();
        // Where none ends in time, it is asked.
        guest.look_when_due();
        let later = guest.is_heard();
        // What it adds without being asked is seen when one ends.
        guest.offer(0, requests, IN, 1);
        drop(go_on);
        guest.serve(0, ended + requests + 1);
        assert!((0..=requests).all(|n| guest.status(0, n) == OK), "{requests}");
        assert_eq!((at_first, later), ((at_once, at_once), (true, true)), "{requests} after {ended}");
    }
}

#[test]
fn one_request_after_the_other_does_not_wait_for_slow_ones_each_time() {
    let (disk, _did, go_on) = gated(1);
    let mut guest = Guest::listening(&disk, 1, MANY);
    guest.begin(MANY);
    guest.look_when_due();
    let mut unheard = 0;
    let heard_then = (0..3 * MANY).filter(|n| {
        guest.offer(0, MANY, IN, 1);
        guest.serve(0, MANY + n + 1);
        guest.rest();
        if guest.is_heard() == (false, false) {
            unheard += 1;
            guest.look_when_due();
        }
        guest.is_heard() == (true, true)
    });
    let heard_then = heard_then.count() as u16;
    drop(go_on);
    // Where one ends so late that the driver was asked before, it is heard.
    assert!(unheard <= 3, "it waited {unheard} times");
    assert_eq!(heard_then, 3 * MANY);
}

/// That other queues have the device look at all of them.
#[test]
fn a_driver_that_is_not_heard_is_so_for_the_whole_time() {
    let in_time = (0..1000).find_map(|_| {
        let (disk, _did, go_on) = gated(1);
        let mut guest = Guest::listening(&disk, 2, MANY);
        (0..MANY).for_each(|n| guest.offer(0, n, IN, 0));
        guest.0.step(0);
        let begun = Instant::now();
        guest.rest();
        guest.0.step(1);
        guest.rest();
        let heard = guest.is_heard();
        // Unless the machine had other things to do.
        let in_time = begun.elapsed() < Duration::from_micros(50);
        drop(go_on);
        in_time.then_some(heard)
    });
    assert_eq!(in_time, Some((false, false)));
}

/// It notifies anyway.
#[test]
fn a_driver_without_event_indices_is_always_heard() {
    let (disk, _did, go_on) = gated(1);
    let mut guest = Guest::new(&disk, 1, 0);
    guest.end(MANY);
    guest.begin(MANY);
    let due_in = guest.0.device.due_in();
    drop(go_on);
    assert_eq!(due_in, None);
}

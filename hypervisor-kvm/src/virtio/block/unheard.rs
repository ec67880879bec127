//! When a driver is not asked to notify: what is under way ends soon, and has its queue looked at anyway, while a driver
//! that was asked leaves the guest for what it adds then.

use std::time::{Duration, Instant};

/// Where so many requests are under way, and so many have ended with no [`UNHEARD`] in between in which none did, one ends
/// soon.
const MANY: u64 = 8;
/// How long a driver is at most not heard because of that.
const UNHEARD: Duration = Duration::from_micros(50);

/// The ends of a device's requests.
#[derive(Debug, Default)]
pub(super) struct Ends {
    count: u64,
    /// How many there were when a window last ran out. Requests that take long say nothing of how soon a driver that waits
    /// for another one is heard, which then has to wait for the whole window.
    at_last: u64,
}

/// The time in which the driver of a queue is not heard.
#[derive(Debug)]
pub(super) struct Window {
    until: Instant,
    /// How many requests had ended when it began.
    ends: u64,
}

impl Ends {
    /// One has ended.
    pub(super) fn add(&mut self) {
        self.count = self.count.wrapping_add(1);
    }

    /// Whether one of so many requests ends soon.
    pub(super) fn one_is_near(&self, under_way: usize) -> bool {
        under_way as u64 >= MANY && self.count.wrapping_sub(self.at_last) >= MANY
    }

    /// A window that begins.
    pub(super) fn window(&self) -> Window {
        Window { until: Instant::now() + UNHEARD, ends: self.count }
    }

    /// Its queue is being looked at: what is left of the window, if that is not over. It runs out where none has ended.
    pub(super) fn look(&mut self, window: Window) -> Option<Window> {
        if window.ends != self.count {
            return None;
        }
        if Instant::now() < window.until {
            return Some(window);
        }
        self.at_last = self.count;
        None
    }
}

impl Window {
    /// How long until its queue has to be looked at.
    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

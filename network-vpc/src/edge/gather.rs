//! When frames of a guest's are gathered: who sends fast would otherwise wake the edge for each frame or two, which costs
//! the guest more than the frame, and the edge as much for few frames as for many.

use std::time::{Duration, Instant};

/// For how long they are. The host rounds it up.
const PAUSE: Duration = Duration::from_micros(50);

/// How many bytes come in a microsecond from who sends fast, and how often that is looked at.
const FAST: u128 = 50;
const LOOKED_AT: Duration = Duration::from_micros(200);

/// What came at once is enough if it is so much.
const ENOUGH: usize = 32 << 10;

/// How fast the guest sends.
pub(super) struct Gather {
    since: Instant,
    bytes: usize,
    is_fast: bool,
}

impl Gather {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0, is_fast: false }
    }

    /// So many bytes have come from the guest since it was asked last. Says for how long more are to be gathered.
    pub(super) fn pause(&mut self, came: usize, now: Instant) -> Option<Duration> {
        self.bytes += came;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= LOOKED_AT {
            self.is_fast = self.bytes as u128 >= FAST * elapsed.as_micros();
            (self.since, self.bytes) = (now, 0);
        }
        (self.is_fast && came < ENOUGH).then_some(PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_gathered_of_who_sends_fast_and_little_at_once() {
        // Turns of so many bytes each, so many microseconds apart, and whether the last is followed by a pause.
        for (came, apart, expect) in [
            (1500, 10, true),
            (1500, 40, false),
            (6000, 100, true),
            (4000, 100, false),
            (31_000, 300, true),
            (ENOUGH, 10, false),
            (60, 1, true),
            (60, 10, false),
            (10_000, 5000, false),
        ] {
            let begin = Instant::now();
            let mut gather = Gather::new(begin);
            let pauses = (1..=500).map(|n| gather.pause(came, begin + Duration::from_micros(apart * n)));
            assert_eq!(pauses.last().flatten(), expect.then_some(PAUSE), "{came} bytes each {apart} us");
        }
    }

    #[test]
    fn who_has_sent_fast_is_heard_at_once_when_that_is_over() {
        let begin = Instant::now();
        let mut gather = Gather::new(begin);
        assert_eq!(gather.pause(1500, begin), None, "the first frame waits for nothing");
        let at = |micros| begin + Duration::from_micros(micros);
        assert_eq!(gather.pause(30_000, at(250)), Some(PAUSE));
        assert_eq!(gather.pause(0, at(300)), Some(PAUSE));
        assert_eq!(gather.pause(60, at(500)), None);
    }
}

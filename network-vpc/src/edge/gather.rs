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
    /// Something came in the turn before.
    came: bool,
}

impl Gather {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0, is_fast: false, came: false }
    }

    /// So many bytes have come from the guest in this turn. Says for how long more are to be gathered: not by who waits
    /// for an answer between what it sends, which a turn shows in which nothing comes.
    pub(super) fn pause(&mut self, came: usize, now: Instant) -> Option<Duration> {
        self.bytes += came;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= LOOKED_AT {
            self.is_fast = self.bytes as u128 >= FAST * elapsed.as_micros();
            (self.since, self.bytes) = (now, 0);
        }
        let came_before = std::mem::replace(&mut self.came, came > 0);
        (self.is_fast && came_before && (1..ENOUGH).contains(&came)).then_some(PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_gathered_of_who_sends_fast_and_little_at_once() {
        // Turns of so many bytes, over and over, so many microseconds apart, and whether each of the last is followed by a
        // pause or none is.
        let check = |came: &[usize], apart: u64, expect: bool| {
            let begin = Instant::now();
            let mut gather = Gather::new(begin);
            let turns = (1..).zip(came.iter().cycle()).take(500 * came.len());
            let pauses: Vec<_> = turns
                .map(|(n, came)| gather.pause(*came, begin + Duration::from_micros(apart * n)))
                .collect();
            let last = &pauses[pauses.len() - came.len()..];
            assert!(
                last.iter().all(|pause| *pause == expect.then_some(PAUSE)),
                "{came:?} each {apart} us: {last:?}"
            );
        };
        check(&[1500], 10, true);
        check(&[1500], 40, false);
        check(&[6000], 100, true);
        check(&[4000], 100, false);
        check(&[31_000], 300, true);
        check(&[ENOUGH], 10, false);
        check(&[60], 1, true);
        check(&[60], 10, false);
        check(&[10_000], 5000, false);
        // Who sends when it is answered.
        check(&[30_000, 0], 100, false);
        check(&[30_000, 0, 0], 50, false);
    }

    #[test]
    fn who_has_sent_fast_is_heard_at_once_when_that_is_over() {
        let begin = Instant::now();
        let mut gather = Gather::new(begin);
        assert_eq!(gather.pause(1500, begin), None, "the first frame waits for nothing");
        let at = |micros| begin + Duration::from_micros(micros);
        assert_eq!(gather.pause(30_000, at(250)), Some(PAUSE));
        assert_eq!(gather.pause(0, at(300)), None, "there is nothing to gather");
        assert_eq!(gather.pause(1500, at(310)), None, "the first frame again");
        assert_eq!(gather.pause(1500, at(320)), Some(PAUSE));
        assert_eq!(gather.pause(60, at(1500)), None);
    }
}

//! A token bucket: a number that grows with time, up to a limit, and that requests take from.
//!
//! It has no clock; every call says what time it is. Amounts are counted in billionths of a token, so that rates and
//! nanoseconds multiply to whole numbers and nothing is ever lost to rounding.

use std::time::Duration;

use super::Rate;

const TOKEN: i128 = 1_000_000_000;

#[derive(Debug, Clone)]
pub(super) struct Bucket {
    rate: Rate,
    /// Below zero where a request has taken more than there was.
    level: i128,
    /// When `level` was right.
    at: Duration,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(rate: Rate, now: Duration) -> Self {
        Self { rate, level: i128::from(rate.burst) * TOKEN, at: now }
    }

    /// Goes on at another rate, with what there is.
    pub(super) fn set(&mut self, rate: Rate, now: Duration) {
        self.refill(now);
        self.rate = rate;
        self.level = self.level.min(i128::from(rate.burst) * TOKEN);
    }

    /// Whether a request may pass, or how long until one may. One passes when there is a whole token, whatever
    /// its own cost: what it takes beyond what there is, later ones wait for. So a large request is
    /// not kept out by a crowd of small ones.
    pub(super) fn ready(&mut self, now: Duration) -> Result<(), Duration> {
        self.refill(now);
        let missing = TOKEN - self.level;
        if missing <= 0 {
            return Ok(());
        }
        let nanos = (missing as u128).div_ceil(u128::from(self.rate.per_second));
        Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Takes what a request costs.
    pub(super) fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * TOKEN;
    }

    /// Takes it back that a request has taken.
    pub(super) fn give_back(&mut self, tokens: u64) {
        let full = i128::from(self.rate.burst) * TOKEN;
        self.level = (self.level + i128::from(tokens) * TOKEN).min(full);
    }

    fn refill(&mut self, now: Duration) {
        // Time that seems to run backwards adds nothing.
        let nanos = now.saturating_sub(self.at).as_nanos() as i128;
        self.at = self.at.max(now);
        let full = i128::from(self.rate.burst) * TOKEN;
        let grown = nanos.saturating_mul(i128::from(self.rate.per_second));
        self.level = self.level.saturating_add(grown).min(full);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lets requests pass as soon as they may, and says when each did.
    fn run(bucket: &mut Bucket, costs: &[(u64, u64)]) -> Vec<(Duration, u64)> {
        let mut now = Duration::ZERO;
        let mut passed = Vec::new();
        for (pause, cost) in costs {
            now += Duration::from_nanos(*pause);
            if let Err(wait) = bucket.ready(now) {
                assert!(bucket.ready(now + wait - Duration::from_nanos(1)).is_err(), "it waits too long");
                now += wait;
                assert_eq!(bucket.ready(now), Ok(()), "it does not wait long enough");
            }
            bucket.take(*cost);
            passed.push((now, *cost));
        }
        passed
    }

    proptest! {
        /// In no span of time does more pass than the burst, the rate's share and the last request; and
        /// whoever waits loses nothing of the rate.
        #[test]
        fn the_rate_is_kept(
            per_second in 1u64..1 << 40,
            burst in 1u64..1 << 40,
            costs in prop::collection::vec((0u64..2_000_000_000, 0u64..1 << 32), 1..60),
        ) {
            let rate = Rate { per_second, burst };
            let passed = run(&mut Bucket::new(rate, Duration::ZERO), &costs);
            for (first, (start, _)) in passed.iter().enumerate() {
                let mut before = 0u128;
                for (now, cost) in &passed[first..] {
                    // A request passes where a token is left of what the time before has given.
                    let nanos = (*now - *start).as_nanos();
                    let given = u128::from(burst) * 1_000_000_000 + nanos * u128::from(per_second);
                    prop_assert!(before * 1_000_000_000 <= given, "{before} tokens passed in {nanos} ns");
                    before += u128::from(*cost);
                }
            }
            // With no pauses, everything passes in the time that the rate gives it.
            let eager: Vec<_> = costs.iter().map(|(_, cost)| (0, *cost)).collect();
            let passed = run(&mut Bucket::new(rate, Duration::ZERO), &eager);
            let before: u128 = eager[..eager.len() - 1].iter().map(|(_, cost)| u128::from(*cost)).sum();
            let needed = ((before + 1).saturating_sub(u128::from(burst)) * 1_000_000_000)
                .div_ceil(u128::from(per_second));
            let took = passed.last().map_or(0, |(now, _)| now.as_nanos());
            // Each wait is rounded up by less than a nanosecond, which the bucket gives back.
            prop_assert!(took <= needed + 1, "{took} ns instead of {needed}");
        }
    }

    #[test]
    fn a_change_keeps_what_there_is() {
        let at = Duration::from_secs;
        let mut bucket = Bucket::new(Rate { per_second: 10, burst: 10 }, at(0));
        bucket.take(60);
        assert_eq!(bucket.ready(at(0)), Err(Duration::from_millis(5100)));
        bucket.set(Rate { per_second: 100, burst: 5 }, at(1));
        assert_eq!(bucket.ready(at(1)), Err(Duration::from_millis(410)));
        assert_eq!(bucket.ready(at(60)), Ok(()));
        bucket.take(5);
        assert_eq!(bucket.ready(at(60)), Err(Duration::from_millis(10)), "it holds no more than its burst");
        assert_eq!(bucket.ready(at(0)), Err(Duration::from_millis(10)), "time runs backwards");
    }

    #[test]
    fn extremes() {
        let mut bucket = Bucket::new(Rate { per_second: u64::MAX, burst: u64::MAX }, Duration::ZERO);
        for _ in 0..3 {
            bucket.take(u64::MAX);
        }
        assert!(bucket.ready(Duration::ZERO).is_err());
        assert_eq!(bucket.ready(Duration::MAX), Ok(()));
        let mut slow = Bucket::new(Rate { per_second: 1, burst: 1 }, Duration::ZERO);
        slow.take(u64::MAX);
        assert_eq!(slow.ready(Duration::ZERO), Err(Duration::from_nanos(u64::MAX)));
    }
}

//! Timing things in turn, and what is kept of it.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::{Deserialize, Serialize};

/// A figure's value and the raw samples it was computed from, by what was timed, in seconds, or counted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// The figure.
    pub value: f64,
    /// What the same comparison gives for two things that do not differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<Noise>,
    /// All samples, in the order in which they were taken.
    pub samples: BTreeMap<String, Vec<f64>>,
}

/// The ratios of the baseline to a second one like it: where they lie is what the machine adds to a figure.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Noise {
    /// A quarter of the rounds are below.
    pub low: f64,
    /// The middle.
    pub median: f64,
    /// A quarter of the rounds are above.
    pub high: f64,
}

/// How often two things are timed: so many rounds of a batch of each.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// The rounds, each of which gives a ratio.
    pub rounds: usize,
    /// How often each thing is done in a round.
    pub batch: usize,
}

/// The time that a processor has spent on this thread, or on all of this process. What works in memory
/// takes nothing else, and others' work is not in it.
#[derive(Debug)]
pub struct ProcessorTime {
    clock: ClockId,
    begun: Timespec,
}

impl ProcessorTime {
    /// That of this thread, from now on.
    #[must_use]
    pub fn of_thread() -> Self {
        Self::of(ClockId::ThreadCPUTime)
    }

    /// That of this process, from now on.
    #[must_use]
    pub fn of_process() -> Self {
        Self::of(ClockId::ProcessCPUTime)
    }

    fn of(clock: ClockId) -> Self {
        Self { clock, begun: clock_gettime(clock) }
    }

    /// What it has come to.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        let spent = clock_gettime(self.clock) - self.begun;
        Duration::try_from(spent).unwrap_or_default()
    }
}

/// Something that can be timed, and its name.
pub type Timed<'a> = (&'a str, &'a mut dyn FnMut() -> anyhow::Result<Duration>);

/// Times `subject` and `baseline` in turn, after a batch of each that does not count. The value is the
/// median of the rounds' ratios, so that a disturbance spoils a round and not the figure.
///
/// # Errors
///
/// That of the first that fails.
pub fn median_ratio<'a>(
    rounds: Rounds,
    subject: Timed<'a>,
    baseline: Timed<'a>,
) -> anyhow::Result<Measurement> {
    let Turns { sums, samples } = take_turns(rounds, &mut [subject, baseline])?;
    Ok(Measurement { value: median(ratios(&sums, 0, 1)), noise: None, samples })
}

/// How fast `subject` is in units of `baseline`'s speed, and how fast `again`, which is like the baseline,
/// appears to be. The three are timed in turn as in [`median_ratio`].
///
/// # Errors
///
/// That of the first that fails.
pub fn median_speed<'a>(
    rounds: Rounds,
    subject: Timed<'a>,
    baseline: Timed<'a>,
    again: Timed<'a>,
) -> anyhow::Result<Measurement> {
    let Turns { sums, samples } = take_turns(rounds, &mut [subject, baseline, again])?;
    let noise = ratios(&sums, 1, 2);
    let at = |share| quantile(noise.clone(), share);
    let noise = Noise { low: at(0.25), median: at(0.5), high: at(0.75) };
    Ok(Measurement { value: median(ratios(&sums, 1, 0)), noise: Some(noise), samples })
}

struct Turns {
    /// For each round, the seconds that each thing's batch took.
    sums: Vec<Vec<f64>>,
    samples: BTreeMap<String, Vec<f64>>,
}

/// Every other round goes backwards, so that what comes first is not always the same.
fn take_turns(rounds: Rounds, things: &mut [Timed<'_>]) -> anyhow::Result<Turns> {
    let mut turns = Turns { sums: Vec::new(), samples: BTreeMap::new() };
    for round in 0..=rounds.rounds {
        let mut sums = vec![0.0; things.len()];
        for turn in 0..things.len() {
            let n = if round % 2 == 0 { turn } else { things.len() - 1 - turn };
            let (name, thing) = &mut things[n];
            for _ in 0..rounds.batch {
                let seconds = thing()?.as_secs_f64();
                sums[n] += seconds;
                if round > 0 {
                    turns.samples.entry((*name).to_owned()).or_default().push(seconds);
                }
            }
        }
        if round > 0 {
            turns.sums.push(sums);
        }
    }
    Ok(turns)
}

fn ratios(sums: &[Vec<f64>], over: usize, under: usize) -> Vec<f64> {
    sums.iter().map(|sums| sums[over] / sums[under]).collect()
}

/// The middle of `values`, the upper of two; not a number if there are none.
pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// What a `share` of `values` is below, the upper of two; not a number if there are none.
fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share) as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        for (values, expect) in [(vec![3.0], 3.0), (vec![9.0, 1.0, 2.0], 2.0), (vec![4.0, 1.0], 4.0)] {
            assert_eq!(median(values), expect);
        }
        assert!(median(Vec::new()).is_nan());
    }

    /// Something that takes so many milliseconds, time after time.
    fn taking(millis: &[u64]) -> impl FnMut() -> anyhow::Result<Duration> + '_ {
        let mut millis = millis.iter().copied();
        move || Ok(Duration::from_millis(millis.next().unwrap()))
    }

    #[test]
    fn a_disturbed_round_and_the_warm_up_do_not_count() {
        let (mut subject, mut baseline) = (taking(&[100, 100, 4, 4, 400, 400, 6, 6]), taking(&[2; 8]));
        let rounds = Rounds { rounds: 3, batch: 2 };
        let measured = median_ratio(rounds, ("a", &mut subject), ("b", &mut baseline)).unwrap();
        assert_eq!(measured.value, 3.0);
        assert_eq!(measured.samples["a"], [0.004, 0.004, 0.4, 0.4, 0.006, 0.006]);
        assert_eq!(measured.samples["b"].len(), 6);
    }

    #[test]
    fn speed_is_that_of_the_baseline_and_noise_that_of_its_like() {
        let rounds = Rounds { rounds: 4, batch: 1 };
        let (mut subject, mut baseline) = (taking(&[9, 8, 8, 8, 8]), taking(&[9, 4, 4, 4, 4]));
        let mut again = taking(&[9, 2, 4, 4, 8]);
        let measured =
            median_speed(rounds, ("a", &mut subject), ("b", &mut baseline), ("b2", &mut again)).unwrap();
        let noise = measured.noise.unwrap();
        assert_eq!((measured.value, noise.low, noise.median, noise.high), (0.5, 1.0, 1.0, 2.0));
    }

    #[test]
    fn the_order_changes_from_round_to_round() {
        let order = std::cell::RefCell::new(String::new());
        let say = |letter| {
            let order = &order;
            move || {
                order.borrow_mut().push(letter);
                Ok(Duration::from_millis(1))
            }
        };
        let (mut a, mut b) = (say('a'), say('b'));
        median_ratio(Rounds { rounds: 2, batch: 1 }, ("a", &mut a), ("b", &mut b)).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
    }
}

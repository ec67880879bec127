//! Timing two things in turn, and what is kept of it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A figure's value and the raw samples it was computed from, in seconds, by what was timed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// The figure.
    pub value: f64,
    /// All samples, in the order in which they were taken.
    pub samples: BTreeMap<String, Vec<f64>>,
}

/// How often two things are timed: so many rounds of a batch of each.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// The rounds, each of which gives a ratio.
    pub rounds: usize,
    /// How often each thing is done in a round.
    pub batch: usize,
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
    let mut ratios = Vec::new();
    let mut kept = [Vec::new(), Vec::new()];
    let mut things = [subject.1, baseline.1];
    for round in 0..=rounds.rounds {
        let mut sums = [0.0; 2];
        for (n, thing) in things.iter_mut().enumerate() {
            for _ in 0..rounds.batch {
                let seconds = thing()?.as_secs_f64();
                sums[n] += seconds;
                if round > 0 {
                    kept[n].push(seconds);
                }
            }
        }
        if round > 0 {
            ratios.push(sums[0] / sums[1]);
        }
    }
    let [of_subject, of_baseline] = kept;
    let samples = [(subject.0.to_owned(), of_subject), (baseline.0.to_owned(), of_baseline)].into();
    Ok(Measurement { value: median(ratios), samples })
}

/// The middle of `values`, the upper of two; not a number if there are none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
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

    #[test]
    fn a_disturbed_round_and_the_warm_up_do_not_count() {
        let mut slow = [100, 100, 4, 4, 400, 400, 6, 6].into_iter();
        let mut subject = || Ok(Duration::from_millis(slow.next().unwrap()));
        let mut baseline = || Ok(Duration::from_millis(2));
        let rounds = Rounds { rounds: 3, batch: 2 };
        let measured = median_ratio(rounds, ("a", &mut subject), ("b", &mut baseline)).unwrap();
        assert_eq!(measured.value, 3.0);
        assert_eq!(measured.samples["a"], [0.004, 0.004, 0.4, 0.4, 0.006, 0.006]);
        assert_eq!(measured.samples["b"].len(), 6);
    }
}

//! What a figure has to reach, and whether it does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Something measured, and its bar.
pub(super) struct Figure {
    /// Also the name of the measurement.
    pub(super) name: &'static str,
    /// What the value is counted in.
    pub(super) unit: &'static str,
    pub(super) bar: Bar,
    pub(super) place: Place,
}

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bar {
    AtMost(f64),
    AtLeast(f64),
    /// It is shown and may be anything.
    None,
}

/// Where a figure is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On this host.
    Host,
    /// On this host, by the program that holds the rivals too.
    Rivals,
    /// In the lab, where a nanosecond is an instruction.
    CountedLab,
}

/// What a measuring program says.
#[derive(Deserialize)]
pub(super) struct Measurement {
    pub(super) value: f64,
    pub(super) noise: Option<Noise>,
    pub(super) samples: BTreeMap<String, Vec<f64>>,
}

/// What the same comparison gives for two things that do not differ: the middle of the rounds, and
/// where the middle half of them lies.
#[derive(Clone, Copy, Deserialize, Serialize)]
pub(super) struct Noise {
    low: f64,
    median: f64,
    high: f64,
}

/// What is kept of a figure.
#[derive(Serialize)]
pub(super) struct Kept {
    name: &'static str,
    unit: &'static str,
    value: f64,
    bar: Bar,
    pub(super) ok: bool,
    noise: Option<Noise>,
    samples: BTreeMap<String, Vec<f64>>,
}

impl Kept {
    pub(super) fn new(figure: &Figure, measured: Measurement) -> Self {
        let Measurement { value, noise, samples } = measured;
        // What is not a number is within no bar.
        let ok = match figure.bar {
            Bar::AtMost(bar) => value <= bar,
            Bar::AtLeast(bar) => value >= bar,
            Bar::None => !value.is_nan(),
        };
        Self { name: figure.name, unit: figure.unit, value, bar: figure.bar, ok, noise, samples }
    }

    pub(super) fn line(&self) -> String {
        let unit = self.unit;
        let bar = match self.bar {
            Bar::AtMost(bar) => format!("<={bar}{unit}"),
            Bar::AtLeast(bar) => format!(">={bar}{unit}"),
            Bar::None => "-".to_owned(),
        };
        let verdict = match (self.ok, self.bar) {
            (true, Bar::None) => "reported",
            (true, _) => "ok",
            (false, _) => "short",
        };
        let noise = self
            .noise
            .map(|Noise { low, median, high }| format!(" noise {median:.3}{unit} ({low:.3} to {high:.3})"));
        format!("{} {:.3}{unit} {bar} {verdict}{}", self.name, self.value, noise.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(bar: Bar, value: f64, noise: Option<Noise>) -> String {
        let figure = Figure { name: "start", unit: "x", bar, place: Place::Host };
        Kept::new(&figure, Measurement { value, noise, samples: BTreeMap::new() }).line()
    }

    #[test]
    fn a_figure_is_ok_up_to_its_bar() {
        for (bar, value, expect) in [
            (Bar::AtMost(3.0), 2.0, "start 2.000x <=3x ok"),
            (Bar::AtMost(3.0), 3.0, "start 3.000x <=3x ok"),
            (Bar::AtMost(3.0), 3.0001, "start 3.000x <=3x short"),
            (Bar::AtMost(3.0), f64::NAN, "start NaNx <=3x short"),
            (Bar::AtLeast(0.95), 0.95, "start 0.950x >=0.95x ok"),
            (Bar::AtLeast(0.95), 0.94, "start 0.940x >=0.95x short"),
            (Bar::AtLeast(0.95), f64::NAN, "start NaNx >=0.95x short"),
            (Bar::None, 7.0, "start 7.000x - reported"),
            (Bar::None, f64::NAN, "start NaNx - short"),
        ] {
            assert_eq!(line(bar, value, None), expect);
        }
    }

    #[test]
    fn noise_stands_beside_it() {
        let noise = Some(Noise { low: 0.9, median: 1.0, high: 1.25 });
        let expect = "start 1.000x >=0.95x ok noise 1.000x (0.900 to 1.250)";
        assert_eq!(line(Bar::AtLeast(0.95), 1.0, noise), expect);
    }
}

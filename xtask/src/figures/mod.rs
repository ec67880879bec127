//! `cargo xtask figures AREA`: measures what has a bar, and says what falls short of it.
//!
//! A line a figure, `name value bar ok|short`; smaller is better. The raw samples and the facts of the host
//! go to a file of the run's own in `target/figures/AREA`. The exit status is 1 if a figure falls short.
//!
//! The measurements are in the crate `ami-benches`, whose program `measure` takes one by its name, here or
//! in the lab. Adding an area: a table of figures in a module of its own, one line in [`AREAS`].

mod facts;
mod launch;
mod region;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::builder::PossibleValuesParser;
use serde::{Deserialize, Serialize};

use crate::lab::{Ended, Lab};
use crate::workspace;
use facts::Facts;

/// The areas that have figures.
const AREAS: &[(&str, &[Figure])] = &[("launch", launch::FIGURES), ("region", region::FIGURES)];

/// In the lab counted instructions are slow, most of all on a busy host.
const LAB_DEADLINE: Duration = Duration::from_secs(600);

/// Measure what has a bar.
#[derive(clap::Args)]
pub(crate) struct FiguresArgs {
    /// What to measure
    #[arg(value_parser = PossibleValuesParser::new(AREAS.iter().map(|(name, _)| *name)))]
    area: String,
}

/// Something measured, and the bar that it must not exceed.
struct Figure {
    /// Also the name of the measurement.
    name: &'static str,
    /// What the value is counted in.
    unit: &'static str,
    bar: f64,
    place: Place,
}

/// Where a figure is measured.
enum Place {
    /// On this host.
    Host,
    /// In the lab, where a nanosecond is an instruction.
    CountedLab,
}

/// What the program `measure` says.
#[derive(Deserialize)]
struct Measurement {
    value: f64,
    samples: BTreeMap<String, Vec<f64>>,
}

/// What is kept of a figure.
#[derive(Serialize)]
struct Kept {
    name: &'static str,
    unit: &'static str,
    value: f64,
    bar: f64,
    ok: bool,
    samples: BTreeMap<String, Vec<f64>>,
}

impl Kept {
    fn new(figure: &Figure, measured: Measurement) -> Self {
        let Measurement { value, samples } = measured;
        // What is not a number is not within the bar.
        let ok = value <= figure.bar;
        Self { name: figure.name, unit: figure.unit, value, bar: figure.bar, ok, samples }
    }

    fn line(&self) -> String {
        let verdict = if self.ok { "ok" } else { "short" };
        format!("{} {:.3}{} {}{} {verdict}", self.name, self.value, self.unit, self.bar, self.unit)
    }
}

#[derive(Serialize)]
struct Report {
    area: String,
    facts: Facts,
    figures: Vec<Kept>,
}

/// Measures every figure of the area.
pub(crate) fn run(args: &FiguresArgs) -> anyhow::Result<ExitCode> {
    let figures = AREAS.iter().find(|(name, _)| *name == args.area).map(|(_, figures)| *figures);
    let figures = figures.with_context(|| format!("there is no area {:?}", args.area))?;
    let measure = build()?;
    let mut report = Report { area: args.area.clone(), facts: Facts::gather(), figures: Vec::new() };
    let mut failed = Vec::new();
    for figure in figures {
        match figure.measure(&measure).with_context(|| format!("cannot measure {}", figure.name)) {
            Ok(measured) => {
                let kept = Kept::new(figure, measured);
                println!("{}", kept.line());
                report.figures.push(kept);
            }
            // The others are measured all the same.
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    eprintln!("kept in {}", report.keep()?.display());
    if !failed.is_empty() {
        bail!("{}", failed.join("\nerror: "));
    }
    let all_ok = report.figures.iter().all(|kept| kept.ok);
    Ok(if all_ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the program that measures, as users build programs.
fn build() -> anyhow::Result<PathBuf> {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo.current_dir(workspace::root()).args(["build", "--release", "--quiet", "--package", "ami-benches"]);
    let built =
        cargo.args(["--bin", "measure", "--message-format", "json"]).stderr(Stdio::inherit()).output();
    let built = built.context("cannot run cargo")?;
    ensure!(built.status.success(), "the benchmarks cannot be built");
    executable(&String::from_utf8_lossy(&built.stdout))
}

/// The executable that cargo's messages name.
fn executable(messages: &str) -> anyhow::Result<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    messages.filter_map(|message| message.executable).next_back().context("cargo named no executable")
}

impl Figure {
    fn measure(&self, program: &Path) -> anyhow::Result<Measurement> {
        let json = match self.place {
            Place::Host => {
                let mut measure = std::process::Command::new(program);
                let done = measure.arg(self.name).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
                let done = done.with_context(|| format!("cannot run {}", program.display()))?;
                ensure!(done.status.success(), "the measurement failed");
                done.stdout
            }
            Place::CountedLab => {
                // Not on the lab's disk: while the lab waits for the host's, counted time runs ahead.
                let lab = Lab::new(program).env("TMPDIR", "/dev/shm");
                let lab = lab.args([self.name]).guest_artifacts().icount(true);
                let mut said = Vec::new();
                match lab.deadline(LAB_DEADLINE).run(&mut said, std::io::stderr())? {
                    Ended::Exit(0) => said,
                    Ended::Exit(status) => bail!("the measurement failed in the lab with status {status}"),
                    Ended::Late => bail!("the lab took longer than {LAB_DEADLINE:?}"),
                    Ended::StoodStill => bail!("the lab stood still"),
                }
            }
        };
        serde_json::from_slice(&json).context("the measurement said something odd")
    }
}

impl Report {
    /// Writes the run's file, and says where.
    fn keep(&self) -> anyhow::Result<PathBuf> {
        let dir = workspace::target("figures").join(&self.area);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(format!("{}.json", self.facts.seconds_since_1970));
        fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_ok_up_to_its_bar() {
        for (value, line) in [
            (2.0, "start 2.000x 3x ok"),
            (3.0, "start 3.000x 3x ok"),
            (3.0001, "start 3.000x 3x short"),
            (f64::NAN, "start NaNx 3x short"),
        ] {
            let figure = Figure { name: "start", unit: "x", bar: 3.0, place: Place::Host };
            let kept = Kept::new(&figure, Measurement { value, samples: BTreeMap::new() });
            assert_eq!(kept.line(), line);
        }
    }

    #[test]
    fn every_name_is_taken_once() {
        let mut names: Vec<_> =
            AREAS.iter().flat_map(|(_, figures)| figures.iter().map(|f| f.name)).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn finds_the_executable_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        not json\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/measure\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(messages).unwrap(), Path::new("/t/measure"));
        assert!(executable("").is_err());
    }
}

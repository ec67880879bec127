//! `cargo xtask figures AREA [FIGURE…]`: measures what has a bar, and says what falls short of it.
//!
//! A line a figure, `name value bar ok|short`, with what the same comparison gives for two equal things
//! where that is measured too. The raw samples and the facts of the host go to a file of the run's own in
//! `target/figures/AREA`. The exit status is 1 if a figure falls short.
//!
//! The measurements are in the crate `ami-benches`, whose program `measure` takes one by its name, here or
//! in the lab, and in `ami-rivals`, which compares with other libraries. Adding an area: a table of figures in
//! a module of its own, one line in [`AREAS`].

mod bar;
mod facts;
mod kvm;
mod launch;
mod network;
mod region;
mod storage;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::builder::PossibleValuesParser;
use serde::{Deserialize, Serialize};

use crate::lab::{Ended, Lab};
use crate::prerequisites::{self, Tool};
use crate::workspace;
use bar::{Figure, Kept, Measurement, Place};
use facts::Facts;

/// The areas that have figures.
const AREAS: &[Area] = &[kvm::AREA, launch::AREA, network::AREA, region::AREA, storage::AREA];

/// In the lab counted instructions are slow, most of all on a busy host.
const LAB_DEADLINE: Duration = Duration::from_secs(600);

struct Area {
    name: &'static str,
    figures: &'static [Figure],
    /// What the measurements call.
    tools: &'static [Tool],
    disk: Option<Disk>,
}

/// Bytes that must be free to measure on the disk.
struct Disk {
    full: u64,
    quick: u64,
}

/// Measure what has a bar.
#[derive(clap::Args)]
pub(crate) struct FiguresArgs {
    /// What to measure
    #[arg(value_parser = PossibleValuesParser::new(AREAS.iter().map(|area| area.name)))]
    area: String,
    /// Only these of its figures
    figures: Vec<String>,
    /// Measure less, only to see that it works
    #[arg(long)]
    quick: bool,
}

#[derive(Serialize)]
struct Report {
    area: String,
    quick: bool,
    facts: Facts,
    figures: Vec<Kept>,
}

/// Measures every figure of the area, or those that are named.
pub(crate) fn run(args: &FiguresArgs) -> anyhow::Result<ExitCode> {
    let area = AREAS.iter().find(|area| area.name == args.area);
    let area = area.with_context(|| format!("there is no area {:?}", args.area))?;
    let figures = chosen(area.figures, &args.figures)?;
    prerequisites::require(area.tools)?;
    let dir = work_dir(area, args.quick)?;
    let programs = build(&figures)?;
    let mut report =
        Report { area: args.area.clone(), quick: args.quick, facts: Facts::gather(), figures: Vec::new() };
    let mut failed = Vec::new();
    for figure in figures {
        let measured = figure.measure(&programs, dir.path(), args.quick);
        match measured.with_context(|| format!("cannot measure {}", figure.name)) {
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

/// The figures that are named, or all of them.
fn chosen<'f>(figures: &'f [Figure], names: &[String]) -> anyhow::Result<Vec<&'f Figure>> {
    if names.is_empty() {
        return Ok(figures.iter().collect());
    }
    let find = |name: &String| figures.iter().find(|figure| figure.name == name);
    names.iter().map(|name| find(name).with_context(|| format!("there is no figure {name:?}"))).collect()
}

/// Where to measure, on the disk that also holds what is built. It is gone after the run.
fn work_dir(area: &Area, quick: bool) -> anyhow::Result<tempfile::TempDir> {
    let parent = workspace::target("figures");
    fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
    if let Some(disk) = &area.disk {
        let needed = if quick { disk.quick } else { disk.full };
        let stat = rustix::fs::statvfs(&parent)
            .with_context(|| format!("cannot learn how much is free in {}", parent.display()))?;
        enough(stat.f_bavail.saturating_mul(stat.f_frsize), needed, &parent)?;
    }
    let dir = tempfile::Builder::new().prefix("work-").tempdir_in(&parent);
    dir.with_context(|| format!("cannot make a directory in {}", parent.display()))
}

fn enough(free: u64, needed: u64, dir: &Path) -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    ensure!(
        free >= needed,
        "this takes {} MiB of disk space, and {} are free in {}; --quick takes less",
        needed / MIB,
        free / MIB,
        dir.display()
    );
    Ok(())
}

impl Place {
    /// The package, and the program in it, that measures here.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Host | Self::CountedLab => ("ami-benches", "measure"),
            Self::Rivals => ("ami-rivals", "measure-rivals"),
        }
    }
}

/// The executables of measuring programs, by name.
type Programs = HashMap<&'static str, PathBuf>;

/// Builds what measures these figures, as users build programs.
fn build(figures: &[&Figure]) -> anyhow::Result<Programs> {
    let mut programs = Programs::new();
    for figure in figures {
        let (package, program) = figure.place.program();
        if programs.contains_key(program) {
            continue;
        }
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.current_dir(workspace::root()).args(["build", "--release", "--quiet", "--package", package]);
        cargo.args(["--bin", program, "--message-format", "json"]).stderr(Stdio::inherit());
        let built = cargo.output().context("cannot run cargo")?;
        ensure!(built.status.success(), "{package} cannot be built");
        programs.insert(program, executable(&String::from_utf8_lossy(&built.stdout))?);
    }
    Ok(programs)
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
    fn measure(&self, programs: &Programs, dir: &Path, quick: bool) -> anyhow::Result<Measurement> {
        let program = programs.get(self.place.program().1).context("its program is not built")?;
        let json = match self.place {
            Place::Host | Place::Rivals => {
                let mut measure = std::process::Command::new(program);
                measure.arg(self.name).arg(dir).args(quick.then_some("quick"));
                let done = measure.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
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
    fn every_name_is_taken_once() {
        let mut names: Vec<_> = AREAS.iter().flat_map(|area| area.figures.iter().map(|f| f.name)).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn figures_are_chosen_by_name() {
        let names = |chosen: Vec<&Figure>| chosen.iter().map(|figure| figure.name).collect::<Vec<_>>();
        let all = launch::AREA.figures;
        assert_eq!(chosen(all, &[]).map(|chosen| chosen.len()).unwrap(), all.len());
        let one = ["launch_256g_over_1g".to_owned()];
        assert_eq!(names(chosen(all, &one).unwrap()), ["launch_256g_over_1g"]);
        assert!(chosen(all, &["launch_1g".to_owned()]).is_err());
    }

    #[test]
    fn says_how_much_space_is_missing() {
        assert!(enough(4 << 20, 4 << 20, Path::new("/t")).is_ok());
        let error = enough(3 << 20, 4 << 20, Path::new("/t")).unwrap_err().to_string();
        assert_eq!(error, "this takes 4 MiB of disk space, and 3 are free in /t; --quick takes less");
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

//! `cargo xtask test`: everything that has to hold before a change lands.

mod in_lab;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::lab;
use crate::prerequisites::{
    self, BZIP2, FIO, IP, LOSETUP, LZ4, LZOP, MKE2FS, NBDCOPY, NBDINFO, NBDKIT, QEMU_IMG, QEMU_IO, Tool, XZ,
    ZSTD,
};
use crate::{guest, process, workspace};

/// Check all that has to hold: format, lints, documentation, tests, and KVM in the lab
#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// What to check (everything if nothing is named)
    steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// The code is formatted
    Format,
    /// Clippy has nothing to say, of the fuzz targets neither
    Lints,
    /// The documentation builds without warnings
    Documentation,
    /// The tests and examples of all crates
    Tests,
    /// The crates that are published can be packaged
    Package,
    /// Linux guests on KVM, in the lab, where every host has a true one
    Kvm,
    /// The quick start on KVM, in the lab
    Quickstart,
}

/// What the tests call, besides what the lab does. Under CI none of them skips what it cannot do.
const TOOLS: [Tool; 14] =
    [LOSETUP, NBDINFO, NBDCOPY, NBDKIT, FIO, IP, QEMU_IMG, QEMU_IO, MKE2FS, BZIP2, LZ4, LZOP, XZ, ZSTD];

/// The members of the workspace that are not published.
const UNPUBLISHED: [&str; 4] = ["ami-benches", "ami-examples", "ami-rivals", "xtask"];
/// The minor version of the cargo that packages crates together with what they depend on.
const PACKAGES_TOGETHER: u32 = 90;
/// How long the quick start may take there. It takes 40 seconds.
const QUICKSTART_PATIENCE: Duration = Duration::from_secs(300);

/// Runs every step, in order, until one fails.
pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    prerequisites::require(&[&TOOLS[..], &lab::TOOLS, guest::tools()].concat())?;
    guest::ensure()?;
    let all = Step::value_variants();
    let mut times = Vec::new();
    for step in all.iter().filter(|step| args.steps.is_empty() || args.steps.contains(step)) {
        let begun = Instant::now();
        step.run().with_context(|| format!("{} failed", step.name()))?;
        times.push((step.name(), begun.elapsed()));
    }
    eprintln!();
    for (name, took) in times {
        eprintln!("{name:<14} {:>7.1} s", took.as_secs_f64());
    }
    Ok(ExitCode::SUCCESS)
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn run(self) -> Result<()> {
        match self {
            Self::Format => {
                cargo(&["fmt", "--all", "--check"], &[])?;
                cargo(&["fmt", "--manifest-path", &fuzz("Cargo.toml")?, "--check"], &[])
            }
            // With all features everywhere: a test that asks for one is else left out in silence.
            Self::Lints => {
                let all =
                    ["clippy", "--workspace", "--all-features", "--all-targets", "--", "-D", "warnings"];
                cargo(&all, &[])?;
                lint_fuzz_targets()
            }
            Self::Documentation => {
                let all = ["doc", "--workspace", "--all-features", "--no-deps"];
                cargo(&all, &[("RUSTDOCFLAGS", "-D warnings")])
            }
            Self::Tests => {
                let kernel = guest::ensure()?.vmlinuz();
                // Whose root disks are looked at too.
                guest::others::ensure_all()?;
                let kernel = kernel.to_str().context("the guest's kernel has a name that is not UTF-8")?;
                cargo(&["test", "--workspace", "--all-features"], &[("BOOT_IMAGE_TEST_KERNEL", kernel)])
            }
            Self::Package => package(),
            Self::Kvm => in_lab::run(),
            Self::Quickstart => quickstart_in_lab(),
        }
    }
}

fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    eprintln!("==> cargo {}", arguments.join(" "));
    let mut cargo = Command::new(env!("CARGO"));
    let status = cargo.args(arguments).envs(environment.iter().copied()).status();
    let status = status.context("cannot run cargo")?;
    ensure!(status.success(), "cargo {} failed ({status})", arguments[0]);
    Ok(())
}

/// Checks the fuzz targets on this compiler, without what links them: neither a nightly one nor C++ is needed for that.
/// What they depend on was checked with the workspace, as far as its versions and features are the same.
fn lint_fuzz_targets() -> Result<()> {
    let environment = [
        ("AMI_WORKSPACE", path(workspace::root().to_owned())?),
        ("RUSTC_WRAPPER", fuzz("rustc")?),
        ("CUSTOM_LIBFUZZER_PATH", "/not/linked/libfuzzer.a".to_owned()),
    ];
    let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    let (manifest, target) = (fuzz("Cargo.toml")?, path(workspace::root().join("target"))?);
    let of_targets = ["clippy", "--manifest-path", &manifest, "--target-dir", &target];
    cargo(&[&of_targets[..], &["--", "-D", "warnings"]].concat(), &environment)
}

/// A file in the workspace of the fuzz targets.
fn fuzz(name: &str) -> Result<String> {
    path(workspace::root().join("fuzz").join(name))
}

fn path(path: PathBuf) -> Result<String> {
    path.into_os_string().into_string().ok().context("the repository's path is not UTF-8")
}

/// Makes the archives that would be published, without a look at whether they build.
fn package() -> Result<()> {
    let version = process::output(process::command(env!("CARGO")).arg("--version"))?;
    if minor_version(&version).is_some_and(|minor| minor < PACKAGES_TOGETHER) {
        eprintln!("SKIPPED: {} packages no crates that depend on each other", version.trim());
        return Ok(());
    }
    let unpublished = UNPUBLISHED.iter().flat_map(|name| ["--exclude", name]);
    let options = ["package", "--workspace", "--no-verify", "--allow-dirty", "--quiet"];
    cargo(&options.into_iter().chain(unpublished).collect::<Vec<_>>(), &[])
}

/// 95 of `cargo 1.95.0 (f2d3ce0bd 2026-03-21)`.
fn minor_version(said: &str) -> Option<u32> {
    said.strip_prefix("cargo 1.")?.split('.').next()?.parse().ok()
}

/// By the command that users give, not by this process: building the tests may have replaced its program.
fn quickstart_in_lab() -> Result<()> {
    let deadline = QUICKSTART_PATIENCE.as_secs().to_string();
    let lab = ["xtask", "lab", "--deadline", &deadline, "--", "quickstart", "--hypervisor", "kvm"];
    cargo(&lab, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cargos_version() {
        for (said, minor) in [
            ("cargo 1.95.0 (f2d3ce0bd 2026-03-21)", Some(95)),
            ("cargo 1.87.0", Some(87)),
            ("cargo 2.0.0", None),
            ("", None),
        ] {
            assert_eq!(minor_version(said), minor, "{said}");
        }
    }
}

//! `cargo xtask test`: everything that has to hold before a change lands.

use std::env;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::lab::{self, Ended, Lab};
use crate::prerequisites::{
    self, BZIP2, FIO, IP, LZ4, LZOP, NBDCOPY, NBDINFO, NBDKIT, QEMU_IMG, QEMU_IO, Tool, XZ, ZSTD,
};
use crate::{bare_guest, guest, process};

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
    /// Clippy has nothing to say
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
const TOOLS: [Tool; 12] = [NBDINFO, NBDCOPY, NBDKIT, FIO, IP, QEMU_IMG, QEMU_IO, BZIP2, LZ4, LZOP, XZ, ZSTD];

/// The package whose tests run in the lab.
const LAB_PACKAGE: &str = "hypervisor-kvm";
/// Its integration tests that run on a true KVM too, which the first one needs.
const LAB_TESTS: [&str; 6] = ["linux", "conformance", "taps", "ends", "confinement", "drops"];
/// The one of them that boots other kernels too.
const OTHER_KERNELS: &str = "linux";
/// The one of them that makes network devices.
const NETWORK_DEVICES: &str = "taps";
/// The members of the workspace that are not published.
const UNPUBLISHED: [&str; 4] = ["ami-benches", "ami-examples", "ami-rivals", "xtask"];
/// The minor version of the cargo that packages crates together with what they depend on.
const PACKAGES_TOGETHER: u32 = 90;
/// Where the lab has the bare-metal guest, which cannot be built there.
const BARE_GUEST: &str = "/lab/bare-guest";
/// How long a test binary may take in the lab. The longest takes up to ten minutes on a busy machine.
const TEST_PATIENCE: Duration = Duration::from_secs(900);
/// How often the emulator may fail before a test of ours has.
const LAB_TRIES: usize = 3;
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
            Self::Format => cargo(&["fmt", "--all", "--check"], &[]),
            Self::Lints => cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
            Self::Documentation => {
                cargo(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])
            }
            Self::Tests => {
                let kernel = guest::ensure()?.vmlinuz();
                let kernel = kernel.to_str().context("the guest's kernel has a name that is not UTF-8")?;
                cargo(&["test", "--workspace"], &[("BOOT_IMAGE_TEST_KERNEL", kernel)])
            }
            Self::Package => package(),
            Self::Kvm => LAB_TESTS.into_iter().try_for_each(test_in_lab),
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

/// Builds an integration test of `hypervisor-kvm` and runs it in the lab with the guests.
fn test_in_lab(name: &str) -> Result<()> {
    eprintln!("==> in the lab: hypervisor-kvm's test {name}");
    let mut bare = tempfile::NamedTempFile::new().context("cannot make a file for the bare-metal guest")?;
    let elf = bare_guest::elf().map_err(anyhow::Error::msg)?;
    bare.write_all(elf).context("cannot write the bare-metal guest")?;
    let mut lab =
        Lab::new(test_binary(name)?).args(["--nocapture"]).guest_artifacts().deadline(TEST_PATIENCE);
    if name == OTHER_KERNELS {
        for other in &guest::others::ALL {
            match other.ensure(false) {
                Ok(guest) => lab = lab.file(guest, Path::new(lab::GUEST_DIR).join(other.name)),
                // A host of another distribution may not know Debian's keys.
                Err(error) if env::var_os("CI").is_none() => {
                    eprintln!("SKIPPED: the guest {} cannot be made: {error:#}", other.name);
                }
                Err(error) => return Err(error),
            }
        }
    }
    if name == NETWORK_DEVICES {
        lab = lab.program(process::find("ip").context("there is no program `ip` on PATH")?);
    }
    lab = lab.file(bare.path(), BARE_GUEST).env("AMI_BARE_GUEST", BARE_GUEST);
    if let Some(ci) = env::var_os("CI") {
        lab = lab.env("CI", ci);
    }
    run_in_lab(&lab)
}

/// By the command that users give, not by this process: building the tests may have replaced its program.
fn quickstart_in_lab() -> Result<()> {
    let deadline = QUICKSTART_PATIENCE.as_secs().to_string();
    let lab = ["xtask", "lab", "--deadline", &deadline, "--", "quickstart", "--hypervisor", "kvm"];
    cargo(&lab, &[])
}

/// Once more where the emulator failed, and not what it was to run.
fn run_in_lab(lab: &Lab) -> Result<()> {
    for _ in 0..LAB_TRIES {
        match lab.clone().run(io::stdout(), io::stderr())? {
            Ended::Exit(0) => return Ok(()),
            Ended::Exit(status) => bail!("it ended with exit status {status}"),
            Ended::Late => bail!("it was not done by its deadline"),
            Ended::StoodStill => eprintln!("==> the lab stood still, which is the emulator's fault"),
        }
    }
    bail!("the lab stood still {LAB_TRIES} times")
}

/// Builds the test and answers where cargo put it.
fn test_binary(name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    // As part of the workspace, so that what was built for the other tests serves: a package alone has its
    // dependencies built with other features.
    cargo.args(["test", "--workspace", "--test", name, "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cannot build the test {name} ({})", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    executable(&messages, name).with_context(|| format!("cargo named no executable of the test {name}"))
}

/// The executable of the test target `name` of [`LAB_PACKAGE`] in what cargo says in JSON.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut tests = messages.filter(|message| {
        let manifest = Path::new(message["manifest_path"].as_str().unwrap_or_default());
        message["target"]["name"] == name
            && message["target"]["kind"] == serde_json::json!(["test"])
            && manifest.ends_with(Path::new(LAB_PACKAGE).join("Cargo.toml"))
    });
    tests.find_map(|message| Some(message["executable"].as_str()?.into()))
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

    #[test]
    fn finds_the_executable_that_cargo_names() {
        let messages = r#"
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["lib"],"name":"linux"},"executable":"/lib"}
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["test"],"name":"speed"},"executable":"/speed"}
            {"manifest_path":"/hypervisor-qemu/Cargo.toml","target":{"kind":["test"],"name":"linux"},"executable":"/qemu"}
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["test"],"name":"linux"},"executable":"/linux"}
            {"reason":"build-finished","success":true}
            no message"#;
        assert_eq!(executable(messages, "linux"), Some(PathBuf::from("/linux")));
        assert_eq!(executable(messages, "absent"), None);
    }
}

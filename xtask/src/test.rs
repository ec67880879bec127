//! `cargo xtask test`: everything that has to hold before a change lands.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::prerequisites;

/// Arguments of `cargo xtask test`: none.
#[derive(clap::Args)]
pub(crate) struct TestArgs {}

/// Each step: its name, cargo's arguments, and environment.
type Step = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)]);

const STEPS: &[Step] = &[
    ("format", &["fmt", "--all", "--check"], &[]),
    ("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
    ("documentation", &["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")]),
    ("tests", &["test", "--workspace"], &[]),
];

/// Runs every step, in order, until one fails.
pub(crate) fn run(_: &TestArgs) -> Result<ExitCode> {
    prerequisites::require(&[prerequisites::QEMU_X86_64, prerequisites::MKE2FS, prerequisites::NBDINFO])?;
    crate::guest::ensure()?;
    for (name, arguments, environment) in STEPS {
        eprintln!("==> {name}: cargo {}", arguments.join(" "));
        let status = Command::new(env!("CARGO"))
            .args(*arguments)
            .envs(environment.iter().copied())
            .status()
            .with_context(|| format!("cannot run cargo for {name}"))?;
        if !status.success() {
            bail!("{name} failed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

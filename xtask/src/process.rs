//! Running other programs, with errors that name the program and show what it said.

use std::process::Command;

use anyhow::{Context as _, bail};

pub(crate) use quick_start::{command, find_program as find};

/// Runs `command` to its end and returns its standard output; fails if it does.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

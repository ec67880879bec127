//! The tests that run in the lab, as many at a time as there are processors: a lab has one, which an emulator's
//! thread is.

use std::collections::HashMap;
use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::lab::{self, Ended, Lab};
use crate::{bare_guest, guest, process};

/// The package whose tests run in the lab.
const PACKAGE: &str = "hypervisor-kvm";
/// Its integration tests that run on a true KVM too, which the first one needs; the longest first.
const TESTS: [&str; 9] =
    ["linux", "conformance", "taps", "drops", "volumes", "ends", "confinement", "kill", "processors"];
/// The one of them that boots other kernels too.
const OTHER_KERNELS: &str = "linux";
/// The one of them that makes network devices.
const NETWORK_DEVICES: &str = "taps";
/// Where the lab has the bare-metal guest, which cannot be built there.
const BARE_GUEST: &str = "/lab/bare-guest";
/// How long a test binary may take in the lab. The longest takes ten minutes beside another lab, and more on a slow machine.
const PATIENCE: Duration = Duration::from_secs(1500);
/// How often the emulator may fail before a test of ours has.
const TRIES: usize = 3;

/// Builds the tests and runs them in the lab with the guests. What they say has their names before it.
pub(super) fn run() -> Result<()> {
    let mut bare = tempfile::NamedTempFile::new().context("cannot make a file for the bare-metal guest")?;
    let elf = bare_guest::elf().map_err(anyhow::Error::msg)?;
    bare.write_all(elf).context("cannot write the bare-metal guest")?;
    let mut programs = programs()?;
    let mut labs = Vec::new();
    for name in TESTS {
        let program = programs.remove(name);
        let program = program.with_context(|| format!("cargo named no executable of the test {name}"))?;
        labs.push((name, lab_of(name, program, bare.path())?));
    }
    let waiting = Mutex::new(labs.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let at_once = thread::available_parallelism().map_or(1, usize::from).min(TESTS.len());
    let failed = thread::scope(|scope| {
        let work = || -> Vec<&str> {
            // All are tried, so that one run tells of all that fail.
            std::iter::from_fn(next).filter(|(name, lab)| !passes(name, lab)).map(|(name, _)| name).collect()
        };
        let lanes: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let ended = lanes.into_iter().map(|lane| lane.join().map_err(|_| anyhow!("a lab's thread panicked")));
        ended.collect::<Result<Vec<_>>>()
    })?;
    let failed = failed.concat();
    ensure!(failed.is_empty(), "failed in the lab: {}", failed.join(", "));
    Ok(())
}

fn lab_of(name: &str, program: PathBuf, bare: &Path) -> Result<Lab> {
    let mut lab = Lab::new(program).args(["--nocapture"]).guest_artifacts().deadline(PATIENCE);
    if name == OTHER_KERNELS {
        for (other, guest) in guest::others::ensure_all()? {
            lab = lab.file(guest, Path::new(lab::GUEST_DIR).join(other));
        }
    }
    if name == NETWORK_DEVICES {
        lab = lab.program(process::find("ip").context("there is no program `ip` on PATH")?);
    }
    lab = lab.file(bare, BARE_GUEST).env("AMI_BARE_GUEST", BARE_GUEST);
    match env::var_os("CI") {
        Some(ci) => Ok(lab.env("CI", ci)),
        None => Ok(lab),
    }
}

/// Whether the test passes. It says so, and why not.
fn passes(name: &str, lab: &Lab) -> bool {
    eprintln!("==> in the lab: {PACKAGE}'s test {name}");
    let begun = Instant::now();
    let result = attempt(name, lab);
    let took = begun.elapsed().as_secs();
    match &result {
        Ok(()) => eprintln!("==> in the lab: {name} has passed, {took} s"),
        Err(error) => eprintln!("==> in the lab: {name} has failed, {took} s: {error:#}"),
    }
    result.is_ok()
}

/// Once more where the emulator failed, and not what it was to run.
fn attempt(name: &str, lab: &Lab) -> Result<()> {
    for _ in 0..TRIES {
        match lab.clone().run(Named::new(name, io::stdout()), Named::new(name, io::stderr()))? {
            Ended::Exit(0) => return Ok(()),
            Ended::Exit(status) => bail!("it ended with exit status {status}"),
            Ended::Late => bail!("it was not done by its deadline"),
            Ended::StoodStill => eprintln!("==> in the lab of {name} the emulator stood still"),
        }
    }
    bail!("the lab stood still {TRIES} times")
}

/// Passes on whole lines, each with a name before it, so that those of several tests can be told apart.
struct Named<'n, W: Write> {
    name: &'n str,
    begun: Vec<u8>,
    to: W,
}

impl<'n, W: Write> Named<'n, W> {
    fn new(name: &'n str, to: W) -> Self {
        Self { name, begun: Vec::new(), to }
    }
}

impl<W: Write> Write for Named<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.begun.extend_from_slice(bytes);
        if let Some(last) = self.begun.iter().rposition(|byte| *byte == b'\n') {
            let rest = self.begun.split_off(last + 1);
            for line in std::mem::replace(&mut self.begun, rest).split_inclusive(|byte| *byte == b'\n') {
                // By one call, so that it stays a line.
                self.to.write_all(&[self.name.as_bytes(), b": ", line].concat())?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl<W: Write> Drop for Named<'_, W> {
    fn drop(&mut self) {
        if !self.begun.is_empty() {
            // Nobody is left to be told that it fails.
            let _ = self.write(b"\n");
        }
    }
}

/// Builds the tests and answers where cargo put them.
fn programs() -> Result<HashMap<String, PathBuf>> {
    let mut cargo = Command::new(env!("CARGO"));
    // As part of the workspace, so that what was built for the other tests serves: a package alone has its
    // dependencies built with other features.
    cargo.args(["test", "--workspace", "--no-run"]);
    cargo.args(TESTS.iter().flat_map(|name| ["--test", name]));
    cargo.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cannot build the tests for the lab ({})", output.status);
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// The executables of the integration tests of [`PACKAGE`], by their names, in what cargo says in JSON.
fn executables(messages: &str) -> HashMap<String, PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let tests = messages.filter(|message| {
        let manifest = Path::new(message["manifest_path"].as_str().unwrap_or_default());
        message["target"]["kind"] == serde_json::json!(["test"])
            && manifest.ends_with(Path::new(PACKAGE).join("Cargo.toml"))
    });
    tests
        .filter_map(|message| {
            Some((message["target"]["name"].as_str()?.to_owned(), message["executable"].as_str()?.into()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_executables_that_cargo_names() {
        let messages = r#"
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["lib"],"name":"linux"},"executable":"/lib"}
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["test"],"name":"speed"},"executable":"/speed"}
            {"manifest_path":"/hypervisor-qemu/Cargo.toml","target":{"kind":["test"],"name":"linux"},"executable":"/qemu"}
            {"manifest_path":"/hypervisor-kvm/Cargo.toml","target":{"kind":["test"],"name":"linux"},"executable":"/linux"}
            {"reason":"build-finished","success":true}
            no message"#;
        let found = executables(messages);
        let expect = [("speed", "/speed"), ("linux", "/linux")];
        assert_eq!(found, expect.map(|(name, path)| (name.to_owned(), PathBuf::from(path))).into());
    }

    #[test]
    fn lines_are_passed_on_whole_and_named() {
        let mut to = Vec::new();
        let mut named = Named::new("ends", &mut to);
        for piece in ["one\ntw", "o\n", "", "\nthree"] {
            named.write_all(piece.as_bytes()).unwrap();
        }
        drop(named);
        assert_eq!(String::from_utf8(to).unwrap(), "ends: one\nends: two\nends: \nends: three\n");
    }
}

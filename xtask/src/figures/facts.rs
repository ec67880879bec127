//! What a figure has to be read with: the host, the toolchain, the commit.

use std::fs;
use std::time::SystemTime;

use serde::Serialize;

use crate::process;

/// The facts; what cannot be told is missing.
#[derive(Serialize)]
pub(super) struct Facts {
    pub(super) seconds_since_1970: u64,
    cpu: Option<String>,
    cpus: Option<usize>,
    memory: Option<String>,
    kernel: Option<String>,
    kvm_modules: Vec<String>,
    rustc: Option<String>,
    commit: Option<String>,
}

impl Facts {
    pub(super) fn gather() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            seconds_since_1970: now.map_or(0, |time| time.as_secs()),
            cpu: value("/proc/cpuinfo", "model name"),
            cpus: std::thread::available_parallelism().ok().map(usize::from),
            memory: value("/proc/meminfo", "MemTotal"),
            kernel: said("uname", &["-srv"]),
            kvm_modules: kvm_modules(),
            rustc: said("rustc", &["--version"]),
            commit: said("git", &["describe", "--always", "--dirty", "--abbrev=40"]),
        }
    }
}

/// The value of the first `name: value` in a file of `/proc`.
fn value(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
}

/// The modules that make `/dev/kvm`, also where they are built into the kernel.
fn kvm_modules() -> Vec<String> {
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let names = modules.map(|module| module.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("kvm")).collect();
    names.sort();
    names
}

/// What a program says.
fn said(program: &str, args: &[&str]) -> Option<String> {
    process::output(process::command(program).args(args)).ok().map(|text| text.trim().to_owned())
}

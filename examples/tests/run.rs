//! Every example runs and says what it promises.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use hypervisor_qemu::Qemu;
use instance_core::testing::taps;

/// The examples: name, the guest artifact that it is given, what it says, in this order.
const EXAMPLES: &[(&str, &str, &[&str])] = &[
    ("embed", "amd64/disk.raw", &["bytes more than ami-", "says: hello from the first"]),
    ("formats", "amd64/disk.raw", &["was a Vmdk image", "hold the same"]),
    (
        "quick_start",
        "",
        &["debian-12-cloud: Debian 12", "minimal: BusyBox", " is minimal-x86_64-", " packages", " is up"],
    ),
    (
        "tap",
        "",
        &["is at the host's ami-example", "it answers: Connection refused", "its device is gone with it"],
    ),
    (
        "two_machines",
        "",
        &[
            "one wrote \"one\"",
            "two wrote \"two\"",
            "one is gone, two answers",
            "two ended: Exited(PowerOff)",
        ],
    ),
];

#[test]
fn every_example_does_what_it_says() {
    let Some(guests) = guests() else { return };
    for (name, artifact, promises) in EXAMPLES {
        if let ("tap", Err(error)) = (*name, taps::available()) {
            assert!(std::env::var_os("CI").is_none(), "nothing may be skipped under CI, but: {error}");
            eprintln!("SKIPPED: {name}: {error}");
            continue;
        }
        let said = run(name, &guests.join(artifact));
        println!("{name}:\n{said}");
        let mut rest = said.as_str();
        for promise in *promises {
            let at = rest.find(promise);
            let at = at.unwrap_or_else(|| panic!("{name} does not say {promise:?} where it should:\n{said}"));
            rest = &rest[at + promise.len()..];
        }
    }
}

#[test]
fn no_example_is_left_out() {
    let files = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let found: BTreeSet<String> =
        sources.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    let run: BTreeSet<String> = EXAMPLES.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(found, run, "the examples there are, and those that are run");
}

/// Runs an example as its documentation says, and returns what it says.
fn run(name: &str, argument: &Path) -> String {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--package", "ami-examples", "--example", name, "--"]).arg(argument);
    let done = cargo.output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{name} failed ({}):\n{said}{errors}", done.status);
    said.into_owned()
}

/// The directory of the guests, if they and a hypervisor for them are there.
fn guests() -> Option<PathBuf> {
    if let Err(error) = Qemu::find() {
        return skip(&error.to_string());
    }
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    let dir = std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from);
    if !dir.join("amd64/manifest.json").exists() {
        return skip(&format!("there are no guests in {}: run `cargo xtask guest`", dir.display()));
    }
    Some(dir)
}

/// Says why the test does nothing. Under CI there is no reason to.
fn skip(reason: &str) -> Option<PathBuf> {
    assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI, but: {reason}");
    eprintln!("SKIPPED: {reason}");
    None
}

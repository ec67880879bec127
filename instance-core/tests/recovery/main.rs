//! A region whose process is killed, again and again, at any moment.
//!
//! A child works on a region and reports each action before it begins and when it was acknowledged.
//! It is killed, the region is opened here, and all that it holds, down to the last file, is compared
//! with a [`model`] of what was acknowledged. What was under way may have happened or not; nothing
//! else may differ.
//!
//! `REGION_KILLS` says how often (100), `REGION_SEED` where to begin.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod child;
mod model;
#[path = "../common/random.rs"]
mod random;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use instance_core::testing::FakeHypervisor;
use instance_core::{Instance, Region};
use model::Model;
use random::{Random, number};

type TestRegion = Region<FakeHypervisor>;

/// The places on an instance's disks that are written: disk and sector. The image has bytes up to
/// sector 2047 of its root disk; the second disk begins empty.
const PLACES: [(usize, u64); 7] = [(0, 0), (0, 1), (0, 9), (0, 2000), (0, 99_999), (1, 0), (1, 77_777)];

/// The environment variable that makes this program the child; it holds the directory and the seed.
const CHILD: &str = "REGION_CHILD";

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// What the guest answers to a line, after `prefix`.
fn ask(instance: &Instance, line: &str, prefix: &str) -> String {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(prefix, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
    let rest = reader.wait_for("\n", soon()).unwrap();
    String::from_utf8(rest).unwrap().trim().to_owned()
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_else_is_left() {
    let (kills, seed) = (number("REGION_KILLS", 100), number("REGION_SEED", 1));
    eprintln!("REGION_KILLS={kills} REGION_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::default();
    let mut random = Random(seed);
    let mut acknowledged = 0;
    for kill in 0..kills {
        acknowledged += work_until_killed(dir.path(), seed << 32 | kill, &mut model, &mut random);
        let region = Region::open(dir.path(), FakeHypervisor::new())
            .unwrap_or_else(|e| panic!("kill {kill}: {e}: {:?}", std::error::Error::source(&e)));
        model.check(&region, dir.path(), kill);
        if kill % 100 == 99 {
            eprintln!("{} of {kills} processes were killed", kill + 1);
        }
    }
    assert!(acknowledged > kills, "only {acknowledged} actions were acknowledged in {kills} lives");
    eprintln!("{acknowledged} actions were acknowledged");

    let open = || Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    model.take_down(&open());
    drop(open());
    model.check_files(dir.path(), "at the end");
}

/// Runs a child on the region and kills it after so many of its words, or before the first. Returns
/// how many actions it acknowledged.
fn work_until_killed(dir: &Path, seed: u64, model: &mut Model, random: &mut Random) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child::work", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{seed} {}", dir.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let (mut line, mut acknowledged) = (String::new(), 0);
    let mut hear = |line: &str| acknowledged += u64::from(model.hear(line));
    // The harness says a few words before the child does.
    for _ in 0..random.below(30) {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the child has ended by itself");
        hear(&line);
    }
    // Somewhere in what it does next.
    let until = Instant::now() + Duration::from_micros(random.below(6000) as u64);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    loop {
        line.clear();
        match lines.read_line(&mut line).unwrap() {
            0 => return acknowledged,
            // A word that the kill cut short was not said.
            _ if !line.ends_with('\n') => {}
            _ => hear(&line),
        }
    }
}

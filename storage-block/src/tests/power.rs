//! Power cuts at every step of a history: whatever was promised is there, and of the rest any part.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::history::History;
use super::ledger::Ledger;
use super::replay::{Cut, Disk, Keep, Names, Replay};
use super::tape::{Op, Step, Tape};
use super::{number, scratch};
use crate::format::{Run, State};
use crate::fs;
use crate::log::Log;
use crate::map::StateMap;
use crate::testing::Random;

/// A history, and what was done to the files.
pub(super) struct Recorded {
    pub(super) steps: Vec<Step>,
    pub(super) ledger: Ledger,
    pub(super) taken_over: Vec<Range<usize>>,
}

/// Records what `live` does with a history.
fn record(seed: u64, live: impl FnOnce(&mut History)) -> Recorded {
    let dir = scratch();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let tape = Tape::record(&root);
    let mut history = History::new(&root, tape.clone(), seed);
    live(&mut history);
    let (ledger, taken_over) = (history.ledger.clone(), history.taken_over.clone());
    Recorded { steps: tape.steps(), ledger, taken_over }
}

/// `count` things done by processes of which every one dies after about `life` of them.
fn random(seed: u64, count: usize, life: usize) -> Recorded {
    record(seed, |history| {
        for step in 0..count {
            if step % life == life - 1 {
                history.die_soon();
            }
            history.step();
        }
    })
}

/// The same things each time, with a process that dies after one operation, after two, and so on.
fn retried(seed: u64) -> Vec<Recorded> {
    let mut all = Vec::new();
    for operations in 0.. {
        let mut died = true;
        all.push(record(seed, |history| {
            history.prepare();
            history.die_after(operations);
            died = history.one_of_each(|_| (), |history, _| history.revive());
        }));
        if !died {
            break;
        }
    }
    all
}

/// Of so few pending operations every part is tried, or of as many as `STORAGE_BLOCK_POWER_FEW` says.
fn few() -> usize {
    number("STORAGE_BLOCK_POWER_FEW", 4)
}

/// The power cuts tried after a step, when so many operations on names and on content are pending.
fn cuts(names: usize, content: usize) -> Vec<Cut> {
    let cut = |names, keep_names, keep_content| Cut { names, keep_names, keep_content };
    let parts = if names + content <= few() { 1_u32 << (names + content) } else { 0 };
    let all_parts = (0..parts)
        .map(|bits| cut(Names::Any, Keep::These(bits & ((1 << names) - 1)), Keep::These(bits >> names)));
    let mut cuts: Vec<Cut> = all_parts.collect();
    cuts.extend([
        cut(Names::Any, Keep::All, Keep::All),
        cut(Names::Any, Keep::Nothing, Keep::Nothing),
        cut(Names::Any, Keep::All, Keep::Nothing),
        cut(Names::Any, Keep::Nothing, Keep::All),
        cut(Names::Ordered, Keep::Nothing, Keep::Nothing),
    ]);
    for _ in 0..2 {
        cuts.push(cut(Names::Ordered, Keep::Some, Keep::Some));
        cuts.push(cut(Names::Any, Keep::Some, Keep::Some));
        cuts.push(cut(Names::Any, Keep::All, Keep::Some));
    }
    for last in 0..names.min(4) {
        cuts.push(cut(Names::Any, Keep::But(last), Keep::All));
        cuts.push(cut(Names::Any, Keep::Only(last), Keep::Some));
    }
    for last in 0..content.min(3) {
        cuts.push(cut(Names::Any, Keep::All, Keep::But(last)));
        cuts.push(cut(Names::Ordered, Keep::Some, Keep::Only(last)));
    }
    cuts
}

/// Cuts the power after every `stride`th step of a range, and now and then once more while what is left is opened. Returns
/// how many different disks that left.
pub(super) fn power_cuts(
    recorded: &Recorded,
    steps: &[Step],
    range: Range<usize>,
    stride: usize,
    seed: u64,
) -> Result<usize, String> {
    let mut cutter =
        Cutter { ledger: &recorded.ledger, random: Random(seed), dir: scratch(), seen: HashSet::new() };
    let mut replay = Replay::from(Disk::default());
    for now in 0..=steps.len() {
        if now > 0 {
            replay.step(&steps[now - 1]);
        }
        if !range.contains(&now) || (now % stride != seed as usize % stride && now != steps.len()) {
            continue;
        }
        for disk in cutter.cut(&replay, now)? {
            if cutter.random.below(150) == 0 {
                cutter.cut_again(&disk, now)?;
            }
        }
    }
    Ok(cutter.seen.len())
}

struct Cutter<'l> {
    ledger: &'l Ledger,
    random: Random,
    dir: tempfile::TempDir,
    seen: HashSet<(u64, usize)>,
}

impl Cutter<'_> {
    /// Checks every cut after the step `now`, and returns the disks that no other cut has left.
    fn cut(&mut self, replay: &Replay, now: usize) -> Result<Vec<Disk>, String> {
        let (names, content) = replay.pending();
        let mut disks = Vec::new();
        for cut in cuts(names, content) {
            let disk = replay.cut(cut, &mut self.random);
            // Where no more is promised than before, the same disk is no worse.
            if !self.seen.insert((disk.digest(), self.ledger.promises(now))) {
                continue;
            }
            let root = self.dir.path().join("root");
            disk.put(&root);
            let checked = self.ledger.check(&root, now, &mut self.random);
            std::fs::remove_dir_all(&root).unwrap();
            checked.map_err(|why| format!("after step {now}, {cut:?}: {why}"))?;
            disks.push(disk);
        }
        Ok(disks)
    }

    /// Cuts the power at every step of opening what a cut has left.
    fn cut_again(&mut self, disk: &Disk, now: usize) -> Result<(), String> {
        let root = self.dir.path().join("root");
        disk.put(&root);
        let disk = Disk::load(&root);
        let tape = Tape::record_over(&root, disk.names());
        self.ledger.open_all(&root);
        std::fs::remove_dir_all(&root).unwrap();
        let mut replay = Replay::from(disk);
        for step in tape.steps() {
            replay.step(&step);
            self.cut(&replay, now)
                .map_err(|why| format!("{why}, and {} while it was opened", brief(&step)))?;
        }
        Ok(())
    }
}

fn brief(step: &Step) -> String {
    let mut text = format!("{step:?}");
    text.truncate(120);
    text
}

/// `STORAGE_BLOCK_POWER_SEEDS` says how many histories, `STORAGE_BLOCK_POWER_ACTS` how much is done in each.
#[test]
fn power_cuts_lose_nothing_that_was_promised() {
    let mut states = 0;
    let seeds = number("STORAGE_BLOCK_POWER_SEEDS", 2) as u64;
    for seed in 1..=seeds {
        let recorded = random(seed, number("STORAGE_BLOCK_POWER_ACTS", 60), 20);
        assert!(!recorded.taken_over.is_empty(), "seed {seed}: no process has died");
        match power_cuts(&recorded, &recorded.steps, 0..usize::MAX, 1, seed) {
            Ok(count) => states += count,
            Err(why) => panic!("seed {seed}: {why}"),
        }
        println!("history {seed} of {seeds}: {states} disks after power cuts so far");
    }
    println!("{states} disks after power cuts in {seeds} histories");
}

/// Any operation fails once, and a power cut comes while its work is undone and done again: within 24 operations, after every
/// eighth, or as `STORAGE_BLOCK_POWER_FAILED_STRIDE` says.
#[test]
fn what_is_undone_does_not_come_back_in_parts() {
    let stride = number("STORAGE_BLOCK_POWER_FAILED_STRIDE", 8);
    let mut states = 0;
    for operations in 0.. {
        let (mut at, mut unharmed) = (0, false);
        let recorded = record(1, |history| {
            history.prepare();
            at = history.now() + operations;
            history.fail_after(operations, rustix::io::Errno::NOSPC);
            history.one_of_each(|_| (), |history, _| history.recover());
            unharmed = history.is_unharmed();
        });
        if unharmed {
            break;
        }
        let range = at + 1..at + 24;
        let steps = &recorded.steps[..recorded.steps.len().min(range.end)];
        // So that the first of the cuts is at another distance each time.
        match power_cuts(&recorded, steps, range, stride, 2 * operations as u64) {
            Ok(count) => states += count,
            Err(why) => panic!("operation {operations} failed: {why}"),
        }
    }
    println!("{states} disks after power cuts that came after failures");
}

/// A synchronisation: of what, by the name that a file was made under or a directory's with a slash behind it, and
/// whether a process made it that took over from one that had died.
struct Sync<'s> {
    of: &'s str,
    taking_over: bool,
}

type LeftOut = fn(&Sync<'_>) -> bool;

/// A record in which some synchronisations have been left out.
fn without(recorded: &Recorded, left_out: LeftOut) -> Vec<Step> {
    let mut made = HashMap::new();
    let mut left = recorded.steps.clone();
    for (position, step) in left.iter_mut().enumerate() {
        let name = match (&step.op, step.file) {
            (Op::Create { path }, Some(file)) => {
                made.insert(file, path.display().to_string());
                continue;
            }
            (Op::Sync, Some(file)) => made[&file].clone(),
            (Op::SyncDir { path }, _) => format!("{}/", path.display()),
            _ => continue,
        };
        let taking_over = recorded.taken_over.iter().any(|range| range.contains(&position));
        if left_out(&Sync { of: &name, taking_over }) {
            // Of no file, it makes nothing durable.
            *step = Step { file: None, op: Op::Sync };
        }
    }
    left
}

/// A process that dies at any operation, another that goes on with its work, and then a power cut: after every 100th
/// operation, or as `STORAGE_BLOCK_POWER_STRIDE` says.
#[test]
fn what_the_dead_left_is_durable_before_it_is_relied_on() {
    let retried = retried(1);
    let stride = number("STORAGE_BLOCK_POWER_STRIDE", 100);
    let mut states = 0;
    for (recorded, operations) in retried.iter().zip(0..) {
        match power_cuts(recorded, &recorded.steps, 0..usize::MAX, stride, operations) {
            Ok(count) => states += count,
            Err(why) => panic!("the process died after {operations} operations: {why}"),
        }
        if operations % 50 == 49 {
            println!("process {operations} of {}: {states} disks after power cuts so far", retried.len());
        }
    }
    println!("{states} disks after power cuts, {} processes having died", retried.len() - 1);
}

/// Each kind of synchronisation is one that the test above would miss.
#[test]
fn synchronisations_left_out_would_be_seen() {
    let kinds: [(&str, LeftOut); 18] = [
        ("packs", |sync| sync.of.ends_with(".pack.tmp")),
        ("indices", |sync| sync.of.ends_with(".index.tmp")),
        ("roots", |sync| sync.of.contains("/snapshots/.tmp")),
        ("overlays", |sync| sync.of.ends_with("/overlay")),
        ("logs", |sync| sync.of.ends_with("/log.tmp")),
        ("logs of volumes that are encrypted", |sync| sync.of.ends_with("/log")),
        ("names of packs", |sync| sync.of.ends_with("/packs/")),
        ("names of roots", |sync| sync.of.ends_with("/snapshots/")),
        ("names in a volume", |sync| sync.of.starts_with("volume-") && sync.of.ends_with('/')),
        ("names of volumes", |sync| sync.of == "/"),
        ("names in a store", |sync| sync.of.ends_with("/store/")),
        ("a store's name", |sync| sync.of.ends_with("/deeper/")),
        ("the name above", |sync| sync.of == "much/"),
        ("indices when a store is opened", |sync| sync.taking_over && sync.of.ends_with(".index.tmp")),
        ("packs when a store is opened", |sync| sync.taking_over && sync.of.ends_with("/packs/")),
        ("roots when a store is opened", |sync| sync.taking_over && sync.of.ends_with("/snapshots/")),
        ("names when a volume is opened", |sync| {
            sync.taking_over && sync.of.starts_with("volume-") && sync.of.ends_with('/')
        }),
        ("logs when a volume is opened", |sync| sync.taking_over && sync.of.contains("/log")),
    ];
    let random = [random(1, 50, 20)];
    let mut all_retried: HashMap<u64, Vec<Recorded>> = HashMap::new();
    for (what, left_out) in kinds {
        // Where it is a dead process's work that is not made durable, the next calls are those that rely on it. In one
        // history what the process was about may be nothing that could be missed.
        let seen = if what.ends_with("opened") {
            (1..=4).any(|seed| {
                let histories = all_retried.entry(seed).or_insert_with(|| retried(seed));
                would_be_seen(histories, left_out, 40)
            })
        } else {
            would_be_seen(&random, left_out, usize::MAX)
        };
        assert!(seen, "that {what} are not synchronised would not be seen");
    }
}

/// Whether a power cut shows that these synchronisations are left out, within so many steps after a process took over, if
/// that is not all.
fn would_be_seen(histories: &[Recorded], left_out: LeftOut, after: usize) -> bool {
    histories.iter().any(|history| {
        let steps = without(history, left_out);
        let taken_over = history.taken_over.first().filter(|_| after < usize::MAX);
        let from = taken_over.map_or(0, |range| range.start);
        let range = from..from.saturating_add(after);
        steps != history.steps && power_cuts(history, &steps, range, 3, 1).is_err()
    })
}

/// A log that is rewritten says at every moment what it said before, or what the append said that came last.
#[test]
fn logs_are_rewritten_as_a_whole() {
    let dir = scratch();
    let (root, copy) = (dir.path().join("root"), dir.path().join("copy"));
    std::fs::create_dir(&root).unwrap();
    let tape = Tape::record(&root);
    let (size, blocks) = (1 << 30, 1 << 18);
    let mut log = Log::create(&root, size, None, None).unwrap();
    fs::sync_dir(&root).unwrap();
    let expected = StateMap::default();
    let mut appends = vec![(tape.position(), expected.runs(0, blocks))];
    let renamed = |tape: &Tape| -> Vec<usize> {
        let steps = tape.steps().into_iter().enumerate();
        steps.filter(|(_, step)| matches!(step.op, Op::Rename { .. })).map(|(at, _)| at).collect()
    };
    for round in 0.. {
        // Enough records for the log to be rewritten, and little that they come to.
        let runs: Vec<Run> = (0..20_000)
            .map(|n| Run { first: (n + round) % 5000, count: 1 + n % 3, state: State::Overlay })
            .chain([Run { first: round * 7 % 5000, count: 3, state: State::Zero }])
            .collect();
        runs.iter().for_each(|run| expected.set(*run));
        assert!(log.append(&runs).is_ok());
        appends.push((tape.position(), expected.runs(0, blocks)));
        // The first time it is written at all.
        if renamed(&tape).get(1).is_some_and(|at| at + 20 < tape.position()) {
            break;
        }
        assert!(round < 20, "it is never rewritten");
    }
    drop(log);

    let (steps, renamed) = (tape.steps(), renamed(&tape));
    let (mut replay, mut random, mut seen) = (Replay::from(Disk::default()), Random(1), HashSet::new());
    for (step, now) in steps.iter().zip(1..) {
        replay.step(step);
        if !renamed.iter().any(|at| (at.saturating_sub(12)..at + 30).contains(&now)) {
            continue;
        }
        let Some(acked) = appends.iter().rposition(|(acked, _)| *acked <= now) else { continue };
        let (names, content) = replay.pending();
        for cut in cuts(names, content) {
            let disk = replay.cut(cut, &mut random);
            if !seen.insert((disk.digest(), acked)) {
                continue;
            }
            disk.put(&copy);
            let (_, map) = Log::open(&copy).unwrap_or_else(|e| panic!("step {now}, {cut:?}: {e}"));
            std::fs::remove_dir_all(&copy).unwrap();
            let found = map.runs(0, blocks);
            let whole = appends[acked..].iter().take(2).any(|(_, runs)| *runs == found);
            assert!(whole, "step {now}, {cut:?}: {} runs", found.len());
        }
    }
    println!("{} logs after power cuts", seen.len());
}

//! A record of everything that is done to the files of one directory, in the order in which it is done.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use crate::store::lock;
use crate::testing::Random;

/// Something done to a file or a name. Paths in a record are relative to the directory recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Create { path: PathBuf },
    Write { offset: u64, bytes: Vec<u8> },
    SetLen { len: u64 },
    Reserve { len: u64 },
    Punch { offset: u64, len: u64 },
    Sync,
    Rename { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf },
    Symlink { path: PathBuf, target: String },
    CreateDir { path: PathBuf },
    RemoveDir { path: PathBuf },
    SyncDir { path: PathBuf },
}

/// A file, whatever its name is at the moment.
pub(crate) type FileId = usize;

/// What was done, and to which file, but for what is done to a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) file: Option<FileId>,
    pub(crate) op: Op,
}

/// A recorder for a directory, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Tape {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    steps: Vec<Step>,
    names: HashMap<PathBuf, FileId>,
    files: usize,
    fault: Option<Fault>,
    /// Of the threads that have done something each lets others go first, now and then.
    unrest: Option<Random>,
}

/// What becomes of an operation when so many have been recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) at: usize,
    pub(crate) error: rustix::io::Errno,
    /// The one after it goes well again; else everything fails, as it does for a process that is dead.
    pub(crate) once: bool,
}

/// Where a handle's operations are recorded.
#[derive(Debug, Clone)]
pub(crate) struct Track {
    tape: Arc<Tape>,
    file: Option<FileId>,
}

/// Every tape of the process: its tests run side by side, each with directories of its own.
static TAPES: Mutex<Vec<Weak<Tape>>> = Mutex::new(Vec::new());

impl Tape {
    /// Records what is done in a directory that is empty, or not there yet.
    pub(crate) fn record(root: &Path) -> Arc<Self> {
        Self::record_over(root, std::iter::empty())
    }

    /// Records what is done in a directory where there are files with these names already.
    pub(crate) fn record_over<'n>(
        root: &Path,
        there: impl Iterator<Item = (&'n PathBuf, FileId)>,
    ) -> Arc<Self> {
        let names: HashMap<PathBuf, FileId> = there.map(|(path, file)| (path.clone(), file)).collect();
        let state = State { files: names.len(), names, ..State::default() };
        let tape = Arc::new(Self { root: root.to_owned(), state: Mutex::new(state) });
        let mut tapes = lock(&TAPES);
        tapes.retain(|tape| tape.strong_count() > 0);
        tapes.push(Arc::downgrade(&tape));
        tape
    }

    /// How much has been recorded.
    pub(crate) fn position(&self) -> usize {
        lock(&self.state).steps.len()
    }

    /// Has operations fail from now on, or none.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        lock(&self.state).fault = fault;
    }

    /// Has threads do things in other orders than those that they would be left to.
    pub(crate) fn set_unrest(&self, seed: u64) {
        lock(&self.state).unrest = Some(Random(seed));
    }

    /// Whether a fault is still to come.
    pub(crate) fn fault(&self) -> Option<Fault> {
        lock(&self.state).fault
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        lock(&self.state).steps.clone()
    }
}

/// The track for what is done to names, if anybody records there.
pub(crate) fn of(path: &Path) -> Option<Track> {
    let tapes = lock(&TAPES);
    let tape = tapes.iter().filter_map(Weak::upgrade).find(|tape| path.starts_with(&tape.root))?;
    Some(Track { tape, file: None })
}

/// The track for an open file.
pub(crate) fn of_file(path: &Path) -> Option<Track> {
    let mut track = of(path)?;
    let relative = path.strip_prefix(&track.tape.root).unwrap();
    track.file = lock(&track.tape.state).names.get(relative).copied();
    Some(track)
}

/// Does something, and records it if it succeeds. The order of the record is the order of the deeds.
///
/// A write is recorded whole even if the system takes a part of it; whoever wrote goes on with the rest.
pub(crate) fn act<T>(
    track: &Option<Track>,
    op: impl FnOnce() -> Op,
    act: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(track) = track else { return act() };
    let mut state = lock(&track.tape.state);
    state.fail()?;
    let done = act()?;
    state.note(&track.tape.root, track.file, op());
    let yields = state.unrest.as_mut().map_or(0, |random| random.below(4) * random.below(10));
    drop(state);
    (0..yields).for_each(|_| std::thread::yield_now());
    Ok(done)
}

impl State {
    fn fail(&mut self) -> io::Result<()> {
        match self.fault {
            Some(fault) if fault.at <= self.steps.len() => {
                self.fault = (!fault.once).then_some(fault);
                Err(fault.error.into())
            }
            _ => Ok(()),
        }
    }

    fn note(&mut self, root: &Path, mut file: Option<FileId>, mut op: Op) {
        let relative = |path: &mut PathBuf| *path = path.strip_prefix(root).unwrap().to_owned();
        match &mut op {
            Op::Create { path } | Op::Symlink { path, .. } => {
                relative(path);
                if self.names.contains_key(path) {
                    return;
                }
                file = Some(self.files);
                self.names.insert(path.clone(), self.files);
                self.files += 1;
            }
            Op::Rename { from, to } => {
                relative(from);
                relative(to);
                file = self.names.remove(from);
                self.names.extend(file.map(|file| (to.clone(), file)));
            }
            Op::Remove { path } => {
                relative(path);
                file = self.names.remove(path);
            }
            Op::CreateDir { path } | Op::RemoveDir { path } | Op::SyncDir { path } => relative(path),
            Op::Write { .. } | Op::SetLen { .. } | Op::Reserve { .. } | Op::Punch { .. } | Op::Sync => {}
        }
        self.steps.push(Step { file, op });
    }
}

/// Everything is recorded, with the file it was done to, and nothing of another directory.
#[test]
fn what_is_done_to_files_is_recorded() {
    use std::os::unix::fs::FileExt as _;

    use crate::fs::{self, File};

    let dir = tempfile::tempdir().unwrap();
    let (here, elsewhere) = (dir.path().join("here"), dir.path().join("elsewhere"));
    let tape = Tape::record(&here);
    for dir in [&here, &elsewhere] {
        fs::create_dir_all(dir).unwrap();
        let file = File::create_new(&dir.join("a")).unwrap();
        fs::rename(&dir.join("a"), &dir.join("b")).unwrap();
        file.write_all_at(b"x", 1).unwrap();
        file.try_clone().unwrap().sync_data().unwrap();
        File::open_or_create(&dir.join("b")).unwrap().set_len(5).unwrap();
        File::create(&dir.join("b")).unwrap();
        fs::write_named(&dir.join("c"), b"y").unwrap();
        fs::write_named(&dir.join("missing/c"), b"y").unwrap_err();
        assert!(fs::write_named(dir, b"y").is_err(), "a directory cannot be replaced");
        fs::remove_file(&dir.join("b")).unwrap();
        fs::sync_dir(dir).unwrap();
    }
    let steps = tape.steps();
    let Op::Create { path: temporary } = &steps[7].op else { panic!("{steps:?}") };
    let step = |file, op| Step { file, op };
    let create = |path: &Path| Op::Create { path: path.into() };
    let whole = [
        step(None, Op::CreateDir { path: "".into() }),
        step(Some(0), create(Path::new("a"))),
        step(Some(0), Op::Rename { from: "a".into(), to: "b".into() }),
        step(Some(0), Op::Write { offset: 1, bytes: b"x".to_vec() }),
        step(Some(0), Op::Sync),
        step(Some(0), Op::SetLen { len: 5 }),
        step(Some(0), Op::SetLen { len: 0 }),
        step(Some(1), create(temporary)),
        step(Some(1), Op::Write { offset: 0, bytes: b"y".to_vec() }),
        step(Some(1), Op::Sync),
        step(Some(1), Op::Rename { from: temporary.clone(), to: "c".into() }),
        step(Some(0), Op::Remove { path: "b".into() }),
        step(None, Op::SyncDir { path: "".into() }),
    ];
    assert_eq!(steps, whole);
    assert!(std::fs::read_dir(&here).unwrap().count() == 1, "only c is left");
}

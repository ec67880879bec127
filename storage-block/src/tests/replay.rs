//! What a disk may hold when the power goes: a record of operations, played back as far as it was durable, and
//! of the rest any part.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::tape::{FileId, Op, Step};
use crate::testing::Random;

const SECTOR: usize = 512;

/// Files, and the names they have. A file or directory in a directory that has no name is not there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    /// What a directory's name leads to is `None`.
    names: BTreeMap<PathBuf, Option<FileId>>,
    files: BTreeMap<FileId, Arc<Content>>,
    /// Which of them are symbolic links: what they hold is where they lead.
    links: BTreeSet<FileId>,
}

/// A file's bytes, and what they hash to once somebody has asked.
#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    digest: OnceLock<u64>,
}

impl Content {
    fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            self.bytes.hash(&mut hasher);
            hasher.finish()
        })
    }
}

/// Which names a file system may lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Names {
    /// They become durable in the order of a journal.
    Ordered,
    /// Of those in a directory that was not synchronised since, any may be lost and any kept.
    Any,
}

/// A power cut: what becomes of the operations that no synchronisation has covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) names: Names,
    pub(crate) keep_names: Keep,
    pub(crate) keep_content: Keep,
}

/// Which of a list of operations take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    All,
    Nothing,
    /// All but the one so far from the end.
    But(usize),
    /// The one so far from the end alone.
    Only(usize),
    /// Those whose bits are set.
    These(u32),
    /// A random part, of writes single sectors.
    Some,
}

impl Keep {
    fn takes(self, number: usize, count: usize, random: &mut Random) -> bool {
        match self {
            Self::All => true,
            Self::Nothing => false,
            Self::But(last) => number + last + 1 != count,
            Self::Only(last) => number + last + 1 == count,
            Self::These(bits) => bits >> number & 1 == 1,
            Self::Some => random.below(2) == 0,
        }
    }
}

/// Plays a record back step by step.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    durable: Disk,
    content: Vec<Step>,
    names: Vec<Step>,
    /// As many of `names` as came before the last synchronisation of any directory.
    journaled: usize,
}

impl Replay {
    /// From what was there when the record began.
    pub(crate) fn from(durable: Disk) -> Self {
        Self { durable, ..Self::default() }
    }

    /// Goes on by a step.
    pub(crate) fn step(&mut self, step: &Step) {
        match &step.op {
            Op::Write { .. } | Op::SetLen { .. } | Op::Punch { .. } => self.content.push(step.clone()),
            Op::Reserve { .. } => {}
            Op::Sync => {
                self.content
                    .iter()
                    .filter(|s| s.file == step.file)
                    .for_each(|s| self.durable.write(s, |_| true));
                self.content.retain(|pending| pending.file != step.file);
            }
            Op::SyncDir { path } => {
                self.names.iter().filter(|step| directory(step) == path).for_each(|s| self.durable.name(s));
                self.names.retain(|pending| directory(pending) != path);
                self.journaled = self.names.len();
            }
            _ => self.names.push(step.clone()),
        }
    }

    /// The disk if the power goes now.
    pub(crate) fn cut(&self, cut: Cut, random: &mut Random) -> Disk {
        let mut disk = self.durable.clone();
        let pending = match cut.names {
            Names::Any => &self.names[..],
            Names::Ordered => {
                let (journaled, pending) = self.names.split_at(self.journaled);
                journaled.iter().for_each(|step| disk.name(step));
                let count = match cut.keep_names {
                    Keep::Some => random.below(pending.len() as u64 + 1) as usize,
                    _ => pending.len(),
                };
                &pending[..count]
            }
        };
        let keep = match (cut.names, cut.keep_names) {
            (Names::Ordered, Keep::Some) => Keep::All,
            (_, keep) => keep,
        };
        for (number, step) in pending.iter().enumerate() {
            if keep.takes(number, pending.len(), random) {
                disk.name(step);
            }
        }
        for (number, step) in self.content.iter().enumerate() {
            match cut.keep_content {
                // The bytes of a write reach the disk one sector at a time.
                Keep::Some if random.below(2) == 0 => disk.write(step, |_| random.below(2) == 0),
                keep if keep.takes(number, self.content.len(), random) => disk.write(step, |_| true),
                _ => {}
            }
        }
        disk
    }

    /// How many operations no synchronisation has covered: of names, and of content.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.names.len(), self.content.len())
    }
}

/// The directory that a name was made or removed in.
fn directory(step: &Step) -> &Path {
    match &step.op {
        Op::Create { path }
        | Op::Symlink { path, .. }
        | Op::Remove { path }
        | Op::CreateDir { path }
        | Op::RemoveDir { path }
        | Op::Rename { to: path, .. } => path.parent().unwrap_or(Path::new("")),
        _ => panic!("{step:?} is not one of names"),
    }
}

impl Disk {
    /// What is in a directory.
    pub(crate) fn load(root: &Path) -> Self {
        let mut disk = Self::default();
        disk.load_dir(root, Path::new(""));
        disk
    }

    fn load_dir(&mut self, root: &Path, dir: &Path) {
        self.names.insert(dir.to_owned(), None);
        for entry in std::fs::read_dir(root.join(dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                self.load_dir(root, &path);
            } else {
                let file = self.files.len();
                let bytes = match entry.file_type().unwrap().is_symlink() {
                    true => {
                        self.links.insert(file);
                        std::fs::read_link(entry.path()).unwrap().into_os_string().into_vec()
                    }
                    false => std::fs::read(entry.path()).unwrap(),
                };
                self.files.insert(file, Arc::new(Content { bytes, digest: OnceLock::new() }));
                self.names.insert(path, Some(file));
            }
        }
    }

    /// The names of files, in the order of [`load`](Self::load).
    pub(crate) fn names(&self) -> impl Iterator<Item = (&PathBuf, FileId)> {
        self.names.iter().filter_map(|(path, file)| Some((path, (*file)?)))
    }

    fn name(&mut self, step: &Step) {
        match &step.op {
            Op::Create { path } => {
                self.names.insert(path.clone(), step.file);
            }
            Op::Symlink { path, target } => {
                self.names.insert(path.clone(), step.file);
                if let Some(file) = step.file {
                    let bytes = target.as_bytes().to_vec();
                    self.files.insert(file, Arc::new(Content { bytes, digest: OnceLock::new() }));
                    self.links.insert(file);
                }
            }
            Op::Rename { from, to } => {
                self.unname(from, step.file);
                self.names.insert(to.clone(), step.file);
            }
            Op::Remove { path } => self.unname(path, step.file),
            Op::CreateDir { path } => {
                self.names.insert(path.clone(), None);
            }
            Op::RemoveDir { path } => self.unname(path, None),
            _ => {}
        }
    }

    fn unname(&mut self, path: &Path, file: Option<FileId>) {
        if self.names.get(path) == Some(&file) {
            self.names.remove(path);
        }
    }

    /// Does what a step does to a file's content, in the sectors that `takes` says.
    fn write(&mut self, step: &Step, mut takes: impl FnMut(usize) -> bool) {
        let Some(file) = step.file else { return };
        let known = self.files.entry(file).or_default();
        if Arc::get_mut(known).is_none() {
            *known = Arc::new(Content { bytes: known.bytes.clone(), digest: OnceLock::new() });
        }
        let Some(Content { bytes: content, digest }) = Arc::get_mut(known) else { return };
        *digest = OnceLock::new();
        match &step.op {
            Op::SetLen { len } if takes(0) => content.resize(*len as usize, 0),
            Op::Write { offset, bytes } => change(content, *offset as usize, bytes, takes),
            Op::Punch { offset, len } => {
                let end = (*offset + *len).min(content.len() as u64);
                let zeroes = vec![0; end.saturating_sub(*offset) as usize];
                change(content, *offset as usize, &zeroes, takes);
            }
            _ => {}
        }
    }

    /// The same for the same names and bytes.
    pub(crate) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (path, file) in self.names.iter().filter(|(path, _)| self.reachable(path)) {
            (path, file.map(|file| self.files.get(&file).map(|content| content.digest()))).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn reachable(&self, path: &Path) -> bool {
        path.ancestors().skip(1).all(|dir| dir == Path::new("") || self.names.get(dir) == Some(&None))
    }

    /// Makes the files.
    pub(crate) fn put(&self, root: &Path) {
        std::fs::create_dir_all(root).unwrap();
        for (path, file) in self.names.iter().filter(|(path, _)| self.reachable(path)) {
            match file {
                None => std::fs::create_dir_all(root.join(path)).unwrap(),
                Some(file) if self.links.contains(file) => {
                    let target = OsStr::from_bytes(&self.files[file].bytes);
                    std::os::unix::fs::symlink(target, root.join(path)).unwrap();
                }
                Some(file) => {
                    let content = self.files.get(file).map_or(&[][..], |content| &content.bytes);
                    std::fs::write(root.join(path), content).unwrap();
                }
            }
        }
    }
}

/// Overwrites those sectors of a range that `takes` says.
fn change(content: &mut Vec<u8>, offset: usize, bytes: &[u8], mut takes: impl FnMut(usize) -> bool) {
    let mut at = offset;
    while at < offset + bytes.len() {
        let end = (at / SECTOR * SECTOR + SECTOR).min(offset + bytes.len());
        if takes(at / SECTOR) {
            if content.len() < end {
                content.resize(end, 0);
            }
            content[at..end].copy_from_slice(&bytes[at - offset..end - offset]);
        }
        at = end;
    }
}

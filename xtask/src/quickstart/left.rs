//! What the quick start leaves behind: nothing of this process's, and in the region's directory what
//! was there before and what its images name.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ami_core::Image;
use anyhow::{Context as _, Result, ensure};
use instance_core::machine::Hypervisor;
use instance_core::testing::FakeHypervisor;
use instance_core::{InstanceState, Region};

use super::report::Left;

/// How long a thread that was joined may still be seen in `/proc`.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a region keeps snapshots.
const SNAPSHOTS: &str = "blocks/snapshots";

/// What this process holds: threads, descriptors, children.
#[derive(Debug)]
pub(crate) struct Held {
    threads: usize,
    descriptors: BTreeSet<String>,
    children: BTreeSet<u32>,
}

impl Held {
    pub(crate) fn now() -> Result<Self> {
        let threads = fs::read_dir("/proc/self/task").context("cannot count the threads")?.count();
        Ok(Self { threads, descriptors: descriptors()?, children: children()? })
    }

    /// That no more is held than was held then.
    pub(crate) fn check(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let now = Self::now()?;
            let more = now.threads.saturating_sub(self.threads);
            let open: Vec<_> = now.descriptors.difference(&self.descriptors).collect();
            let running: Vec<_> = now.children.difference(&self.children).collect();
            if more == 0 && open.is_empty() && running.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "this process still holds {more} threads, the descriptors {open:?}, the children {running:?}"
            );
            thread::yield_now();
        }
    }
}

/// This process's open files, but for the directory that is read here.
fn descriptors() -> Result<BTreeSet<String>> {
    let mut descriptors = BTreeSet::new();
    for entry in fs::read_dir("/proc/self/fd").context("cannot list the open files")? {
        let entry = entry.context("cannot list the open files")?;
        // The one that reads the list is gone by now.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if !target.ends_with("fd") || !target.starts_with("/proc") {
            descriptors.insert(format!("{} ({})", entry.file_name().to_string_lossy(), target.display()));
        }
    }
    Ok(descriptors)
}

/// The processes whose parent is this one, those among them that have ended and were not waited for.
fn children() -> Result<BTreeSet<u32>> {
    let mut children = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("cannot list the processes")? {
        let name = entry.context("cannot list the processes")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that is not there any more is no child.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if parent(&stat) == Some(std::process::id()) {
            children.insert(pid);
        }
    }
    Ok(children)
}

/// The parent's id in a line of `/proc/PID/stat`: `PID (NAME) STATE PARENT …`, where NAME may be anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// What a region holds of others: an earlier run that was interrupted leaves an instance, which is found
/// stopped, with its volume.
#[derive(Debug)]
pub(crate) struct Before {
    instances: BTreeSet<String>,
    /// Paths relative to the region's directory.
    kept: BTreeSet<PathBuf>,
}

impl Before {
    /// What is in `region`, which was just opened in `dir`.
    pub(crate) fn of(region: &Region<impl Hypervisor>, dir: &Path) -> Result<Self> {
        Ok(Self { instances: instances(region), kept: kept(dir)? })
    }

    /// That the closed region in `dir` consists of this and of its images: no further volume, no further
    /// instance, no file that no image names, and nothing that a new owner would clear away.
    pub(crate) fn check<'a>(&self, dir: &Path, made: impl Iterator<Item = &'a str>) -> Result<Left> {
        let (files, kept_now) = (list(dir)?, kept(dir)?);
        let (snapshots, others): (Vec<_>, Vec<_>) =
            kept_now.difference(&self.kept).partition(|path| path.starts_with(SNAPSHOTS));
        ensure!(others.is_empty(), "something is left: {others:?}");
        let region = Region::open(dir, FakeHypervisor::new()).context("cannot open the region again")?;
        let instances = instances(&region);
        let images = region.images().context("cannot list the images")?;
        drop(region);
        let further: Vec<_> = instances.difference(&self.instances).collect();
        ensure!(further.is_empty(), "the region still has the instances {further:?}");
        for id in made {
            ensure!(images.iter().any(|image| image.ami().id().to_string() == id), "the image {id} is gone");
        }
        let named: BTreeSet<PathBuf> = images.iter().flat_map(snapshots_of).collect();
        let unnamed: Vec<_> = snapshots.into_iter().filter(|path| !named.contains(*path)).collect();
        ensure!(unnamed.is_empty(), "snapshots are left that no image names: {unnamed:?}");
        let lost: Vec<_> = self.kept.union(&named).filter(|path| !kept_now.contains(*path)).collect();
        ensure!(lost.is_empty(), "the region no longer holds {lost:?}");
        let cleared: Vec<_> = files.difference(&list(dir)?).cloned().collect();
        ensure!(cleared.is_empty(), "files were left that nothing needs: {cleared:?}");

        let mut bytes_on_disk = 0;
        for path in &files {
            bytes_on_disk += dir.join(path).metadata().context("a file is gone")?.blocks() * 512;
        }
        Ok(Left { images: images.len(), files: files.len(), bytes_on_disk })
    }
}

/// Those that are terminated are told of for an hour, and have nothing any more.
fn instances(region: &Region<impl Hypervisor>) -> BTreeSet<String> {
    let all = region.instances().into_iter();
    let alive = all.filter(|instance| instance.state() != InstanceState::Terminated);
    alive.map(|instance| instance.id().to_string()).collect()
}

/// The volumes, snapshots and directories of instances in the region's directory.
fn kept(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut kept = BTreeSet::new();
    for part in ["volumes", "instances", SNAPSHOTS].map(Path::new) {
        let context = || format!("cannot list {}", dir.join(part).display());
        for entry in fs::read_dir(dir.join(part)).with_context(context)? {
            kept.insert(part.join(entry.with_context(context)?.file_name()));
        }
    }
    Ok(kept)
}

/// The files in which the snapshots that an image names begin.
fn snapshots_of(image: &Image) -> Vec<PathBuf> {
    let mappings = image.ami().manifest().block_device_mappings().iter();
    let digests = mappings.filter_map(|mapping| mapping.content());
    digests.map(|digest| Path::new(SNAPSHOTS).join(digest.to_hex())).collect()
}

/// Every file under `dir`, as a path relative to it.
fn list(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(part) = todo.pop() {
        let path = dir.join(&part);
        for entry in fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))? {
            let entry = entry.with_context(|| format!("cannot list {}", path.display()))?;
            let name = part.join(entry.file_name());
            if entry.file_type().context("cannot tell files from directories")?.is_dir() {
                todo.push(name);
            } else {
                files.insert(name);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;
    use std::process::{Command, Stdio};

    use ami_core::{Ami, X86_64};
    use instance_core::testing::tiny_elf;
    use instance_core::{DirectBoot, ImageSource, LaunchSpec, VolumeSpec};
    use storage_block::MemoryDisk;

    use super::*;

    #[test]
    fn sees_files_and_children() {
        let file = File::open("/dev/zero").unwrap();
        let descriptor = format!("{} (/dev/zero)", file.as_raw_fd());
        assert!(Held::now().unwrap().descriptors.contains(&descriptor));
        drop(file);
        assert!(!Held::now().unwrap().descriptors.contains(&descriptor));

        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        assert!(Held::now().unwrap().children.contains(&child.id()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!Held::now().unwrap().children.contains(&child.id()));
    }

    #[test]
    fn sees_what_a_region_should_not_hold() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let before = Before::of(&region, dir.path()).unwrap();
        drop(region);
        let check = || before.check(dir.path(), [].into_iter());
        assert_eq!(check().unwrap().images, 0);
        for (path, said) in [
            ("volumes/vol-1", "something is left"),
            ("instances/i-1", "something is left"),
            ("blocks/snapshots/0123", "no image names"),
            ("boot/0123", "nothing needs"),
        ] {
            fs::write(dir.path().join(path), "").unwrap();
            let error = check().unwrap_err().to_string();
            assert!(error.contains(said), "{path}: {error}");
            let _ = fs::remove_file(dir.path().join(path));
            check().unwrap();
        }
        assert!(before.check(dir.path(), ["ami-1"].into_iter()).is_err());
    }

    #[test]
    fn takes_what_an_interrupted_run_left_for_granted_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let region = open();
        let empty = Before::of(&region, dir.path()).unwrap();
        let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = region.register_image(Ami::<X86_64>::builder("web"), source).unwrap();
        let launch = |region: &Region<FakeHypervisor>| {
            region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
        };
        // Dropped while they run: the next owner finds them stopped.
        launch(&region);
        // No guest has written to that of the instance, which therefore has no files.
        let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
        drop(region);
        let region = open();
        let before = Before::of(&region, dir.path()).unwrap();
        drop(region);
        assert_eq!(before.check(dir.path(), [].into_iter()).unwrap().images, 1);
        let error = empty.check(dir.path(), [].into_iter()).unwrap_err().to_string();
        assert!(error.starts_with("something is left") && error.matches("vol-").count() == 1, "{error}");

        let region = open();
        launch(&region);
        drop(region);
        let error = before.check(dir.path(), [].into_iter()).unwrap_err().to_string();
        assert!(error.contains("still has the instances") && error.matches("i-").count() == 1, "{error}");

        let region = open();
        for instance in region.instances() {
            instance.terminate().unwrap();
        }
        region.delete_volume(volume).unwrap();
        drop(region);
        let error = before.check(dir.path(), [].into_iter()).unwrap_err().to_string();
        assert!(error.contains("no longer holds"), "{error}");
    }

    #[test]
    fn finds_the_parent_behind_any_name() {
        for (stat, expected) in [
            ("12 (cat) S 7 12 1", Some(7)),
            ("12 (a) S 9 (b)) R 8 12 1", Some(8)),
            ("12 (cat)", None),
            ("", None),
        ] {
            assert_eq!(parent(stat), expected, "{stat}");
        }
    }
}

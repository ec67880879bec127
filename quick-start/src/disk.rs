//! Root disks: a GPT with one ext4 partition, made without root and without devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use ami_core::Digest;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;
use gpt::{GptConfig, partition_types};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use uuid::{Uuid, uuid};

use crate::build::absolute;
use crate::error::Context as _;
use crate::host::{FAKEROOT, MKE2FS, Prerequisite, SETPRIV};
use crate::progress::{Progress, Reporter};
use crate::{Error, ErrorKind, Result, process};

/// What is fixed of a disk: the same sources make the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) disk: Uuid,
    pub(crate) partition: Uuid,
    pub(crate) file_system: Uuid,
    /// In bytes; what the files do not need is a hole.
    pub(crate) size: u64,
}

/// The minimal guests'.
pub(crate) const MINIMAL: Layout = Layout {
    disk: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a01"),
    partition: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a02"),
    file_system: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a03"),
    size: 512 * MIB,
};

/// The cloud guests'.
pub(crate) const CLOUD: Layout = Layout {
    disk: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b01"),
    partition: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b02"),
    file_system: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b03"),
    size: 2048 * MIB,
};

/// The root disk of a guest of one's own: a GPT with one ext4 partition, made of a directory without root and without devices.
///
/// ```no_run
/// use quick_start::RootDisk;
///
/// let disk = RootDisk::new("my-guest", 128 << 20);
/// quick_start::require(RootDisk::PREREQUISITES)?;
/// disk.build("disk.raw".as_ref(), "tree".as_ref(), &mut |_| ())?;
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk(Layout);

impl RootDisk {
    /// What has to be on the host to build one.
    pub const PREREQUISITES: &'static [Prerequisite] = &[FAKEROOT, MKE2FS, SETPRIV];

    /// One of `size` bytes, of which what the files do not need is a hole. Its identifiers, and those of its partition and
    /// its file system, follow from `name`.
    pub fn new(name: &str, size: u64) -> Self {
        let id = |of: &str| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&Digest::of(format!("{name}/{of}").as_bytes()).as_bytes()[..16]);
            uuid::Builder::from_custom_bytes(bytes).into_uuid()
        };
        Self(Layout { disk: id("disk"), partition: id("partition"), file_system: id("file-system"), size })
    }

    /// Makes the disk `path`, which is not there yet, of the files below `tree`. They become root's, and of one fixed time, in
    /// the directory as well.
    ///
    /// # Errors
    ///
    /// [`ProgramFailed`](ErrorKind::ProgramFailed) where the files have no room, too; [`Cancelled`](ErrorKind::Cancelled), or
    /// what the host met.
    pub fn build(&self, path: &Path, tree: &Path, tell: &mut dyn FnMut(Progress)) -> Result<()> {
        let (path, tree) = (absolute(path)?, absolute(tree)?);
        let mut reporter = Reporter::new(tell)?;
        build(&path, &self.0, Content::Tree(&tree), &mut reporter)?;
        reporter.finish();
        Ok(())
    }
}

/// Where a file system's content comes from.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    /// A directory, whose files shall all be root's and of one time.
    Tree(&'a Path),
    /// An archive with owners and times of its own, and an empty directory to unpack it in.
    Archive(&'a Path, &'a Path),
}

/// The time of every file of a tree: the day Debian 12 came out.
const FILE_TIME: i64 = 1_686_355_200;

/// The name of a root disk among what is made.
pub(crate) const NAME: &str = "disk.raw";

pub(crate) const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What stays free on either side of the partition.
const MARGIN: u64 = MIB;

/// Makes the disk `path`.
pub(crate) fn build(
    path: &Path,
    layout: &Layout,
    content: Content<'_>,
    reporter: &mut Reporter<'_>,
) -> Result<()> {
    let context = || format!("cannot make the disk {}", path.display());
    let file = File::options().read(true).write(true).create_new(true).open(path).context(context)?;
    file.set_len(layout.size).context(context)?;
    partition(file, layout).map_err(|e| e.about(context()))?;
    // Under fakeroot what tar unpacks has the owners that the archive says, and mke2fs sees them.
    let mut fakeroot = process::fakeroot();
    fakeroot.arg("--");
    let (tree, owner) = match content {
        Content::Tree(tree) => {
            set_times(tree).context(|| "cannot set the times of the root file system's files".to_owned())?;
            fakeroot.env("E2FSPROGS_FAKE_TIME", FILE_TIME.to_string());
            (tree, "root_owner=0:0,")
        }
        Content::Archive(archive, unpacked) => {
            let script = r#"tar -xpf "$1" -C "$2" --numeric-owner; shift 2; exec "$@""#;
            fakeroot.args(["sh", "-ec", script, "sh"]).arg(archive).arg(unpacked);
            (unpacked, "")
        }
    };
    let id = layout.file_system;
    let options = format!("offset={MARGIN},{owner}hash_seed={id},lazy_itable_init=0,lazy_journal_init=0");
    fakeroot.args(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-U"]);
    fakeroot.arg(id.to_string()).arg("-E").arg(options).arg("-d").arg(tree);
    fakeroot.arg(path).arg(((layout.size - 2 * MARGIN) / 4096).to_string());
    process::output(&mut fakeroot, reporter).map_err(|e| e.about(context()))?;
    // What a cache is to give for good is not lost with the page cache.
    let done = File::open(path).and_then(|disk| disk.sync_all());
    done.context(context)
}

/// Writes the protective MBR and both partition tables.
fn partition(mut disk: File, layout: &Layout) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::new(ErrorKind::Io, format!("cannot partition it: {e}"));
    let sectors = u32::try_from(layout.size / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut disk).map_err(|e| failed(&e))?;
    let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, Some(layout.disk)).map_err(|e| failed(&e))?;
    let root = Partition {
        part_type_guid: partition_types::LINUX_FS,
        part_guid: layout.partition,
        first_lba: MARGIN / SECTOR,
        last_lba: (layout.size - MARGIN) / SECTOR - 1,
        flags: 0,
        name: "root".to_owned(),
    };
    table.update_partitions(BTreeMap::from([(1, root)])).map_err(|e| failed(&e))?;
    table.write().map(drop).map_err(|e| failed(&e))
}

/// Gives every file under `path` the one fixed time.
fn set_times(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        for entry in fs::read_dir(path)? {
            set_times(&entry?.path())?;
        }
    }
    let time = Timespec { tv_sec: FILE_TIME, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

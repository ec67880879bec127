//! Root disks: a GPT with one ext4 partition, made without root and without devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;
use gpt::{GptConfig, partition_types};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use uuid::{Uuid, uuid};

use crate::process;

/// What is fixed of a disk: the same sources make the same one.
pub(super) struct Layout {
    pub(super) disk: Uuid,
    pub(super) partition: Uuid,
    pub(super) file_system: Uuid,
    /// In bytes; what the files do not need is a hole.
    pub(super) size: u64,
}

/// The quick-start guest's.
pub(super) const QUICK_START: Layout = Layout {
    disk: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a01"),
    partition: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a02"),
    file_system: uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a03"),
    size: 512 * MIB,
};

/// The cloud guest's.
pub(super) const CLOUD: Layout = Layout {
    disk: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b01"),
    partition: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b02"),
    file_system: uuid!("b0a4f5d2-52a0-4f0c-8f5e-2f4d9c7e1b03"),
    size: 2048 * MIB,
};

/// That of the conformance guests of other kernels, which are on disks of their own each.
pub(super) const OTHER: Layout = Layout {
    disk: uuid!("5e0b7a5c-3d0e-4a52-8c1c-6d9a7b2f4e01"),
    partition: uuid!("5e0b7a5c-3d0e-4a52-8c1c-6d9a7b2f4e02"),
    file_system: uuid!("5e0b7a5c-3d0e-4a52-8c1c-6d9a7b2f4e03"),
    size: 128 * MIB,
};

/// Where a file system's content comes from.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    /// A directory, whose files shall all be root's and of one time.
    Tree(&'a Path),
    /// An archive with owners and times of its own, and an empty directory to unpack it in.
    Archive(&'a Path, &'a Path),
}

/// The time of every file of a tree: the day Debian 12 came out.
const FILE_TIME: i64 = 1_686_355_200;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What stays free on either side of the partition.
const MARGIN: u64 = MIB;

/// Makes the disk `path`.
pub(super) fn build(path: &Path, layout: &Layout, content: Content<'_>) -> anyhow::Result<()> {
    let context = || format!("cannot make the disk {}", path.display());
    let file = File::options().read(true).write(true).create_new(true).open(path).with_context(context)?;
    file.set_len(layout.size).with_context(context)?;
    partition(file, layout).with_context(context)?;
    // Under fakeroot what tar unpacks has the owners that the archive says, and mke2fs sees them.
    let mut fakeroot = process::command("fakeroot");
    fakeroot.arg("--");
    let (tree, owner) = match content {
        Content::Tree(tree) => {
            set_times(tree).context("cannot set the times of the root file system's files")?;
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
    process::output(&mut fakeroot).with_context(context).map(drop)
}

/// Writes the protective MBR and both partition tables.
fn partition(mut disk: File, layout: &Layout) -> anyhow::Result<()> {
    let sectors = u32::try_from(layout.size / SECTOR - 1)?;
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut disk).map_err(|error| anyhow!("{error}"))?;
    let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, Some(layout.disk))?;
    let root = Partition {
        part_type_guid: partition_types::LINUX_FS,
        part_guid: layout.partition,
        first_lba: MARGIN / SECTOR,
        last_lba: (layout.size - MARGIN) / SECTOR - 1,
        flags: 0,
        name: "root".to_owned(),
    };
    table.update_partitions(BTreeMap::from([(1, root)]))?;
    table.write()?.sync_all()?;
    Ok(())
}

/// Gives every file under `path` the one fixed time.
fn set_times(path: &Path) -> anyhow::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        for entry in fs::read_dir(path)? {
            set_times(&entry?.path())?;
        }
    }
    let time = Timespec { tv_sec: FILE_TIME, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

//! The quick-start root disk: a GPT with one ext4 partition, made without root and without devices.

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

/// Fixed identities: the same sources make the same disk.
const DISK_GUID: Uuid = uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a01");
pub(super) const PARTITION_GUID: Uuid = uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a02");
const FILE_SYSTEM_UUID: Uuid = uuid!("8d2f0f3e-7b61-4c58-9a7e-1f0c5d5b6a03");
/// The time of every file: the day Debian 12 came out.
const FILE_TIME: i64 = 1_686_355_200;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// The disk's size; most of it is a hole.
const DISK_SIZE: u64 = 512 * MIB;
/// What stays free on either side of the partition.
const MARGIN: u64 = MIB;

/// Makes the disk `path` of the directory tree `tree`.
pub(crate) fn build(path: &Path, tree: &Path) -> anyhow::Result<()> {
    let context = || format!("cannot make the disk {}", path.display());
    let file = File::options().read(true).write(true).create_new(true).open(path).with_context(context)?;
    file.set_len(DISK_SIZE).with_context(context)?;
    partition(file).with_context(context)?;
    set_times(tree).context("cannot set the times of the root file system's files")?;
    let options = format!(
        "offset={MARGIN},root_owner=0:0,hash_seed={FILE_SYSTEM_UUID},lazy_itable_init=0,lazy_journal_init=0"
    );
    let mut mke2fs = process::command("fakeroot");
    mke2fs.args(["--", "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-U"]);
    mke2fs.arg(FILE_SYSTEM_UUID.to_string()).arg("-E").arg(options).arg("-d").arg(tree);
    mke2fs.arg(path).arg(((DISK_SIZE - 2 * MARGIN) / 4096).to_string());
    mke2fs.env("E2FSPROGS_FAKE_TIME", FILE_TIME.to_string());
    process::output(&mut mke2fs).with_context(context).map(drop)
}

/// Writes the protective MBR and both partition tables.
fn partition(mut disk: File) -> anyhow::Result<()> {
    let sectors = u32::try_from(DISK_SIZE / SECTOR - 1)?;
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut disk).map_err(|error| anyhow!("{error}"))?;
    let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, Some(DISK_GUID))?;
    let root = Partition {
        part_type_guid: partition_types::LINUX_FS,
        part_guid: PARTITION_GUID,
        first_lba: MARGIN / SECTOR,
        last_lba: (DISK_SIZE - MARGIN) / SECTOR - 1,
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

//! The records of a region's directory, read as `docs/region-format.md` says, and directories to keep.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ami_core::Digest;
use redb::{ReadableTable, TableDefinition, TableHandle};
use serde_json::Value;
use storage_block::RawFile;

/// Takes out what is empty: what the state store has in reserve, and the holes at the ends of the volumes, which
/// are put back when these are opened; and the marks of new volumes, which say what their files say that are there.
pub(crate) fn make_small(dir: &Path) {
    redb::Database::open(dir.join("region.db")).unwrap().compact().unwrap();
    for volume in fs::read_dir(dir.join("volumes")).unwrap() {
        let volume = volume.unwrap();
        if volume.file_type().unwrap().is_symlink() {
            fs::remove_file(volume.path()).unwrap();
            continue;
        }
        let path = volume.path().join("overlay");
        let disk = RawFile::open(&path, true).unwrap().into_disk();
        let (mut end, mut at) = (0, 0);
        while let Some(data) = disk.next_data(at).unwrap() {
            (end, at) = (data.end, data.end);
        }
        drop(disk);
        File::options().write(true).open(&path).unwrap().set_len(end).unwrap();
    }
}

/// A copy of a golden region.
pub(crate) fn old_region(golden: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    copy(golden, &path);
    (dir, path)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// The records of a closed region, read as the document says, by table and key.
pub(crate) fn records(dir: &Path) -> BTreeMap<String, BTreeMap<String, Value>> {
    let database = redb::Database::open(dir.join("region.db")).unwrap();
    let transaction = database.begin_read().unwrap();
    let names: Vec<String> = transaction.list_tables().unwrap().map(|t| t.name().to_owned()).collect();
    let read = |name: &String| {
        let table = transaction.open_table(TableDefinition::<&str, &[u8]>::new(name)).unwrap();
        let record = |entry: Result<(redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &[u8]>), _>| {
            let (key, value) = entry.unwrap();
            let (digest, json) = value.value().split_at(32);
            let covered = [name.as_bytes(), b"\0", key.value().as_bytes(), b"\0", json].concat();
            assert_eq!(digest, Digest::of(&covered).as_bytes(), "{name} {}", key.value());
            (key.value().to_owned(), serde_json::from_slice(json).unwrap())
        };
        table.iter().unwrap().map(record).collect()
    };
    names.iter().map(|name| (name.clone(), read(name))).collect()
}

/// The names of all fields of the records, with the tables that they are in.
pub(crate) fn fields(records: &BTreeMap<String, BTreeMap<String, Value>>) -> BTreeSet<String> {
    fn collect(path: &str, value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => {
                // What tags are called is up to the user.
                let names = object.iter().filter(|_| !path.ends_with(".tags"));
                names.for_each(|(name, value)| collect(&format!("{path}.{name}"), value, into));
            }
            Value::Array(array) => array.iter().for_each(|value| collect(path, value, into)),
            _ => {}
        }
        into.insert(path.to_owned());
    }
    let mut into = BTreeSet::new();
    records.iter().for_each(|(table, all)| all.values().for_each(|r| collect(table, r, &mut into)));
    into
}

/// The same without what has been added to version 4, which is in records of images and tasks: `golden_images.rs` has it.
pub(crate) fn fields_of_4(records: &BTreeMap<String, BTreeMap<String, Value>>) -> BTreeSet<String> {
    let added = |name: &str| {
        let of_task = |part: &str| name.contains("-image-tasks.description.") && name.contains(part);
        name == "images.source_instance" || of_task(".image_name") || of_task(".state_reason")
    };
    fields(records).into_iter().filter(|name| !added(name)).collect()
}

/// The same of images of instances, which did not say of which image these were made.
pub(crate) fn without_sources(mut fields: BTreeSet<String>) -> BTreeSet<String> {
    fields.retain(|name| !name.starts_with("images.image.sourceImage"));
    fields
}

/// The tables, with the number of the records in each.
pub(crate) fn counts(records: &BTreeMap<String, BTreeMap<String, Value>>) -> Vec<(String, usize)> {
    records.iter().map(|(table, all)| (table.clone(), all.len())).collect()
}

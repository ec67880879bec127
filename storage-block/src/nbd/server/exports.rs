//! The disks that a server offers, by name.

use std::collections::BTreeMap;
use std::sync::RwLock;

use crate::nbd::proto::NAME_MAX;
use crate::store::{read, write};
use crate::{Disk, Error, ErrorKind, Result};

#[derive(Debug, Default)]
pub(in crate::nbd) struct Exports(RwLock<BTreeMap<String, Disk>>);

impl Exports {
    pub(in crate::nbd) fn add(&self, name: &str, disk: Disk) -> Result<()> {
        if name.len() > NAME_MAX {
            let what = format!("a name of {} bytes is longer than an NBD export's can be", name.len());
            return Err(Error::new(ErrorKind::InvalidSize, what));
        }
        let mut exports = write(&self.0);
        if exports.contains_key(name) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("there is an NBD export {name:?}")));
        }
        exports.insert(name.to_owned(), disk);
        Ok(())
    }

    pub(in crate::nbd) fn remove(&self, name: &str) -> Option<Disk> {
        write(&self.0).remove(name)
    }

    pub(in crate::nbd) fn get(&self, name: &[u8]) -> Option<Disk> {
        read(&self.0).get(std::str::from_utf8(name).ok()?).cloned()
    }

    pub(in crate::nbd) fn names(&self) -> Vec<String> {
        read(&self.0).keys().cloned().collect()
    }
}

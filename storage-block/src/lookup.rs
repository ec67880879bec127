//! How the store's objects are found and read, also where some are damaged.

use crate::format::{self, Id, Kind};
use crate::keys::EncryptionKey;
use crate::object::{Found, Object};
use crate::store::{Inner, lock, read, write};
use crate::{Error, ErrorKind, Result};

impl Inner {
    /// Where an object lies, with its packs open, so that it stays readable whatever the sweep does next.
    pub(crate) fn find_open(&self, kind: Kind, id: &Id) -> Result<Found> {
        let find = || read(&self.index).find(id).filter(|found| found.slot.kind == kind);
        if find().is_none() {
            // A root has its name for a moment before its objects are known.
            drop(lock(&self.publishing));
        }
        // The guard keeps the packs' files there until they are open.
        let index = read(&self.index);
        let found = index.find(id).filter(|found| found.slot.kind == kind);
        let found = found.ok_or_else(|| index.lost(kind, id))?;
        found.open()?;
        Ok(found)
    }

    /// The checksum of an object's bytes as they are stored there, if that is where it is to be found now.
    pub(crate) fn checksum(&self, id: &Id, pack: u32, start: u32) -> Option<u32> {
        let place = read(&self.index).places.get(id)?;
        (place.pack == pack && place.slot.start == start).then_some(place.slot.crc)?
    }

    /// Reads an object and checks that it is what its name says. A damaged one is read from a copy, where there is
    /// one; else it counts as damaged from here on, and is stored again when somebody comes with it.
    pub(crate) fn read_object(&self, kind: Kind, id: &Id, key: Option<&EncryptionKey>) -> Result<Vec<u8>> {
        self.read_from_any(kind, id, |object| object.read_checked(key))
    }

    /// Sees the same of one that nobody here needs to have the key of: what is encrypted is compared with its checksum.
    pub(crate) fn check_keyless(&self, kind: Kind, id: &Id) -> Result<()> {
        self.read_from_any(kind, id, |object| object.read_keyless()).map(drop)
    }

    fn read_from_any(
        &self,
        kind: Kind,
        id: &Id,
        read: impl Fn(&Object<'_>) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        loop {
            let error = match self.find_open(kind, id) {
                Ok(found) => match read(&found.object(id)) {
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        (self.mark_damaged(id, &found, &read), error)
                    }
                    result => return result,
                },
                // The pack itself is damaged, or there is no such object.
                Err(error) if error.kind() == ErrorKind::Corrupt => (self.mark_unopened(id), error),
                Err(error) => return Err(error),
            };
            if let (false, error) = error {
                return Err(error);
            }
        }
    }

    /// Reads an object where it was found, and nowhere else. If that is damaged it is not read from there any more; also
    /// says whether it can be read from elsewhere then.
    pub(crate) fn check_found(
        &self,
        id: &Id,
        found: &Found,
        read: impl Fn(&Object<'_>) -> Result<Vec<u8>>,
    ) -> Result<(), (Error, bool)> {
        let (error, is_elsewhere) = match found.open() {
            Ok(()) => match read(&found.object(id)) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    let is_elsewhere = self.mark_damaged(id, found, &read);
                    (error, is_elsewhere)
                }
                Err(error) => (error, false),
            },
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                (error, write(&self.index).mark_damaged(id, found.pack.number, found.slot.start))
            }
            Err(error) => (error, false),
        };
        Err((error, is_elsewhere))
    }

    /// The ids in a manifest leaf.
    pub(crate) fn read_leaf(&self, id: &Id) -> Result<Vec<Id>> {
        Ok(format::split_ids(&self.read_object(Kind::Leaf, id, None)?))
    }

    /// Notes that an object is not what its name says, or rather what it differs from is not. Whether it may now be
    /// read from elsewhere.
    fn mark_damaged(&self, id: &Id, found: &Found, read: impl Fn(&Object<'_>) -> Result<Vec<u8>>) -> bool {
        if let Some((_, Some(own))) = found.object(id).patch {
            let base = Object { own, patch: None };
            if read(&base).is_err_and(|error| error.kind() == ErrorKind::Corrupt) {
                return write(&self.index).mark_damaged(own.id, own.pack.number, own.slot.start);
            }
        }
        write(&self.index).mark_damaged(id, found.pack.number, found.slot.start)
    }

    fn mark_unopened(&self, id: &Id) -> bool {
        let mut index = write(&self.index);
        let Some(found) = index.find(id) else { return false };
        let bad = |found: &Found| found.pack.file().is_err_and(|error| error.kind() == ErrorKind::Corrupt);
        match found.patch.as_ref().and_then(|patch| patch.base.as_ref()) {
            Some(base) if !bad(&found) => index.mark_damaged(&base.id, base.pack.number, base.slot.start),
            _ if bad(&found) => index.mark_damaged(id, found.pack.number, found.slot.start),
            _ => false,
        }
    }
}

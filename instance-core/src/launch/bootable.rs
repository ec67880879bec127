//! What an image boots, which is found out when it is first launched if its record does not say.

use std::sync::{PoisonError, RwLockReadGuard};

use ami_core::{AmiId, BootSource};

use crate::boot_cache::BootPlan;
use crate::record::ImageRecord;
use crate::region::Inner;
use crate::{Error, ErrorKind, Result};

impl Inner {
    /// An image, which neither comes nor goes for now, of which is known what it boots.
    pub(super) fn bootable(&self, id: AmiId) -> Result<(RwLockReadGuard<'_, ()>, ImageRecord)> {
        let found = || {
            let naming = self.naming.read().unwrap_or_else(PoisonError::into_inner);
            self.image(id).map(|record| (naming, record))
        };
        match found()? {
            (naming, record) if record.boot.is_some() => Ok((naming, record)),
            unknown => {
                drop(unknown);
                self.find_what_boots(id)?;
                found()
            }
        }
    }

    /// Finds what an image boots that was put into the catalogue as a record alone, and keeps it.
    fn find_what_boots(&self, id: AmiId) -> Result<()> {
        let record = self.image(id)?;
        if record.boot.is_some() {
            return Ok(());
        }
        let _making = self.begin_making();
        let manifest = record.image.ami().manifest();
        let plan = match manifest.boot().source() {
            BootSource::Direct { kernel, initrd, command_line } => {
                let (kernel, initrd, command_line) = (*kernel, *initrd, command_line.clone());
                let plan = BootPlan { architecture: manifest.architecture(), kernel, initrd, command_line };
                self.boot.boot(&plan).map_err(|e| {
                    let what = format!("the region does not hold the kernel of the image {id}");
                    Error::new(ErrorKind::NotBootable, what).with_source(e)
                })?;
                plan
            }
            _ => {
                let content = manifest.root_device().and_then(|root| root.content().copied());
                let content = content.ok_or_else(|| not_found_to_boot(id))?;
                self.boot.keep_from_disk(&self.content(&content)?.disk())?
            }
        };
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let record = ImageRecord { boot: Some(plan), ..self.image(id)? };
        self.store.commit(|c| c.put(&record))
    }
}

pub(super) fn not_found_to_boot(id: AmiId) -> Error {
    Error::new(ErrorKind::NotBootable, format!("the image {id} names no content of its root volume"))
}

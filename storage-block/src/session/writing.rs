//! A pack that is being appended to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::{INDEX_HEADER, INDEX_RECORD, unit_offset};
use crate::fs::{self, File};
use crate::pack::{self, Pack, Taken};
use crate::store::sync_dir;
use crate::{Error, Result};

/// A pack, and what a session adds to it.
pub(super) struct Writing {
    pub(super) pack: Arc<Pack>,
    pub(super) index: File,
    pub(super) index_path: PathBuf,
    /// The pack has its temporary name still.
    pub(super) new: bool,
    /// What was taken before this session.
    pub(super) start: Taken,
    /// What is taken with what has a place and is not written yet.
    pub(super) taken: Taken,
    pub(super) records: Vec<u8>,
}

impl Writing {
    /// Takes a new pack away again. No crash may find it without its index, so it loses its name first.
    pub(super) fn remove(&self, dir: &Path) -> Result<()> {
        let number = self.pack.number;
        let (pack, index) = (pack::pack_path(dir, number), pack::index_path(dir, number));
        let failed = |e| Error::io(e, format!("cannot remove pack {number} of {}", dir.display()));
        if pack.exists() {
            fs::rename(&pack, &self.pack.path).map_err(failed)?;
            sync_dir(dir)?;
        }
        for name in [&self.pack.path, &index, &self.index_path] {
            if name.exists() {
                fs::remove_file(name).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Gives a pack its old end again. No crash may find a record without its bytes, nor with those of another
    /// object that is written in their place: so the records go first, and for good.
    pub(super) fn cut(&self) -> Result<()> {
        let failed = |e| Error::io(e, format!("cannot cut {}", self.index_path.display()));
        self.index.set_len(index_offset(self.start.records)).map_err(failed)?;
        self.index.sync_data().map_err(failed)?;
        let cut = self.pack.file()?.set_len(unit_offset(self.start.units));
        cut.map_err(|e| Error::io(e, format!("cannot cut {}", self.pack.path.display())))
    }
}

/// Where the record of this number stands in an index.
pub(super) fn index_offset(records: u32) -> u64 {
    (INDEX_HEADER + records as usize * INDEX_RECORD) as u64
}

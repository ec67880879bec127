//! The files of a volume, and when they are made.

use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use ami_core::Digest;

use super::{Inner, OVERLAY, length, mark, parent};
use crate::format::VolumeKey;
use crate::fs::{self, File};
use crate::keys::EncryptionKey;
use crate::log::Log;
use crate::overlay::Overlay;
use crate::store::{Locked, lock};
use crate::{Error, Result, Snapshot};

/// What a volume has on the disk.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) overlay: Overlay,
    pub(super) log: Mutex<Log>,
    /// How durable its names are. Asked under the log's lock.
    pub(super) names: Mutex<Names>,
}

/// How durable the names are by which a volume is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// All of them.
    Durable,
    /// Its [mark](mark) is, and its directory's name.
    Marked,
    /// Nobody has synchronised any. Whether the directory was made for it.
    New { own_dir: bool },
    /// It has none any more: what stands there by now is another volume's.
    Gone,
}

/// What comes of the files, when they are made, of a volume that has none.
#[derive(Default)]
pub(super) enum Unmade {
    /// Nobody is told.
    #[default]
    Untold,
    /// Somebody is.
    Told(Box<dyn FnOnce() + Send>),
    /// The volume was deleted: they have no names, and are for those who still have its disk.
    Deleted,
}

impl Unmade {
    pub(super) fn telling(made: impl FnOnce() + Send + 'static) -> Self {
        Self::Told(Box::new(made))
    }
}

impl fmt::Debug for Unmade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untold => "Untold",
            Self::Told(_) => "Told",
            Self::Deleted => "Deleted",
        })
    }
}

impl Files {
    pub(super) fn new(overlay: Locked, log: Log, key: Option<&EncryptionKey>, names: Names) -> Self {
        let xts = log.header().key.as_ref().zip(key).map(|(stored, key)| key.overlay(&stored.salt));
        Self { overlay: Overlay::new(overlay, xts), log: Mutex::new(log), names: Mutex::new(names) }
    }

    /// Makes the files of a new volume in `dir`, which is made too, or, where `adopt` says so, may stand there with none of a
    /// volume's in it. After a failure nothing is left of what was made.
    pub(super) fn create(
        dir: &Path,
        adopt: bool,
        base: Option<Digest>,
        size: u64,
        key: Option<&EncryptionKey>,
    ) -> Result<Self> {
        let own_dir = match fs::create_dir(dir) {
            Ok(()) => true,
            // A mark beside it is that of a volume whose files a crash has taken.
            Err(e)
                if adopt
                    && e.kind() == std::io::ErrorKind::AlreadyExists
                    && dir.is_dir()
                    && !mark::is_there(dir)?
                    && !Log::is_there(dir)? =>
            {
                false
            }
            Err(e) => return Err(Error::io(e, format!("cannot create {}", dir.display()))),
        };
        let path = dir.join(OVERLAY);
        let overlay = File::create_new(&path).map_err(|e| {
            if own_dir {
                let _ = fs::remove_dir(dir);
            }
            Error::io(e, format!("cannot create {}", path.display()))
        })?;
        if own_dir {
            mark::discard(dir);
        }
        let filled = Self::fill(dir, overlay, base, size, key);
        if filled.is_err() {
            let _ = fs::remove_file(&path);
            if own_dir {
                let _ = fs::remove_dir(dir);
            }
        }
        let (overlay, log) = filled?;
        Ok(Self::new(overlay, log, key, Names::New { own_dir }))
    }

    /// Makes files that nobody finds, beside where those of a volume would be that was deleted without any.
    fn create_nameless(dir: &Path, base: Option<Digest>, size: u64) -> Result<Self> {
        let beside = parent(dir);
        let scratch = tempfile::Builder::new().prefix(".deleted-").tempdir_in(beside);
        let scratch =
            scratch.map_err(|e| Error::io(e, format!("cannot create a file in {}", beside.display())))?;
        let files = Self::create(&scratch.path().join("volume"), false, base, size, None)?;
        *lock(&files.names) = Names::Gone;
        scratch
            .close()
            .map_err(|e| Error::io(e, format!("cannot remove a file from {}", beside.display())))?;
        Ok(files)
    }

    fn fill(
        dir: &Path,
        overlay: File,
        base: Option<Digest>,
        size: u64,
        key: Option<&EncryptionKey>,
    ) -> Result<(Locked, Log)> {
        let overlay = Locked::lock(overlay, &dir.join(OVERLAY))?;
        length::set_len(&overlay, dir, size, || {
            format!("cannot make {} {size} bytes long", dir.join(OVERLAY).display())
        })?;
        let log = Log::create(dir, size, base, key.map(VolumeKey::new).transpose()?)?;
        Ok((overlay, log))
    }

    /// Whether nobody is going to open it again. That does not change while the log is locked.
    pub(super) fn are_deleted(&self) -> bool {
        *lock(&self.names) == Names::Gone
    }
}

impl Inner {
    /// The files, which are made now if there are none.
    pub(super) fn files(&self) -> Result<&Files> {
        match self.files.get() {
            Some(files) => Ok(files),
            None => self.make_files(),
        }
    }

    /// The files of one that is being deleted. Where there are none, those that its disks may still need have no names.
    pub(super) fn files_or_delete(&self) -> Option<&Files> {
        let mut unmade = lock(&self.unmade);
        let files = self.files.get();
        if files.is_none() {
            *unmade = Unmade::Deleted;
        }
        files
    }

    /// Many may come at once, of whom one makes them and the others wait. If that fails, so does what
    /// each came for, and who comes next tries again.
    #[cold]
    fn make_files(&self) -> Result<&Files> {
        let mut unmade = lock(&self.unmade);
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let base = self.base.as_ref().map(Snapshot::digest);
        // One that is encrypted has its files from the beginning.
        let made = match &*unmade {
            Unmade::Deleted => Files::create_nameless(&self.dir, base, self.size())?,
            // What stands there by now is somebody else's.
            Unmade::Untold | Unmade::Told(_) => Files::create(&self.dir, false, base, self.size(), None)?,
        };
        let files = self.files.get_or_init(|| made);
        let then = std::mem::take(&mut *unmade);
        drop(unmade);
        if let Unmade::Told(tell) = then {
            tell();
        }
        Ok(files)
    }
}

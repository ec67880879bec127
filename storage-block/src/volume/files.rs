//! The files of a volume, and when they are made.

use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use ami_core::Digest;

use super::{Inner, OVERLAY, mark};
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

/// Who is told when the files are made of a volume that had none.
#[derive(Default)]
pub(super) struct Told(Option<Box<dyn FnOnce() + Send>>);

impl Told {
    pub(super) fn new(made: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(made)))
    }
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Told").field(&self.0.is_some()).finish()
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

    fn fill(
        dir: &Path,
        overlay: File,
        base: Option<Digest>,
        size: u64,
        key: Option<&EncryptionKey>,
    ) -> Result<(Locked, Log)> {
        let overlay = Locked::lock(overlay, &dir.join(OVERLAY))?;
        overlay.set_len(size).map_err(|e| {
            Error::io(e, format!("cannot make {} {size} bytes long", dir.join(OVERLAY).display()))
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

    /// Many may come at once, of whom one makes them and the others wait. If that fails, so does what
    /// each came for, and who comes next tries again.
    #[cold]
    fn make_files(&self) -> Result<&Files> {
        let mut told = lock(&self.told);
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        // What stands there by now is somebody else's. One that is encrypted has its files from the beginning.
        let base = self.base.as_ref().map(Snapshot::digest);
        let made = Files::create(&self.dir, false, base, self.size(), None)?;
        let files = self.files.get_or_init(|| made);
        let tell = told.0.take();
        drop(told);
        if let Some(tell) = tell {
            tell();
        }
        Ok(files)
    }
}

//! What a region is, and who owns it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use ami_core::{AccountId, AmiId, Digest, ImageState, InstanceId, RegionName, VolumeId};
use storage_block::{Snapshot, Store as BlockStore};

use super::paths::Paths;
use crate::boot_cache::BootCache;
use crate::capacity::Meter;
use crate::directory::{Directory, not_found};
use crate::forget::Remembered;
use crate::instance::Cell;
use crate::launch::{InFlight, Tokens};
use crate::lock::Lock;
use crate::machine::Hypervisor;
use crate::migrate::migrate;
use crate::network::Network;
use crate::options::RegionOptions;
use crate::record::{ImageRecord, RegionRecord};
use crate::snapshots::PendingSnapshots;
use crate::state_changes::Listeners;
use crate::store::{JournaledStore, Known, Store};
use crate::storing::Storing;
use crate::supervisor::Supervisor;
use crate::tasks::Tasks;
use crate::watched::Watched;
use crate::{Error, ErrorKind, Result, VolumeState};

/// What users' handles share: with the last of them the region is closed, then and there.
///
/// The region's own threads hold the region only while they act on it, and would otherwise be the ones
/// to close it whenever the last handle goes meanwhile: later than the user may rely on.
pub(crate) struct Owner(Arc<Inner>);

impl Owner {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self(inner)
    }
}

impl Deref for Owner {
    type Target = Arc<Inner>;

    fn deref(&self) -> &Arc<Inner> {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.pending_snapshots.cut_off();
        self.0.tasks.cut_off();
        // Who is told of something in one of these threads may drop the last handle there, while others of them wait for what
        // this one holds, or for who is told. The region is closed with the last of them.
        let waits = !self.0.tasks.is_own_thread() && !self.0.supervisor.is_own_thread();
        if waits {
            self.0.tasks.join();
        }
        self.0.supervisor.close();
        if waits {
            self.0.supervisor.join();
        }
    }
}

/// What a region is.
///
/// Dropping it ends the machines first, while what they stand on is still there; the lock is the last
/// to go.
pub(crate) struct Inner {
    pub(crate) supervisor: Supervisor,
    pub(crate) cells: Mutex<BTreeMap<InstanceId, Arc<Cell>>>,
    pub(crate) directory: Directory,
    pub(crate) terminated: Remembered,
    pub(crate) tokens: Tokens,
    pub(crate) in_flight: InFlight,
    pub(crate) tasks: Tasks,
    pub(crate) storing: Storing,
    pub(crate) pending_snapshots: PendingSnapshots,
    pub(crate) meter: Meter,
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    pub(crate) network: Option<Box<dyn Network>>,
    pub(crate) ebs_limits: bool,
    pub(crate) network_limits: bool,
    pub(crate) vsock: bool,
    /// The port of guests' on which an agent may listen.
    pub(crate) guest_agent: Option<u32>,
    pub(crate) region: RegionRecord,
    pub(crate) store: Store,
    images: Known<ImageRecord>,
    pub(crate) watched_images: Watched<AmiId, ImageState>,
    pub(crate) watched_volumes: Watched<VolumeId, VolumeState>,
    pub(crate) blocks: BlockStore,
    pub(crate) boot: BootCache,
    /// Held for reading while an image is made, and for writing while what nothing names is collected, which
    /// so does not meet a snapshot that an image is about to name.
    pub(crate) making_images: RwLock<()>,
    /// There may be something to collect: what was being made has failed, or what named content has gone.
    pub(crate) garbage: AtomicBool,
    /// Something could not be collected: from when on whoever has made something tries again.
    pub(crate) collect_again: Mutex<Option<Instant>>,
    /// Held for reading for the moment in which a launch looks at its image and names what it needs of it, and for writing for
    /// that in which an image comes or goes: a launch finds all of an image or none of it, and no two have a name.
    pub(crate) naming: RwLock<()>,
    /// Held while a launch takes its instances' places in the network. Taken after `naming`.
    pub(crate) placing: Mutex<()>,
    /// Held while the record of a volume or a snapshot is looked at and changed. Taken after an instance and
    /// after `naming`, where these are held too.
    pub(crate) resources: Mutex<()>,
    pub(crate) listeners: Listeners,
    pub(crate) paths: Paths,
    _lock: Lock,
}

impl Inner {
    pub(crate) fn open(
        mut options: RegionOptions,
        dir: &Path,
        hypervisor: Box<dyn Hypervisor>,
    ) -> Result<Arc<Self>> {
        let failed = |e| Error::io(e, format!("cannot make the region directory {}", dir.display()));
        fs::create_dir_all(dir).map_err(failed)?;
        let paths = Paths { root: dir.canonicalize().map_err(failed)? };
        let lock = Lock::take(&paths.root)?;
        for dir in [paths.volumes(), paths.instances(), paths.hibernated()] {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let state = match options.state_store.take() {
            Some(state) => state,
            None => Box::new(JournaledStore::open(&paths.database(), &paths.journal())?),
        };
        let store = Store::new(state)?;
        migrate(&store)?;
        let region = match store.get::<RegionRecord>(RegionRecord::KEY)? {
            Some(region) => check_identity(region, &options)?,
            None => new_identity(&store, &options, &paths)?,
        };
        let blocks = BlockStore::open_with(paths.blocks(), &options.blocks)
            .map_err(|e| Error::storage(e, "cannot open the region's snapshots"))?;
        let boot = BootCache::open(paths.root.join("boot"))?;
        let (supervisor, messages) = Supervisor::new();
        let inner = Arc::new(Self {
            supervisor,
            cells: Mutex::default(),
            directory: Directory::default(),
            terminated: Remembered::default(),
            tokens: Tokens::default(),
            in_flight: InFlight::default(),
            tasks: Tasks::default(),
            storing: Storing::default(),
            pending_snapshots: PendingSnapshots::default(),
            meter: Meter::new(options.capacity),
            hypervisor,
            network: options.network.take(),
            ebs_limits: options.ebs_limits,
            network_limits: options.network_limits,
            vsock: options.vsock || options.guest_agent.is_some(),
            guest_agent: options.guest_agent,
            region,
            store,
            images: Known::default(),
            watched_images: Watched::default(),
            watched_volumes: Watched::default(),
            blocks,
            boot,
            making_images: RwLock::default(),
            garbage: AtomicBool::new(false),
            collect_again: Mutex::default(),
            naming: RwLock::default(),
            placing: Mutex::default(),
            resources: Mutex::default(),
            listeners: Listeners::default(),
            paths,
            _lock: lock,
        });
        inner.recover()?;
        (inner.supervisor.start(messages, Arc::downgrade(&inner)))
            .map_err(|e| Error::io(e, "cannot start the region's threads"))?;
        Ok(inner)
    }

    pub(crate) fn cells(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Arc<Cell>>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn image(&self, id: AmiId) -> Result<ImageRecord> {
        let missing = || Error::new(ErrorKind::ImageNotFound, format!("the image id {id} does not exist"));
        self.store.get_known(&id.to_string(), &self.images)?.ok_or_else(missing)
    }

    /// The instance with this id, if it is the account's.
    pub(crate) fn cell(&self, owner: AccountId, id: InstanceId) -> Result<Arc<Cell>> {
        let cell = self.cells().get(&id).cloned();
        cell.filter(|cell| cell.owner == owner).ok_or_else(|| not_found(id))
    }

    /// The content with this digest.
    pub(crate) fn content(&self, digest: &Digest) -> Result<Snapshot> {
        self.blocks.snapshot(digest).map_err(|e| match e.kind() {
            storage_block::ErrorKind::NotFound => {
                let what = format!("the region does not hold the content {digest}");
                Error::new(ErrorKind::SnapshotNotFound, what).with_source(e)
            }
            _ => Error::storage(e, format!("cannot open the content {digest}")),
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Machines first, while what they stand on is still there.
        for cell in self.cells().values() {
            if let Some(record) = cell.release(&self.paths) {
                // It is written when the store is closed, which comes next.
                let _ = self.store.later(|c| c.put(&record));
            }
        }
    }
}

/// Who the region is, if that is who it is taken for.
fn check_identity(region: RegionRecord, options: &RegionOptions) -> Result<RegionRecord> {
    let invalid = |what: String| Err(Error::new(ErrorKind::InvalidParameter, what));
    if options.name.as_ref().is_some_and(|name| *name != region.name) {
        return invalid(format!("the region is called {}", region.name));
    }
    if options.account.as_ref().is_some_and(|account| *account != region.account) {
        return invalid(format!("the region belongs to account {}", region.account));
    }
    Ok(region)
}

/// Makes a region of a directory that is none yet.
fn new_identity(store: &Store, options: &RegionOptions, paths: &Paths) -> Result<RegionRecord> {
    // What nothing names is removed when a region is opened: with its store, it would lose everything.
    for dir in [paths.volumes(), paths.snapshots()] {
        if fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some()) {
            let what = format!(
                "{} has lost its state store, and {} is not empty; put back a copy of region.db and region.journal, or empty the directory",
                paths.root.display(),
                dir.display()
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
    }
    let name = match &options.name {
        Some(name) => name.clone(),
        None => unique_name()?,
    };
    let account = match options.account {
        Some(account) => account,
        None => parse_own("000000000000")?,
    };
    let region = RegionRecord { format: RegionRecord::FORMAT, name, account };
    store.commit(|c| c.put(&region))?;
    Ok(region)
}

/// A name that no other region has, so that no two images anywhere have one id.
fn unique_name() -> Result<RegionName> {
    let unique = uuid::Uuid::new_v4().simple().to_string();
    parse_own(&format!("local-{}", &unique[..12]))
}

fn parse_own<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::new(ErrorKind::Internal, format!("{text} cannot be parsed")))
}

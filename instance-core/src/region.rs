//! A region: a directory with its images, volumes and instances, and the process that owns it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use ami_core::{AccountId, AmiId, Digest, Image, InstanceId, RegionName, VolumeId};
use storage_block::{Store as BlockStore, Volume};

use crate::boot_cache::BootCache;
use crate::instance::{Cell, Instance};
use crate::lock::Lock;
use crate::machine::{Capabilities, Hypervisor};
use crate::record::{FormerImage, ImageRecord, InstanceRecord, RegionRecord, StateReason, VolumeRecord};
use crate::store::{Record, Store};
use crate::supervisor::Supervisor;
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

/// A region, kept in a directory and owned by this handle's process.
///
/// One owner at a time: the directory is locked, and the lock goes with the process. Clones are the
/// same region; the last of them and of its [`Instance`]s closes it, which ends its machines. Their
/// instances are found `stopped` when it is opened again.
///
/// `H` is the hypervisor. Where its type is known, launching an image that it cannot run does not
/// compile; `Region<Box<dyn Hypervisor>>`, the default, finds out when the image is launched.
///
/// ```
/// use instance_core::Region;
/// use instance_core::testing::FakeHypervisor;
///
/// let dir = tempfile::tempdir()?;
/// let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// println!("{} of {} runs {:?}", region.name(), region.account(), region.capabilities().architectures);
/// assert!(region.images()?.is_empty() && region.instances().is_empty());
/// assert!(region.image("ami-0123456789abcdef0".parse()?).is_err(), "it has no images yet");
/// assert!(region.instance("i-0123456789abcdef0".parse()?).is_err());
/// assert!(Region::open(dir.path(), FakeHypervisor::new()).is_err(), "it has an owner");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// An image is launched where the hypervisor is known to run its architecture:
///
/// ```
/// use ami_core::{Ami, X86_64};
/// use instance_core::machine::{Hypervisor, Runs};
/// use instance_core::{InstanceType, LaunchSpec, Region};
///
/// fn launch<H: Hypervisor + Runs<X86_64>>(region: &Region<H>, ami: &Ami<X86_64>, hardware: InstanceType) {
///     let _ = region.launch(ami, LaunchSpec::new(hardware));
/// }
/// ```
///
/// The same with an image for another architecture is refused by the compiler:
///
/// ```compile_fail,E0308
/// use ami_core::{Ami, Arm64, X86_64};
/// use instance_core::machine::{Hypervisor, Runs};
/// use instance_core::{InstanceType, LaunchSpec, Region};
///
/// fn launch<H: Hypervisor + Runs<X86_64>>(region: &Region<H>, ami: &Ami<Arm64>, hardware: InstanceType) {
///     let _ = region.launch(ami, LaunchSpec::new(hardware));
/// }
/// ```
pub struct Region<H = Box<dyn Hypervisor>> {
    pub(crate) inner: Arc<Owner>,
    hypervisor: PhantomData<fn() -> H>,
}

impl<H> Clone for Region<H> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), hypervisor: PhantomData }
    }
}

impl<H> fmt::Debug for Region<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("name", self.name())
            .field("dir", &self.inner.paths.root)
            .finish_non_exhaustive()
    }
}

/// How to open a region.
///
/// ```
/// use instance_core::RegionOptions;
/// use instance_core::testing::FakeHypervisor;
///
/// let dir = tempfile::tempdir()?;
/// let options = RegionOptions::new().name("eu-central-1".parse()?).account("123456789012".parse()?);
/// let region = options.open(dir.path(), FakeHypervisor::new())?;
/// assert_eq!(region.name().as_str(), "eu-central-1");
/// assert_eq!(region.account().to_string(), "123456789012");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct RegionOptions {
    name: Option<RegionName>,
    account: Option<AccountId>,
}

impl RegionOptions {
    /// The defaults: a name that is nobody else's, and account 000000000000.
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the region. The ids of its images depend on it; it is given once, when the
    /// directory is made.
    #[must_use]
    pub fn name(mut self, name: RegionName) -> Self {
        self.name = Some(name);
        self
    }

    /// The account that owns what is made here, given once, when the directory is made.
    #[must_use]
    pub fn account(mut self, account: AccountId) -> Self {
        self.account = Some(account);
        self
    }

    /// Opens the region in `dir`, made when it is not there.
    ///
    /// What an earlier process left half done is finished or undone first: see
    /// [`Region::open`].
    ///
    /// # Errors
    ///
    /// [`RegionInUse`](ErrorKind::RegionInUse) if it has an owner,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) if it has another name or account,
    /// [`Corrupt`](ErrorKind::Corrupt) if its files are not what they should be or of a format that
    /// this version does not know, or what the host met.
    pub fn open<H: Hypervisor>(self, dir: impl AsRef<Path>, hypervisor: H) -> Result<Region<H>> {
        let inner = Inner::open(self, dir.as_ref(), Box::new(hypervisor))?;
        Ok(Region { inner: Arc::new(Owner(inner)), hypervisor: PhantomData })
    }
}

impl<H: Hypervisor> Region<H> {
    /// Opens the region in `dir`, made when it is not there, with [`RegionOptions`]' defaults.
    ///
    /// What an earlier process left is put in order: instances whose machines died with it are
    /// `stopped`, terminations are finished, launches that were never acknowledged are undone, and
    /// files that nothing names are removed.
    ///
    /// # Errors
    ///
    /// As [`RegionOptions::open`].
    pub fn open(dir: impl AsRef<Path>, hypervisor: H) -> Result<Self> {
        RegionOptions::new().open(dir, hypervisor)
    }
}

impl<H> Region<H> {
    /// The region's name.
    pub fn name(&self) -> &RegionName {
        &self.inner.region.name
    }

    /// The account that owns what is made here.
    pub fn account(&self) -> &AccountId {
        &self.inner.region.account
    }

    /// What its hypervisor can do.
    pub fn capabilities(&self) -> Capabilities {
        self.inner.hypervisor.capabilities()
    }

    /// Its images, in the order of their ids.
    ///
    /// # Errors
    ///
    /// What reading the state store met.
    pub fn images(&self) -> Result<Vec<Image>> {
        Ok(self.inner.store.all::<ImageRecord>()?.into_iter().map(|r| r.image).collect())
    }

    /// The image with this id.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what reading the state store met.
    pub fn image(&self, id: AmiId) -> Result<Image> {
        Ok(self.inner.image(id)?.image)
    }

    /// Its instances, in the order of their ids. Those that were terminated are among them for an hour,
    /// or until the region is closed.
    pub fn instances(&self) -> Vec<Instance> {
        self.inner.cells().values().map(|cell| Instance::new(self.inner.clone(), cell.clone())).collect()
    }

    /// The instance with this id.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](ErrorKind::InstanceNotFound).
    pub fn instance(&self, id: InstanceId) -> Result<Instance> {
        let cell = self.inner.cells().get(&id).cloned();
        let missing = || Error::new(ErrorKind::InstanceNotFound, format!("the instance {id} does not exist"));
        Ok(Instance::new(self.inner.clone(), cell.ok_or_else(missing)?))
    }

    /// Every change of state of every instance from now on, as it is committed.
    ///
    /// ```
    /// # use instance_core::{Region, testing::FakeHypervisor};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// let changes = region.state_changes();
    /// let log = std::thread::spawn(move || {
    ///     for change in changes {
    ///         let why = change.reason.map(|r| r.to_string()).unwrap_or_default();
    ///         println!("{:?} {}: {} {why}", change.at, change.instance_id, change.state);
    ///     }
    /// });
    /// drop(region); // with the region the changes end
    /// assert!(log.join().is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn state_changes(&self) -> Receiver<StateChange> {
        let (sender, receiver) = mpsc::channel();
        self.inner.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }
}

/// A change of an instance's state ("EC2 Instance State-change Notification"), from
/// [`Region::state_changes`], which shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StateChange {
    /// Whose.
    pub instance_id: InstanceId,
    /// The state that it has now.
    pub state: InstanceState,
    /// Why, where there is something to say.
    pub reason: Option<StateReason>,
    /// When.
    pub at: SystemTime,
}

/// Where things lie.
#[derive(Debug)]
pub(crate) struct Paths {
    pub(crate) root: PathBuf,
}

impl Paths {
    pub(crate) fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub(crate) fn blocks(&self) -> PathBuf {
        self.root.join("blocks")
    }

    /// Where the block store keeps its snapshots.
    fn snapshots(&self) -> PathBuf {
        self.blocks().join("snapshots")
    }

    pub(crate) fn volume(&self, id: VolumeId) -> PathBuf {
        self.volumes().join(id.to_string())
    }

    pub(crate) fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    pub(crate) fn instance(&self, id: InstanceId) -> PathBuf {
        self.instances().join(id.to_string())
    }
}

/// What users' handles share: with the last of them the region is closed, then and there.
///
/// The region's own thread holds the region only while it acts on it, and would otherwise be the one
/// to close it whenever the last handle goes meanwhile: later than the user may rely on.
pub(crate) struct Owner(Arc<Inner>);

impl Deref for Owner {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.supervisor.stop();
    }
}

/// What a region is.
///
/// Dropping it ends the machines first, while what they stand on is still there; the lock is the last
/// to go.
pub(crate) struct Inner {
    pub(crate) supervisor: Supervisor,
    pub(crate) cells: Mutex<BTreeMap<InstanceId, Arc<Cell>>>,
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    pub(crate) region: RegionRecord,
    pub(crate) store: Store,
    pub(crate) blocks: BlockStore,
    pub(crate) boot: BootCache,
    /// Held for reading while an image is made, and for writing while what nothing names is collected, which
    /// so does not meet a snapshot that an image is about to name.
    pub(crate) making_images: RwLock<()>,
    /// Held for the moment in which a launch looks at its image and names what it needs of it, and for that
    /// in which an image comes or goes: a launch finds all of an image or none of it, and no two have a name.
    pub(crate) naming: Mutex<()>,
    pub(crate) listeners: Mutex<Vec<Sender<StateChange>>>,
    pub(crate) paths: Paths,
    _lock: Lock,
}

impl Inner {
    fn open(options: RegionOptions, dir: &Path, hypervisor: Box<dyn Hypervisor>) -> Result<Arc<Self>> {
        let failed = |e| Error::io(e, format!("cannot make the region directory {}", dir.display()));
        fs::create_dir_all(dir).map_err(failed)?;
        let paths = Paths { root: dir.canonicalize().map_err(failed)? };
        let lock = Lock::take(&paths.root)?;
        for dir in [paths.volumes(), paths.instances()] {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let store = Store::open(&paths.root.join("region.db"))?;
        let region = match store.get::<RegionRecord>(RegionRecord::KEY)? {
            Some(region) => check_identity(region, &options)?,
            None => new_identity(&store, options, &paths)?,
        };
        let blocks = BlockStore::open(paths.blocks())
            .map_err(|e| Error::storage(e, "cannot open the region's snapshots"))?;
        let boot = BootCache::open(paths.root.join("boot"))?;
        let (supervisor, messages) = Supervisor::new();
        let inner = Arc::new(Self {
            supervisor,
            cells: Mutex::default(),
            hypervisor,
            region,
            store,
            blocks,
            boot,
            making_images: RwLock::default(),
            naming: Mutex::default(),
            listeners: Mutex::default(),
            paths,
            _lock: lock,
        });
        inner.recover()?;
        (inner.supervisor.start(messages, Arc::downgrade(&inner)))
            .map_err(|e| Error::io(e, "cannot start the region's thread"))?;
        Ok(inner)
    }

    pub(crate) fn cells(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Arc<Cell>>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn image(&self, id: AmiId) -> Result<ImageRecord> {
        let missing = || Error::new(ErrorKind::ImageNotFound, format!("the image id {id} does not exist"));
        self.store.get(&id.to_string())?.ok_or_else(missing)
    }

    /// Tells whoever listens.
    pub(crate) fn announce(&self, change: &StateChange) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.send(change.clone()).is_ok());
    }

    /// Removes every snapshot and boot file that no image and no volume needs. The caller holds
    /// [`making_images`](Self::making_images) for writing, or is alone.
    pub(crate) fn collect_garbage(&self) -> Result<()> {
        let images = self.store.all::<ImageRecord>()?;
        let mut keep: HashSet<Digest> = images.iter().flat_map(snapshots_of).collect();
        keep.extend(self.store.all::<VolumeRecord>()?.iter().filter_map(|v| v.base));
        self.blocks
            .remove_unreferenced(&keep)
            .map_err(|e| Error::storage(e, "cannot remove the snapshots that nothing names"))?;
        let instances = self.instances_that_live()?;
        self.forget_former_images(&instances)?;
        let plans =
            images.iter().map(|i| &i.boot).chain(instances.iter().filter_map(|i| i.direct_boot.as_ref()));
        self.boot.remove_unreferenced(plans)
    }

    /// The records of instances that need what they were made from.
    pub(crate) fn instances_that_live(&self) -> Result<Vec<InstanceRecord>> {
        let mut instances = self.store.all::<InstanceRecord>()?;
        instances.retain(|i| i.description.state != InstanceState::Terminated);
        Ok(instances)
    }

    /// Forgets the deregistered images that no instance was made from any more.
    fn forget_former_images(&self, instances: &[InstanceRecord]) -> Result<()> {
        let mut former = self.store.all::<FormerImage>()?;
        former.retain(|f| instances.iter().all(|i| i.description.image_id != f.0.ami().id()));
        if former.is_empty() {
            return Ok(());
        }
        self.store.commit(|c| {
            former.iter().for_each(|f| c.remove::<FormerImage>(f.key()));
            Ok(())
        })
    }

    /// Puts in order what the last owner left.
    fn recover(&self) -> Result<()> {
        for record in self.store.all::<InstanceRecord>()? {
            self.recover_instance(record)?;
        }
        let volumes: HashSet<String> =
            self.store.all::<VolumeRecord>()?.iter().map(|v| v.id.to_string()).collect();
        remove_others(&self.paths.volumes(), &volumes)?;
        remove_others(&self.paths.instances(), &HashSet::new())?;
        self.collect_garbage()
    }

    fn recover_instance(&self, mut record: InstanceRecord) -> Result<()> {
        let state = record.description.state;
        let gone = matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated);
        if gone || !record.launched {
            return self.forget(&record);
        }
        if let Some(next) = state.after(Transition::Lost) {
            record.description.state = next;
            record.description.state_reason = Some(StateReason::new(
                "Server.InternalError",
                format!("the process that owned the region ended while the instance was {state}"),
            ));
            self.store.commit(|c| c.put(&record))?;
        }
        let cell = Arc::new(Cell::new(record));
        self.cells().insert(cell.id, cell);
        Ok(())
    }

    /// Removes an instance's record and the volumes that go with it.
    pub(crate) fn forget(&self, record: &InstanceRecord) -> Result<()> {
        let doomed =
            record.description.attachments.iter().filter(|a| a.delete_on_termination || !record.launched);
        let doomed: Vec<VolumeId> = doomed.map(|a| a.volume_id).collect();
        self.remove_volumes(&doomed)?;
        self.store.commit(|c| {
            c.remove::<InstanceRecord>(record.description.id);
            Ok(())
        })
    }

    /// Removes volumes: their records first, so that a crash leaves files that nothing names, not
    /// names without files.
    pub(crate) fn remove_volumes(&self, ids: &[VolumeId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        self.store.commit(|c| {
            ids.iter().for_each(|id| c.remove::<VolumeRecord>(id));
            Ok(())
        })?;
        for id in ids {
            Volume::remove(&self.paths.volume(*id))
                .map_err(|e| Error::storage(e, format!("cannot remove the volume {id}")))?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Machines first, while what they stand on is still there.
        for cell in self.cells().values() {
            cell.release();
        }
    }
}

fn snapshots_of(record: &ImageRecord) -> Vec<Digest> {
    let mappings = record.image.ami().manifest().block_device_mappings();
    mappings.iter().filter_map(|m| m.as_ebs()?.snapshot().copied()).collect()
}

/// Who the region is, if that is who it is taken for.
fn check_identity(region: RegionRecord, options: &RegionOptions) -> Result<RegionRecord> {
    let invalid = |what: String| Err(Error::new(ErrorKind::InvalidParameter, what));
    if region.format != RegionRecord::FORMAT {
        let (found, known) = (region.format, RegionRecord::FORMAT);
        let what = format!("the region directory has format {found}; this version knows format {known}");
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    if options.name.as_ref().is_some_and(|name| *name != region.name) {
        return invalid(format!("the region is called {}", region.name));
    }
    if options.account.as_ref().is_some_and(|account| *account != region.account) {
        return invalid(format!("the region belongs to account {}", region.account));
    }
    Ok(region)
}

/// Makes a region of a directory that is none yet.
fn new_identity(store: &Store, options: RegionOptions, paths: &Paths) -> Result<RegionRecord> {
    // What nothing names is removed when a region is opened: with its store, it would lose everything.
    for dir in [paths.volumes(), paths.snapshots()] {
        if fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some()) {
            let what = format!(
                "{} has lost its state store, and {} is not empty; put back a copy of region.db, or empty the directory",
                paths.root.display(),
                dir.display()
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
    }
    let name = match options.name {
        Some(name) => name,
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

/// Removes every directory in `dir` that is not in `keep`.
fn remove_others(dir: &Path, keep: &HashSet<String>) -> Result<()> {
    let failed = |e| Error::io(e, format!("cannot clear {}", dir.display()));
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !keep.contains(entry.file_name().to_string_lossy().as_ref()) {
            remove_any(&entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Removes a file or a directory, whatever somebody has put there.
pub(crate) fn remove_any(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

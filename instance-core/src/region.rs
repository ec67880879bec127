//! A region: a directory with its images, volumes and instances, and the process that owns it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use ami_core::{AccountId, AmiId, Digest, InstanceId, Page, RegionName, VolumeId};
use storage_block::{Snapshot, Store as BlockStore, StoreOptions};

use crate::boot_cache::BootCache;
use crate::capacity::Meter;
use crate::describe::DescribeInstances;
use crate::description::{InstanceDescription, StateReason};
use crate::directory::{Directory, not_found};
use crate::instance::{Cell, Instance};
use crate::launch::{InFlight, Tokens};
use crate::lock::Lock;
use crate::machine::{Capabilities, Hypervisor};
use crate::migrate::migrate;
use crate::network::Network;
use crate::options::RegionOptions;
use crate::record::{ImageRecord, RegionRecord};
use crate::store::{RedbStore, Store};
use crate::supervisor::Supervisor;
use crate::tasks::Tasks;
use crate::{Error, ErrorKind, InstanceState, Result};

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
    account: AccountId,
    hypervisor: PhantomData<fn() -> H>,
}

impl<H> Clone for Region<H> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), account: self.account, hypervisor: PhantomData }
    }
}

impl<H> fmt::Debug for Region<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("name", self.name())
            .field("account", self.account())
            .field("dir", &self.inner.paths.root)
            .finish_non_exhaustive()
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
    pub(crate) fn of(inner: Arc<Inner>) -> Self {
        let account = inner.region.account;
        Self { inner: Arc::new(Owner(inner)), account, hypervisor: PhantomData }
    }

    /// The region's name.
    pub fn name(&self) -> &RegionName {
        &self.inner.region.name
    }

    /// The account that this handle acts for: it owns what is made with it, sees what is its own or shared
    /// with it, and changes what is its own.
    pub fn account(&self) -> &AccountId {
        &self.account
    }

    /// The same region for another account. Accounts need not be made: each has what it makes.
    ///
    /// ```
    /// # use ami_core::{Ami, Grantee, ModifyImageAttribute, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let friend = region.as_account("210987654321".parse()?);
    /// let refused = friend.launch(&ami, LaunchSpec::new("t2.nano".parse()?)).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::AuthFailure);
    ///
    /// let share = ModifyImageAttribute::new().add_launch_permission(Grantee::Account(*friend.account()));
    /// region.modify_image_attribute(ami.id(), &share)?;
    /// let server = friend.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// assert_eq!(server.describe().owner, *friend.account());
    /// assert!(region.instance(server.id()).is_err(), "it is the friend's alone");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn as_account(&self, account: AccountId) -> Self {
        Self { account, ..self.clone() }
    }

    /// What its hypervisor can do.
    pub fn capabilities(&self) -> Capabilities {
        self.inner.hypervisor.capabilities()
    }

    /// How many vCPUs and how much memory in MiB the machines of all accounts take, out of the region's
    /// [`Capacity`](crate::Capacity).
    pub fn used_capacity(&self) -> (u64, u64) {
        self.inner.meter.used()
    }

    /// The account's instances, in the order of their ids. Those that were terminated are among them for an
    /// hour, or until the region is closed.
    pub fn instances(&self) -> Vec<Instance> {
        let theirs = self.inner.directory.all(self.account);
        let cells = self.inner.cells();
        let cells = theirs.iter().filter_map(|d| cells.get(&d.id));
        cells.map(|cell| Instance::new(self.inner.clone(), cell.clone())).collect()
    }

    /// The account's instances that the request asks for (`DescribeInstances`).
    ///
    /// Filters: `architecture`, `block-device-mapping.delete-on-termination`, `.device-name` and `.volume-id`,
    /// `client-token`, `hibernation-options.configured`, `image-id`, `instance-id`, `instance-state-code`, `instance-state-name`,
    /// `instance-type`, `instance.group-id`, `key-name`, `launch-index`, `launch-time`,
    /// `metadata-options.http-endpoint` and `.http-tokens`, `network-interface.network-interface-id`, `owner-id`,
    /// `private-dns-name`, `private-ip-address`, `reservation-id`, `root-device-name`, `root-device-type`,
    /// `state-reason-code` and `-message`, `subnet-id`, `tag:KEY`, `tag-key`, `virtualization-type`, `vpc-id`. A page of one of
    /// `client-token`, `image-id`, `instance-state-name`, `instance-type`, `key-name`, `owner-id`,
    /// `reservation-id` or a tag, without wildcards, takes as long in a large region as in a small one.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](ErrorKind::InstanceNotFound) for an id that is not there,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for another filter or size of a page,
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for ids in pages, and
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken).
    pub fn describe_instances(&self, request: &DescribeInstances) -> Result<Page<InstanceDescription>> {
        self.inner.directory.describe(self.account, request)
    }

    /// The account's instance with this id.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](ErrorKind::InstanceNotFound).
    pub fn instance(&self, id: InstanceId) -> Result<Instance> {
        Ok(Instance::new(self.inner.clone(), self.inner.cell(self.account, id)?))
    }

    /// Every change of state of every instance, of whatever account, from now on, as it is committed.
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

    /// Where the machines are of instances that hibernate.
    pub(crate) fn hibernated(&self) -> PathBuf {
        self.root.join("hibernated")
    }

    pub(crate) fn saved_machine(&self, id: InstanceId) -> PathBuf {
        self.hibernated().join(id.to_string())
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
    type Target = Arc<Inner>;

    fn deref(&self) -> &Arc<Inner> {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.tasks.stop();
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
    pub(crate) directory: Directory,
    pub(crate) tokens: Tokens,
    pub(crate) in_flight: InFlight,
    pub(crate) tasks: Tasks,
    pub(crate) meter: Meter,
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    pub(crate) network: Option<Box<dyn Network>>,
    pub(crate) ebs_limits: bool,
    pub(crate) vsock: bool,
    pub(crate) network_limits: bool,
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
    /// Held while the record of a volume or a snapshot is looked at and changed. Taken after an instance and
    /// after `naming`, where these are held too.
    pub(crate) resources: Mutex<()>,
    pub(crate) listeners: Mutex<Vec<Sender<StateChange>>>,
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
            None => Box::new(RedbStore::open(&paths.root.join("region.db"))?),
        };
        let store = Store::new(state);
        migrate(&store)?;
        let region = match store.get::<RegionRecord>(RegionRecord::KEY)? {
            Some(region) => check_identity(region, &options)?,
            None => new_identity(&store, &options, &paths)?,
        };
        let keys = options.keys.take();
        let of_store = keys.map_or_else(StoreOptions::new, |keys| StoreOptions::new().keys(keys));
        let blocks = BlockStore::open_with(paths.blocks(), &of_store)
            .map_err(|e| Error::storage(e, "cannot open the region's snapshots"))?;
        let boot = BootCache::open(paths.root.join("boot"))?;
        let (supervisor, messages) = Supervisor::new();
        let inner = Arc::new(Self {
            supervisor,
            cells: Mutex::default(),
            directory: Directory::default(),
            tokens: Tokens::default(),
            in_flight: InFlight::default(),
            tasks: Tasks::default(),
            meter: Meter::new(options.capacity),
            hypervisor,
            network: options.network.take(),
            ebs_limits: options.ebs_limits,
            vsock: options.vsock,
            network_limits: options.network_limits,
            region,
            store,
            blocks,
            boot,
            making_images: RwLock::default(),
            naming: Mutex::default(),
            resources: Mutex::default(),
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

    /// Tells whoever listens.
    pub(crate) fn announce(&self, change: &StateChange) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.send(change.clone()).is_ok());
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
                "{} has lost its state store, and {} is not empty; put back a copy of region.db, or empty the directory",
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

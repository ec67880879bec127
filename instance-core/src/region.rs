//! A region: a directory with its images, volumes and instances, and the process that owns it.

mod inner;
mod paths;

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ami_core::{AccountId, InstanceId, Page, RegionName};

pub(crate) use self::inner::{Inner, Owner};
pub(crate) use self::paths::Paths;
use crate::Result;
use crate::describe::DescribeInstances;
use crate::description::InstanceDescription;
use crate::instance::Instance;
use crate::machine::{Capabilities, Hypervisor};
use crate::options::RegionOptions;
use crate::state_changes::{StateChanges, Whose};

/// A region, kept in a directory and owned by this handle's process.
///
/// One owner at a time: the directory is locked, and the lock goes with the process. Clones are the
/// same region; the last of them and of its [`Instance`]s closes it, which ends its machines and waits for its tasks. Guests are not asked
/// to shut down, as if they were switched off: [`Instance::stop`] does that before. Where the
/// last goes in a thread of the region's own, as a [hook](crate::watch::Watch::subscribe) may have it, nothing is waited for,
/// and the region is closed when those threads have ended. Its instances are found `stopped` when it is opened again; those
/// whose root device is instance store are gone.
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
    /// files that nothing names are removed. Content that is damaged keeps nobody from opening it: what uses it is told
    /// ([`Corrupt`](crate::ErrorKind::Corrupt)), and a [`scrub`](Self::scrub) names all of it. Until it is mended or
    /// deregistered, the bytes of other content that goes are not given back, as they may be its own.
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
        Self { inner: Arc::new(Owner::new(inner)), account, hypervisor: PhantomData }
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
    /// hour, also where the region is closed and opened meanwhile.
    pub fn instances(&self) -> Vec<Instance> {
        self.inner.forget_terminated(Instant::now());
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
    /// `private-dns-name`, `private-ip-address`, `product-code`, `product-code.type`, `reservation-id`, `root-device-name`, `root-device-type`,
    /// `state-reason-code` and `-message`, `subnet-id`, `tag:KEY`, `tag-key`, `virtualization-type`, `vpc-id`. A page of one of
    /// `client-token`, `image-id`, `instance-state-name`, `instance-type`, `key-name`, `owner-id`,
    /// `reservation-id` or a tag, without wildcards, takes as long in a large region as in a small one.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](crate::ErrorKind::InstanceNotFound) for an id that is not there,
    /// [`InvalidParameter`](crate::ErrorKind::InvalidParameter) for another filter or size of a page,
    /// [`InvalidParameterCombination`](crate::ErrorKind::InvalidParameterCombination) for ids in pages, and
    /// [`InvalidNextToken`](crate::ErrorKind::InvalidNextToken).
    pub fn describe_instances(&self, request: &DescribeInstances) -> Result<Page<InstanceDescription>> {
        self.inner.forget_terminated(Instant::now());
        self.inner.directory.describe(self.account, request, self.inner.network.as_deref())
    }

    /// The account's instance with this id.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](crate::ErrorKind::InstanceNotFound).
    pub fn instance(&self, id: InstanceId) -> Result<Instance> {
        self.inner.forget_terminated(Instant::now());
        Ok(Instance::new(self.inner.clone(), self.inner.cell(self.account, id)?))
    }

    /// Every change of state of the account's instances, from now on.
    ///
    /// A change of an instance that was launched is told when it is committed, and so durable. What is told of a launch that is
    /// under way need not be: its instances are `pending` from when they are to be seen, which no crash keeps, until the one
    /// commit that makes them `running`; and those of a launch that fails become `terminated` at once, which nothing is
    /// stored of, and are known no more. Who waits for a state may find it before its change is told here.
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
    pub fn state_changes(&self) -> StateChanges {
        self.inner.listeners.add(Whose::Account(self.account))
    }

    /// The same of every instance, of whatever account: for who runs the region.
    ///
    /// ```
    /// # use ami_core::{Ami, Grantee, ModifyImageAttribute, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, InstanceState, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// # let share = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
    /// # region.modify_image_attribute(ami.id(), &share)?;
    /// let (all, own) = (region.all_state_changes(), region.state_changes());
    /// let friend = region.as_account("210987654321".parse()?);
    /// friend.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// let told: Vec<_> = all.try_iter().map(|change| (change.owner, change.state)).collect();
    /// assert_eq!(told, [InstanceState::Pending, InstanceState::Running].map(|state| (*friend.account(), state)));
    /// assert_eq!(own.try_iter().count(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn all_state_changes(&self) -> StateChanges {
        self.inner.listeners.add(Whose::All)
    }
}

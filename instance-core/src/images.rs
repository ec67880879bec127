//! Making images: from a disk, and from an instance.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use ami_core::{Ami, AmiBuilder, AmiId, AnyAmi, Arch, BlockDeviceMapping, Boot, Digest, Image, Manifest};
use storage_block::{Disk, FrozenVolumes, Progress, Snapshot, SnapshotStats, Volume};

use crate::boot_cache::{BootPlan, Found};
use crate::error::chain;
use crate::instance::{Cell, Live};
use crate::lifecycle::no_root_volume;
use crate::machine::{Machine, MachineError};
use crate::record::{FormerImage, ImageRecord, StateReason};
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, InstanceState, Result};

const GIB: u64 = 1 << 30;

/// The device name of an image's root volume unless another is given.
const ROOT_DEVICE: &str = "/dev/xvda";

/// Where the bytes of an image come from: a root disk, and perhaps a kernel beside it.
///
/// ```
/// use ami_core::{Ami, X86_64};
/// use instance_core::testing::{FakeHypervisor, tiny_elf};
/// use instance_core::{DirectBoot, ImageSource, Region};
/// use storage_block::MemoryDisk;
///
/// let dir = tempfile::tempdir()?;
/// let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let mut seen = 0;
/// let mut progress = |p: storage_block::Progress| seen = p.done;
/// let source = ImageSource::new(&disk)
///     .root_device("/dev/sda1")
///     .boot(DirectBoot::new(tiny_elf(), None, "console=ttyS0")) // the disk has no kernel on it
///     .progress(&mut progress);
/// let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// assert_eq!(ami.manifest().root_device_name().as_str(), "/dev/sda1");
/// assert_eq!(seen, disk.size());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ImageSource<'a> {
    root: &'a Disk,
    root_device: &'a str,
    boot: Option<DirectBoot>,
    progress: Option<&'a mut dyn FnMut(Progress)>,
}

impl<'a> ImageSource<'a> {
    /// A root disk that boots by itself: a partition table or an ext4 file system with a kernel in
    /// `/boot`.
    pub fn new(root: &'a Disk) -> Self {
        Self { root, root_device: ROOT_DEVICE, boot: None, progress: None }
    }

    /// The device name of the root volume; `/dev/xvda` if this is not called.
    #[must_use]
    pub fn root_device(mut self, name: &'a str) -> Self {
        self.root_device = name;
        self
    }

    /// A kernel that the image carries beside the disk.
    #[must_use]
    pub fn boot(mut self, boot: DirectBoot) -> Self {
        self.boot = Some(boot);
        self
    }

    /// Told how far the copying is.
    #[must_use]
    pub fn progress(mut self, progress: &'a mut dyn FnMut(Progress)) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl std::fmt::Debug for ImageSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageSource")
            .field("root", self.root)
            .field("boot", &self.boot)
            .finish_non_exhaustive()
    }
}

/// A kernel, an initial RAM disk and a command line.
///
/// ```no_run
/// use instance_core::DirectBoot;
///
/// let kernel = std::fs::read("vmlinuz")?;
/// let initrd = std::fs::read("initrd.img")?;
/// let boot = DirectBoot::new(kernel, Some(initrd), "console=ttyS0 root=/dev/vda1");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct DirectBoot {
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
    command_line: String,
}

impl DirectBoot {
    /// A kernel as distributions ship it (`vmlinuz`) or unpacked (`vmlinux`).
    pub fn new(kernel: Vec<u8>, initrd: Option<Vec<u8>>, command_line: impl Into<String>) -> Self {
        Self { kernel, initrd, command_line: command_line.into() }
    }
}

impl std::fmt::Debug for DirectBoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kernel, initrd) = (self.kernel.len(), self.initrd.as_ref().map(Vec::len));
        f.debug_struct("DirectBoot")
            .field("kernel_bytes", &kernel)
            .field("initrd_bytes", &initrd)
            .field("command_line", &self.command_line)
            .finish()
    }
}

/// What making an image of an instance gave.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// let made = instance.create_image("web-2")?;
/// assert_eq!(made.ami.manifest().parent(), Some(&ami.digest()));
/// assert_eq!((made.changed_bytes, made.stored_bytes), (0, 0), "nothing was written yet");
/// println!("{} stood still for {:?}", instance.id(), made.paused);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreatedImage {
    /// The image.
    pub ami: AnyAmi,
    /// The bytes of the blocks that were written since the instance was launched.
    pub changed_bytes: u64,
    /// The bytes that were new to the region and had to be stored.
    pub stored_bytes: u64,
    /// How long the instance stood still.
    pub paused: Duration,
}

impl<H> Region<H> {
    /// Registers an image made of `source` (`ImportSnapshot` and `RegisterImage` in one).
    ///
    /// The builder says the rest; its root device, boot source and root volume are set here.
    ///
    /// # Errors
    ///
    /// [`NotBootable`](ErrorKind::NotBootable),
    /// [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch) for a kernel of another
    /// architecture than the image's, [`InvalidImage`](ErrorKind::InvalidImage),
    /// [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate),
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity). Nothing is left of it then.
    pub fn register_image<A: Arch>(&self, builder: AmiBuilder<A>, source: ImageSource<'_>) -> Result<Ami<A>> {
        let making = self.inner.making_images.read().unwrap_or_else(PoisonError::into_inner);
        let made = self.inner.import(builder, source);
        drop(making);
        made.inspect_err(|_| self.inner.discard_half_made())
    }

    /// Deregisters an image. Instances made from it go on; the bytes that nothing else names go.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// region.deregister_image(ami.id())?;
    /// let gone = region.image(ami.id()).err().map(|e| e.kind());
    /// assert_eq!(gone, Some(ErrorKind::ImageNotFound));
    /// let next = server.create_image("web-2")?; // it goes on
    /// assert_eq!(region.image(next.ami.id())?.ami(), &next.ami);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what the host met.
    pub fn deregister_image(&self, id: AmiId) -> Result<()> {
        let inner = &self.inner;
        let _alone = inner.making_images.write().unwrap_or_else(PoisonError::into_inner);
        inner.forget_image(id)?;
        inner.collect_garbage()
    }
}

impl Inner {
    fn forget_image(&self, id: AmiId) -> Result<()> {
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.image(id)?;
        let instances = self.instances_that_live()?;
        self.store.commit(|c| {
            c.remove::<ImageRecord>(id);
            match instances.iter().any(|i| i.description.image_id == id) {
                true => c.put(&FormerImage(record.image)),
                false => Ok(()),
            }
        })
    }

    fn import<A: Arch>(&self, builder: AmiBuilder<A>, source: ImageSource<'_>) -> Result<Ami<A>> {
        // What cannot boot is refused before its bytes are copied.
        let direct = source.boot.is_some();
        let found = match source.boot {
            Some(boot) => Found::with_kernel(&boot.kernel, boot.initrd, boot.command_line)?,
            None => Found::on_disk(source.root)?,
        };
        let mut nobody = |_| ();
        let progress = source.progress.unwrap_or(&mut nobody);
        let (snapshot, _) = self
            .blocks
            .import(source.root, progress)
            .map_err(|e| Error::storage(e, "cannot copy the disk into the region"))?;
        let plan = self.boot.keep(&found)?;
        let boot = match direct {
            true => Boot::direct(plan.kernel, plan.initrd, plan.command_line.clone()),
            false => Boot::root_volume(),
        };
        let ami = builder
            .root_device(source.root_device)
            .block_device(root_mapping(source.root_device, &snapshot)?)
            .boot(boot)
            .build(&self.region.name, &self.region.account)
            .map_err(invalid_image)?;
        found.check_architecture(ami.architecture())?;
        self.check_mappings(ami.manifest())?;
        self.register(ami.clone().into_any(), plan)?;
        Ok(ami)
    }

    /// Refuses volumes that no instance could have.
    fn check_mappings(&self, manifest: &Manifest) -> Result<()> {
        for mapping in manifest.block_device_mappings() {
            let Some(ebs) = mapping.as_ebs() else { continue };
            let name = mapping.device_name();
            if ebs.encrypted() {
                let what = format!("{name}: encrypted volumes are not supported yet");
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            if let Some(digest) = ebs.snapshot() {
                let snapshot = self.blocks.snapshot(digest).map_err(|e| {
                    let what = format!("{name}: the region has no snapshot {digest}");
                    Error::new(ErrorKind::InvalidImage, what)
                        .with_code("InvalidSnapshot.NotFound")
                        .caused_by(e)
                })?;
                ebs.check_snapshot_size(snapshot.size()).map_err(invalid_image)?;
            }
        }
        Ok(())
    }

    fn register(&self, ami: AnyAmi, boot: BootPlan) -> Result<()> {
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_name(ami.name())?;
        self.store.commit(|c| c.put(&ImageRecord { image: Image::new(ami), boot }))
    }

    /// Refuses a name that an image of this account has.
    fn check_name(&self, name: &str) -> Result<()> {
        let images = self.store.all::<ImageRecord>()?;
        let holds = |ami: &AnyAmi| ami.name() == name && *ami.owner() == self.region.account;
        match images.iter().find(|r| holds(r.image.ami())) {
            None => Ok(()),
            Some(holder) => {
                let what = format!("the name {name:?} is that of the image {}", holder.image.id());
                Err(Error::new(ErrorKind::ImageNameDuplicate, what))
            }
        }
    }

    /// Removes what an image that failed has left; the error that made it fail is the one to tell.
    fn discard_half_made(&self) {
        let _alone = self.making_images.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.collect_garbage() {
            tracing::warn!(error = chain(&e), "cannot remove what a failed image left");
        }
    }

    pub(crate) fn create_image(&self, cell: &Cell, name: &str) -> Result<CreatedImage> {
        // In this order, so that the instance can be stopped while another image is removed.
        let making = self.making_images.read().unwrap_or_else(PoisonError::into_inner);
        let mut live = cell.hold(self.supervisor.sender());
        let made = self.create_image_held(cell, &mut live, name);
        drop((live, making));
        made.inspect_err(|_| self.discard_half_made())
    }

    fn create_image_held(&self, cell: &Cell, live: &mut Live, name: &str) -> Result<CreatedImage> {
        // Before anything is copied.
        self.check_name(name)?;
        let parent = self.parent(live.record.description.image_id)?;
        let (frozen, paused) = self.freeze_volumes(cell, live)?;
        let taken = frozen.store(&mut |_| ());
        let taken = taken.map_err(|e| Error::storage(e, "cannot take a snapshot of a volume"))?;
        let ami = child_of(&parent, live, name, &taken, self)?;
        let plan = match (&live.record.direct_boot, taken.first()) {
            (Some(plan), _) => plan.clone(),
            (None, Some((root, _))) => self.boot.keep_from_disk(&root.disk())?,
            (None, None) => return Err(no_root_volume()),
        };
        self.register(ami.clone(), plan)?;
        Ok(CreatedImage {
            ami,
            changed_bytes: taken.iter().map(|(_, stats)| stats.changed_bytes).sum(),
            stored_bytes: taken.iter().map(|(_, stats)| stats.stored_bytes).sum(),
            paused,
        })
    }

    /// The image that an instance was made from, whether or not it is still registered.
    fn parent(&self, id: AmiId) -> Result<AnyAmi> {
        match self.store.get::<FormerImage>(&id.to_string())? {
            Some(former) => Ok(former.0.ami().clone()),
            None => Ok(self.image(id)?.image.ami().clone()),
        }
    }

    /// All volumes at one instant, in the order of the attachments, and how long the instance stood still.
    fn freeze_volumes(&self, cell: &Cell, live: &mut Live) -> Result<(FrozenVolumes, Duration)> {
        let state = live.record.description.state;
        let begun = Instant::now();
        match (&live.machine, state) {
            (Some(machine), InstanceState::Running) => {
                machine.pause().map_err(|e| Error::machine(e, format!("cannot pause {}", cell.id)))?;
                let frozen = Volume::freeze(&live.volumes, &self.blocks);
                if let Err(e) = machine.resume() {
                    drop(frozen);
                    return Err(self.not_resumed(cell, live, e));
                }
                Ok((frozen, begun.elapsed()))
            }
            (None, InstanceState::Stopped) => {
                Ok((Volume::freeze(&self.open_volumes(live)?, &self.blocks), begun.elapsed()))
            }
            _ => {
                let what = format!("{} is {state}, in which no image can be made of it", cell.id);
                Err(Error::new(ErrorKind::IncorrectInstanceState, what))
            }
        }
    }

    /// Nobody would resume it later: a machine that stands still is no running instance.
    fn not_resumed(&self, cell: &Cell, live: &mut Live, e: MachineError) -> Error {
        let stands = |machine: &dyn Machine| machine.state().get().exit_cause().is_none();
        let failed = Error::machine(e, format!("cannot resume {}", cell.id));
        // The end of one that has ended is followed up with its own reason.
        if live.machine.as_deref().is_some_and(stands) {
            self.lose(cell, live, StateReason::new("Server.InternalError", chain(&failed)));
        }
        failed
    }
}

/// The image of an instance: its parent's with the instance's bytes.
fn child_of(
    parent: &AnyAmi,
    live: &Live,
    name: &str,
    taken: &[(Snapshot, SnapshotStats)],
    region: &Inner,
) -> Result<AnyAmi> {
    let manifest = parent.manifest();
    let attachments = live.record.description.attachments.iter();
    let snapshots: Vec<(&str, Digest)> =
        attachments.zip(taken).map(|(a, (s, _))| (a.device_name.as_str(), s.digest())).collect();
    let mappings = manifest.block_device_mappings().iter().map(|mapping| {
        let taken = snapshots.iter().find(|(device, _)| *device == mapping.device_name());
        match (mapping.as_ebs(), taken) {
            (Some(ebs), Some((device, snapshot))) => {
                BlockDeviceMapping::ebs(*device, *snapshot, ebs.volume_size_gib())
                    .delete_on_termination(ebs.delete_on_termination())
                    .volume_type(ebs.volume_type())
            }
            _ => mapping.clone(),
        }
    });
    let mut builder = AnyAmi::builder_for(parent.architecture(), name)
        .root_device(manifest.root_device_name().as_str())
        .block_devices(mappings)
        .software_list(manifest.software().iter().cloned())
        .boot(manifest.boot().clone())
        .parent(parent.digest());
    if let Some(os) = manifest.operating_system() {
        builder = builder.operating_system(os.clone());
    }
    builder.build(&region.region.name, &region.region.account).map_err(invalid_image)
}

/// EC2 counts volumes in whole GiB; a smaller disk gets a volume with room to grow.
fn root_mapping(device: &str, snapshot: &Snapshot) -> Result<BlockDeviceMapping> {
    let gib = u32::try_from(snapshot.size().div_ceil(GIB).max(1));
    let gib =
        gib.map_err(|_| Error::new(ErrorKind::InvalidParameter, "the disk is too large for a volume"))?;
    Ok(BlockDeviceMapping::ebs(device, snapshot.digest(), gib))
}

fn invalid_image(e: ami_core::Error) -> Error {
    let code = e.code();
    Error::new(ErrorKind::InvalidImage, "the image description breaks a rule").with_code(code).caused_by(e)
}

//! What an image is made of.

use ami_core::{ImdsSupport, RootDeviceType, SnapshotId};
use storage_block::{Disk, Progress};

/// The device name of an image's root volume unless another is given.
pub(crate) const ROOT_DEVICE: &str = "/dev/xvda";

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
    pub(crate) root: Root<'a>,
    pub(crate) root_device: Option<&'a str>,
    pub(crate) root_device_type: RootDeviceType,
    pub(crate) boot: Option<DirectBoot>,
    pub(crate) encrypted: bool,
    pub(crate) imds_support: Option<ImdsSupport>,
    pub(crate) progress: Option<&'a mut dyn FnMut(Progress)>,
}

/// What is on an image's root volume.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Root<'a> {
    /// The bytes of a disk, which are copied.
    Disk(&'a Disk),
    /// A snapshot of the region's, which stays for as long as the image.
    Snapshot(SnapshotId),
}

impl<'a> ImageSource<'a> {
    /// A root disk that boots by itself: a partition table or an ext4 file system with a kernel in
    /// `/boot`.
    pub fn new(root: &'a Disk) -> Self {
        Self::of(Root::Disk(root))
    }

    fn of(root: Root<'a>) -> Self {
        let root_device_type = RootDeviceType::Ebs;
        Self {
            root,
            root_device: None,
            root_device_type,
            boot: None,
            encrypted: false,
            imds_support: None,
            progress: None,
        }
    }

    /// The same of a snapshot that the account has made (`RegisterImage`). Nothing is copied; the snapshot
    /// cannot be deleted while the image is registered.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, Region, VolumeSpec};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// let volume = region.create_volume(VolumeSpec::new(1))?;
    /// let snapshot = region.create_snapshot(volume.id, "root of the web server")?;
    /// let source = ImageSource::of_snapshot(snapshot.id).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let refused = region.delete_snapshot(snapshot.id).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::SnapshotInUse);
    /// region.deregister_image(ami.id())?;
    /// region.delete_snapshot(snapshot.id)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of_snapshot(snapshot: SnapshotId) -> Self {
        Self::of(Root::Snapshot(snapshot))
    }

    /// The device name of the root volume; the one that the builder of the image says if this is not called, or else
    /// `/dev/xvda`.
    #[must_use]
    pub fn root_device(mut self, name: &'a str) -> Self {
        self.root_device = Some(name);
        self
    }

    /// What the root device is; a volume if this is not called. One of instance store has 10 GiB at most, is not
    /// encrypted, and is gone when its instance ends, which is never stopped. Types that have instance store which is not
    /// NVMe launch it.
    ///
    /// ```
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// use ami_core::{Ami, RootDeviceType, X86_64};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// let source = ImageSource::new(&disk).root_device_type(RootDeviceType::InstanceStore);
    /// # let source = source.boot(DirectBoot::new(tiny_elf(), None, ""));
    /// let ami = region.register_image(Ami::<X86_64>::builder("worker"), source)?;
    /// let worker = region.launch(&ami, LaunchSpec::new("m3.medium".parse()?))?;
    /// assert_eq!(worker.describe().root_device_type, RootDeviceType::InstanceStore);
    /// let refused = worker.stop(std::time::Duration::ZERO).unwrap_err();
    /// assert_eq!(refused.code(), "UnsupportedOperation");
    /// worker.terminate()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn root_device_type(mut self, root_device_type: RootDeviceType) -> Self {
        self.root_device_type = root_device_type;
        self
    }

    /// A kernel that the image carries beside the disk.
    #[must_use]
    pub fn boot(mut self, boot: DirectBoot) -> Self {
        self.boot = Some(boot);
        self
    }

    /// Stores the disk encrypted, under a data key that the region's [keys](crate::RegionOptions::keys) wrap. Without
    /// meaning for a snapshot, which is encrypted or not. The kernel and the initial RAM disk that are found on it, or come
    /// beside it, are kept unpacked, and not encrypted.
    #[must_use]
    pub fn encrypted(mut self, encrypted: bool) -> Self {
        self.encrypted = encrypted;
        self
    }

    /// Which version of the metadata service the image is made for, as
    /// [a change of it](ami_core::ModifyImageAttribute::imds_support) says it later. An image of `v2.0` is launched with
    /// [`HttpTokens::Required`](crate::HttpTokens::Required) unless the launch says otherwise, and so is any other here.
    #[must_use]
    pub fn imds_support(mut self, support: ImdsSupport) -> Self {
        self.imds_support = Some(support);
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
            .field("root", &self.root)
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
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) command_line: String,
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

//! What an image of an instance is to be, and what came of it.

use std::fmt;
use std::time::Duration;

use ami_core::AnyAmi;

use crate::BlockDeviceMappingRequest;

/// An image to be made of an instance (`CreateImage`). A name alone is one.
///
/// **EC2 reboots a running instance unless it is told not to; this does not unless it is told to.** The instance stands
/// still for milliseconds, all its volumes are taken at that instant, and [`ImageConsistency`] says what that makes of
/// them; nobody loses a server's memory who only asked for an image of it. A guest with an
/// [agent](crate::RegionOptions::guest_agent) flushes its file systems before, and has them stand still for that.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// use instance_core::{BlockDeviceMappingRequest, CreateImage, ImageConsistency};
///
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// let image = CreateImage::new("web-2")
///     .description("after the upgrade")
///     .tag("stage", "test")
///     .block_device(BlockDeviceMappingRequest::new("/dev/sdf").size_gib(8)) // beside the server's own
///     .no_reboot(false); // its guest shuts down, and is started again
/// let made = server.create_image(image)?;
/// assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
/// assert_eq!(region.image(made.ami.id())?.description(), "after the upgrade");
/// assert_eq!(server.create_image("web-3")?.consistency, ImageConsistency::CrashConsistent);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a specification makes nothing by itself"]
pub struct CreateImage {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) tags: Vec<(String, String)>,
    pub(super) block_devices: Vec<BlockDeviceMappingRequest>,
    pub(super) no_reboot: bool,
}

impl CreateImage {
    /// An image of this name, made without a reboot, of all of the instance's volumes.
    pub fn new(name: impl Into<String>) -> Self {
        let (description, tags, block_devices) = Default::default();
        Self { name: name.into(), description, tags, block_devices, no_reboot: true }
    }

    /// A description of at most 255 characters.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// A tag of the image's.
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.push((key.into(), value.into()));
        self
    }

    /// Adds a disk to the instance's, or changes what the image says of one: its size, its type, whether it goes with an
    /// instance; what is unsaid of these is as the instance has it. What is encrypted stays so.
    /// [`BlockDeviceMappingRequest::no_device`] leaves a volume out, but for the root volume.
    pub fn block_device(mut self, mapping: BlockDeviceMappingRequest) -> Self {
        self.block_devices.push(mapping);
        self
    }

    /// Whether an instance that runs goes on running. If not, its guest is asked to shut down, for a minute at most, the
    /// volumes are taken, and it is started again at once; it is [`running`](crate::InstanceState::Running) all the time
    /// to who asks, as in EC2. A guest that has not shut down by then is ended.
    pub fn no_reboot(mut self, no_reboot: bool) -> Self {
        self.no_reboot = no_reboot;
        self
    }
}

impl From<&str> for CreateImage {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl From<&String> for CreateImage {
    fn from(name: &String) -> Self {
        Self::new(name)
    }
}

impl From<String> for CreateImage {
    fn from(name: String) -> Self {
        Self::new(name)
    }
}

/// In which state the volumes of an image were when they were taken; [`CreateImage`] shows it in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageConsistency {
    /// As after a power failure: what the guest had flushed is there, all volumes are of the same instant, and file systems
    /// with a journal mend themselves. What was in its page cache alone is not there: have it `sync` first, or reboot, or give
    /// it an [agent](crate::RegionOptions::guest_agent).
    CrashConsistent,
    /// The guest had shut itself down, or its agent says that its file systems were flushed and stood still: they are
    /// whole, with all that it had written. Of one that was mounted while the others stood still already it says nothing: that
    /// is as after a power failure.
    FileSystemConsistent,
}

impl ImageConsistency {
    /// The same in a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CrashConsistent => "crash-consistent",
            Self::FileSystemConsistent => "file-system-consistent",
        }
    }
}

impl fmt::Display for ImageConsistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
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
    /// In which state its volumes were taken.
    pub consistency: ImageConsistency,
    /// The bytes of the blocks that were written since the instance was launched.
    pub changed_bytes: u64,
    /// The bytes that were new to the region and had to be stored.
    pub stored_bytes: u64,
    /// How long the instance stood still: all of a reboot, where there was one.
    pub paused: Duration,
}

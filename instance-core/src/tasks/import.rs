//! How a disk is imported.

use ami_core::ImdsSupport;

use crate::DirectBoot;

/// How a disk becomes an image in a task (`ImportImage`), beside what the image's builder says: that names the root device,
/// and [maps it](ami_core::AmiBuilder::block_device) where its volume is to be another than its content needs.
///
/// ```
/// use std::time::{Duration, Instant};
/// use ami_core::{Ami, ImdsSupport, X86_64};
/// use instance_core::testing::{FakeHypervisor, tiny_elf};
/// use instance_core::{DirectBoot, ImportImage, Region};
///
/// let dir = tempfile::tempdir()?;
/// let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// let how = ImportImage::new().boot(DirectBoot::new(tiny_elf(), None, "")).imds_support(ImdsSupport::V2_0);
/// let web = Ami::<X86_64>::builder("web").root_device("/dev/sda1");
/// let done = region.import_image(web, disk, how)?.wait(Instant::now() + Duration::from_secs(60))?;
/// let image = region.image(done.image_id.ok_or("it has made one")?)?;
/// assert_eq!(image.imds_support(), Some(ImdsSupport::V2_0));
/// assert_eq!(image.ami().manifest().root_device_name().as_str(), "/dev/sda1");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
#[must_use = "a request does nothing by itself"]
pub struct ImportImage {
    pub(super) boot: Option<DirectBoot>,
    pub(super) encrypted: bool,
    pub(super) imds_support: Option<ImdsSupport>,
}

impl ImportImage {
    /// A disk that boots by itself.
    pub fn new() -> Self {
        Self::default()
    }

    /// A kernel that the image carries beside the disk.
    pub fn boot(mut self, boot: DirectBoot) -> Self {
        self.boot = Some(boot);
        self
    }

    /// Stores the disk encrypted, as [`ImageSource::encrypted`](crate::ImageSource::encrypted) does.
    pub fn encrypted(mut self, encrypted: bool) -> Self {
        self.encrypted = encrypted;
        self
    }

    /// Which version of the metadata service the image is made for, as
    /// [`ImageSource::imds_support`](crate::ImageSource::imds_support) says.
    pub fn imds_support(mut self, support: ImdsSupport) -> Self {
        self.imds_support = Some(support);
        self
    }
}

impl From<Option<DirectBoot>> for ImportImage {
    fn from(boot: Option<DirectBoot>) -> Self {
        Self { boot, ..Self::default() }
    }
}

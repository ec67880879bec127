//! Looking through what a region stores for damage.

use std::collections::HashSet;

use ami_core::{AmiId, Digest, SnapshotId, VolumeId};
use storage_block::{Progress, ScrubReport};

use crate::garbage::snapshots_of;
use crate::record::{ImageRecord, SnapshotRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::{Error, Result};

/// What [`Region::scrub`] has found, which shows it in use.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RegionScrub {
    /// What was read, and all that is wrong with it.
    pub content: ScrubReport,
    /// The images that have content which cannot be read in full, or is not there.
    pub damaged_images: Vec<AmiId>,
    /// The snapshots whose content cannot be.
    pub damaged_snapshots: Vec<SnapshotId>,
    /// The volumes that began as such. What they have written since is theirs.
    pub damaged_volumes: Vec<VolumeId>,
}

impl<H> Region<H> {
    /// Reads all that images, snapshots and volumes of all accounts consist of and compares it with its names: for who
    /// runs the region. What volumes have written themselves has none, and is not read.
    ///
    /// Everything else goes on meanwhile. What is deregistered or deleted until it ends gives its bytes back when the next
    /// is, or when the region is opened again. What is damaged is mended by whoever [registers](Self::register_image) the
    /// same bytes once more, under another name; what is damaged and not needed is deregistered.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let found = region.scrub(&mut |progress| println!("{} of {}", progress.done, progress.total))?;
    /// for damage in &found.content.damages {
    ///     eprintln!("{damage}");
    /// }
    /// assert!(found.content.objects > 0 && found.damaged_images.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Cancelled`](crate::ErrorKind::Cancelled), or what reading the state store met. Damage is none but in what it gives.
    pub fn scrub(&self, progress: &mut dyn FnMut(Progress)) -> Result<RegionScrub> {
        let failed = |e| Error::storage(e, "cannot look through the region's content");
        let content = self.inner.blocks.scrub(progress).map_err(failed)?;
        self.inner.concerned(content)
    }
}

impl Inner {
    /// Whose content it is that is damaged or lost.
    fn concerned(&self, content: ScrubReport) -> Result<RegionScrub> {
        // What is named is not removed meanwhile.
        let _making = self.begin_making();
        let images = self.store.all::<ImageRecord>()?;
        let snapshots = self.store.all::<SnapshotRecord>()?;
        let volumes = self.store.all::<VolumeRecord>()?;
        let there =
            self.blocks.snapshots().map_err(|e| Error::storage(e, "cannot list the region's content"))?;
        let mut whole: HashSet<Digest> = there.into_iter().collect();
        for digest in &content.damaged_snapshots {
            whole.remove(digest);
        }
        let damaged = |digest: &Digest| !whole.contains(digest);
        let of_images = images.iter().filter(|image| snapshots_of(image).iter().any(damaged));
        Ok(RegionScrub {
            damaged_images: of_images.map(|image| image.image.id()).collect(),
            damaged_snapshots: snapshots.iter().filter(|s| damaged(&s.digest)).map(|s| s.id).collect(),
            damaged_volumes: volumes
                .iter()
                .filter(|v| v.base.as_ref().is_some_and(damaged))
                .map(|v| v.id)
                .collect(),
            content,
        })
    }
}

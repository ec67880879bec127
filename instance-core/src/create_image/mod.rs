//! Making images of instances (`CreateImage`).
//!
//! An instance is held for the instant at which its volumes are taken, and not while they are stored.

mod moment;
mod spec;

use std::sync::mpsc;

use ami_core::{AmiId, CreateImageTaskId};
use storage_block::{Progress, SnapshotStats};

use self::moment::Content;
pub use self::spec::{CreateImage, CreatedImage, ImageConsistency};
use crate::instance::{Cell, Instance};
use crate::power::no_root_volume;
use crate::region::Inner;
use crate::store::Changes;
use crate::tasks::{CreateImageTask, Done, put_completed};
use crate::{Error, Result};

impl Instance {
    /// Makes an AMI of it, as it is at one instant: all its volumes, taken while its processors stand still, or after its
    /// guest has shut down, as [`CreateImage`] says. A name alone is an image without a reboot, unlike EC2's: what the guest
    /// has not written to its disks yet is not in it, as after a crash. A guest with an
    /// [agent](crate::RegionOptions::guest_agent) has its file systems stand still meanwhile. The instance goes on, and
    /// can be stopped, started, changed and terminated while the volumes are stored. The AMI that it was made from need not
    /// be registered any more; its product codes are the new one's too.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](crate::ErrorKind::IncorrectInstanceState) unless it is running or
    /// stopped, or if it was stopped or rebooted by somebody else while its guest shut down;
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for one whose root device is instance store;
    /// [`ImageNameDuplicate`](crate::ErrorKind::ImageNameDuplicate), or
    /// [`MalformedImageName`](crate::ErrorKind::MalformedImageName) for a name that breaks the rule for names;
    /// [`InvalidBlockDeviceMapping`](crate::ErrorKind::InvalidBlockDeviceMapping),
    /// [`SnapshotNotFound`](crate::ErrorKind::SnapshotNotFound), [`MalformedTagKey`](crate::ErrorKind::MalformedTagKey),
    /// [`TagLimitExceeded`](crate::ErrorKind::TagLimitExceeded),
    /// [`InvalidParameter`](crate::ErrorKind::InvalidParameter) for a long description;
    /// [`NotBootable`](crate::ErrorKind::NotBootable) if its root volume no longer holds a kernel; or what
    /// the host met. Nothing is then left of the image, and the instance goes on; only one whose
    /// machine cannot be [resumed](crate::machine::Machine::resume), or made again after a reboot, is stopped.
    pub fn create_image(&self, image: impl Into<CreateImage>) -> Result<CreatedImage> {
        let (region, cell) = self.parts();
        region.create_image(cell, &image.into(), &mut |_| (), || (), |_, _| Ok(()))
    }

    /// Begins the same, and returns when the volumes are taken: what the guest writes from then on is not in the image. They
    /// are stored in a thread of its own.
    ///
    /// EC2 has no such task: there the image is there at once, and is `pending`. Here the id of an image is a digest of what
    /// is in it, so that it has none before it is whole: until then it is known [by its name](crate::Region::unfinished_images).
    /// Once it is, the task's message says how consistent it is.
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
    /// use std::time::{Duration, Instant};
    ///
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// let task = server.begin_create_image("web-2")?;
    /// task.watch().subscribe(|task| println!("{} {} %", task.id, task.progress));
    /// let made = task.wait(Instant::now() + Duration::from_secs(60))?;
    /// assert_eq!(made.status_message, "crash-consistent");
    /// assert_eq!(region.image(made.image_id.ok_or("it has made one")?)?.ami().name(), "web-2");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ResourceLimitExceeded`](crate::ErrorKind::ResourceLimitExceeded) with twenty under way, or what the host met. What
    /// else [`create_image`](Self::create_image) refuses [the task](CreateImageTask::wait) says.
    pub fn begin_create_image(&self, image: impl Into<CreateImage>) -> Result<CreateImageTask> {
        let (region, image, cell) = (self.parts().0, image.into(), self.shared_cell());
        let id = CreateImageTaskId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let task = CreateImageTask::making(id, cell.owner, &image.name, "creating");
        let (taking, taken) = mpsc::channel::<()>();
        let task = region.begin(&task, &region.tasks.creations, move |region, task| {
            let mut progress = |at: Progress| {
                task.reach(at.done, at.total);
                if task.is_cancelled() {
                    at.cancel();
                }
            };
            let message = std::cell::Cell::new("");
            let put = |c: &mut Changes, done: (AmiId, ImageConsistency)| {
                message.set(done.1.as_str());
                put_completed(task, c, &Done::new(done.0).saying(done.1.as_str()))
            };
            let made = region.create_image(&cell, &image, &mut progress, || drop(taking), put)?;
            Ok(Done::new(made.ami.id()).saying(message.get()))
        })?;
        // Nothing is ever sent: this ends when the volumes are taken, or the task has.
        let _ = taken.recv();
        Ok(task)
    }
}

impl Inner {
    /// Makes an image of an instance, in one commit with what else `also` collects; `taken` is told when the instance has no
    /// part in it any more.
    fn create_image(
        &self,
        cell: &Cell,
        image: &CreateImage,
        progress: &mut dyn FnMut(Progress),
        taken: impl FnOnce(),
        also: impl FnOnce(&mut Changes, (AmiId, ImageConsistency)) -> Result<()>,
    ) -> Result<CreatedImage> {
        self.making(|| {
            let moment = self.take_moment(cell, image)?;
            taken();
            let (draft, consistency, paused) = (moment.draft, moment.consistency, moment.paused);
            let stored = moment.instant.store(progress)?;
            let contents: Vec<Content> = stored.iter().map(|(snapshot, _)| Content::of(snapshot)).collect();
            let plan = match (&draft.direct_boot, draft.root().and_then(|root| stored.get(root))) {
                (Some(plan), _) => plan.clone(),
                (None, Some((root, _))) => self.boot.keep_from_disk(&root.disk())?,
                (None, None) => return Err(no_root_volume()),
            };
            let image = self.image_of(&draft, image, &contents)?;
            let ami = self.register(image, plan, |c, id| also(c, (id, consistency)))?;
            let sum = |of: fn(&SnapshotStats) -> u64| stored.iter().map(|(_, stats)| of(stats)).sum();
            Ok(CreatedImage {
                ami,
                consistency,
                changed_bytes: sum(|stats| stats.changed_bytes),
                stored_bytes: sum(|stats| stats.stored_bytes),
                paused,
            })
        })
    }
}

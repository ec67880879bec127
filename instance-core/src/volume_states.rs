//! States of volumes, for those who wait for them.

use std::time::Instant;

use ami_core::VolumeId;

use crate::record::VolumeRecord;
use crate::region::{Inner, Region};
use crate::watch::Watch;
use crate::{Error, ErrorKind, Result, VolumeState};

impl<H> Region<H> {
    /// The state of a volume of the account's, to wait for: by blocking with a deadline or as a future. It goes on when the
    /// volume is deleted, or goes with its instance: its state is [`Deleted`](VolumeState::Deleted) then. To which instance
    /// it is attached, and at which device, those see who [watch that](crate::Instance::watch).
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
    /// use instance_core::{VolumeSpec, VolumeState};
    ///
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// let volume = region.create_volume(VolumeSpec::new(1))?.id;
    /// let other = region.clone();
    /// let attaching = std::thread::spawn(move || other.attach_volume(volume, server.id(), "/dev/sdf"));
    /// let deadline = Instant::now() + Duration::from_secs(60);
    /// region.wait_for_volume(volume, VolumeState::InUse, deadline)?; // aws ec2 wait volume-in-use
    /// # attaching.join().unwrap()?;
    /// region.detach_volume(volume)?;
    /// region.wait_for_volume(volume, VolumeState::Available, deadline)?;
    /// let watch = region.watch_volume(volume)?;
    /// region.delete_volume(volume)?;
    /// assert_eq!(watch.get(), VolumeState::Deleted);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), or what reading the state store met.
    pub fn watch_volume(&self, id: VolumeId) -> Result<Watch<VolumeState>> {
        let inner = &self.inner;
        inner.volume(*self.account(), id)?;
        let watch = inner.watched_volumes.watch(id, inner.volume_state(id)?);
        // What has become of it between the look and the watch.
        inner.tell_volume(id);
        Ok(watch)
    }

    /// Blocks until a volume of the account's is in `state` (`aws ec2 wait volume-available`, `volume-in-use`, `volume-deleted`).
    /// One that is not there is deleted.
    ///
    /// # Errors
    ///
    /// As [`watch_volume`](Self::watch_volume), and [`IncorrectState`](ErrorKind::IncorrectState) if it is in another state at
    /// the deadline, or, at once, if it is deleted.
    pub fn wait_for_volume(&self, id: VolumeId, state: VolumeState, deadline: Instant) -> Result<()> {
        let watch = match self.watch_volume(id) {
            Err(e) if e.kind() == ErrorKind::VolumeNotFound && state == VolumeState::Deleted => return Ok(()),
            watch => watch?,
        };
        let what = match watch.wait(deadline, |now| *now == state || *now == VolumeState::Deleted) {
            Ok(now) if now == state => return Ok(()),
            Ok(now) => format!(
                "the volume {id} is {}, and does not become {} any more",
                now.as_str(),
                state.as_str()
            ),
            Err(now) => {
                format!("the volume {id} is {}, not {}, at the deadline", now.as_str(), state.as_str())
            }
        };
        Err(Error::new(ErrorKind::IncorrectState, what))
    }
}

impl Inner {
    fn volume_state(&self, id: VolumeId) -> Result<VolumeState> {
        Ok(match self.store.get::<VolumeRecord>(&id.to_string())? {
            None => VolumeState::Deleted,
            Some(_) if self.directory.attached(id).is_some() => VolumeState::InUse,
            Some(_) => VolumeState::Available,
        })
    }

    /// Tells those who watch a volume of the state that it has come to.
    pub(crate) fn tell_volume(&self, id: VolumeId) {
        let look = |told: &VolumeState| self.volume_state(id).unwrap_or(*told);
        self.watched_volumes.tell(id, look, |state| *state == VolumeState::Deleted);
    }
}

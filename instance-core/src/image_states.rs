//! States of images: who waits for them, and images whose content turns out to be damaged.

use std::sync::PoisonError;
use std::time::Instant;

use ami_core::{Action, AmiId, Image, ImageState, StateReason};

use crate::error::chain;
use crate::record::ImageRecord;
use crate::region::{Inner, Region};
use crate::watch::Watch;
use crate::{Error, ErrorKind, Result};

impl<H> Region<H> {
    /// The state of an image that the account sees, to wait for: by blocking with a deadline or as a future. It goes on when
    /// the image is deregistered, whose state is that then.
    ///
    /// An image of this region is [`available`](ImageState::Available) as soon as it is there: one that is `pending` or has
    /// `failed` has no id yet, and is known [by its name](Self::unfinished_images). It becomes [`invalid`](ImageState::Invalid) when somebody meets
    /// content of it that is damaged, for that [reason](ami_core::Image::state_reason), and then is only to be deregistered.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, Region};
    /// use std::time::{Duration, Instant};
    /// use ami_core::ImageState;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let deadline = Instant::now() + Duration::from_secs(60);
    /// region.wait_for_image(ami.id(), ImageState::Available, deadline)?;
    /// let state = region.watch_image(ami.id())?;
    /// region.deregister_image(ami.id())?;
    /// assert!(state.wait(deadline, |state| *state == ImageState::Deregistered).is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what reading the state store met.
    pub fn watch_image(&self, id: AmiId) -> Result<Watch<ImageState>> {
        let inner = &self.inner;
        // Nothing is told between the look at it and the watch.
        let _naming = inner.naming.read().unwrap_or_else(PoisonError::into_inner);
        let image = inner.image(id)?.image;
        image.authorize(self.account(), Action::See)?;
        Ok(inner.watched_images.watch(id, image.state()))
    }

    /// Blocks until an image that the account sees is in `state`.
    ///
    /// # Errors
    ///
    /// As [`watch_image`](Self::watch_image), and [`IncorrectState`](ErrorKind::IncorrectState) if it is in another state at
    /// the deadline, or, at once, in one from which it does not come into `state` any more: that says why it is in it.
    pub fn wait_for_image(&self, id: AmiId, state: ImageState, deadline: Instant) -> Result<()> {
        let what = match self.watch_image(id)?.wait(deadline, |now| *now == state || !leads_to(*now, state)) {
            Ok(now) if now == state => return Ok(()),
            Ok(now) => {
                let image = self.inner.image(id).ok();
                let why = image.as_ref().and_then(|record| record.image.state_reason());
                let why = why.map_or_else(String::new, |why| format!(" ({why})"));
                format!("the image {id} is {now}{why}, and does not become {state} any more")
            }
            Err(now) => format!("the image {id} is {now}, not {state}, at the deadline"),
        };
        Err(Error::new(ErrorKind::IncorrectState, what))
    }
}

/// Whether an image in the state `from` is in `to`, or can come into it, by whatever other states.
fn leads_to(from: ImageState, to: ImageState) -> bool {
    let mut reached = vec![from];
    let mut at = 0;
    while let Some(state) = reached.get(at).copied() {
        let next = ImageState::ALL.iter().filter(|next| state.can_become(**next) && !reached.contains(*next));
        reached.extend(next.copied().collect::<Vec<_>>());
        at += 1;
    }
    reached.contains(&to)
}

impl Inner {
    /// Tells those who watch an image of the state that it has come to. Nothing is held that they could want.
    pub(crate) fn tell_image(&self, id: AmiId) {
        let look = |told: &ImageState| match self.image(id) {
            Ok(record) => record.image.state(),
            Err(e) if e.kind() == ErrorKind::ImageNotFound => ImageState::Deregistered,
            Err(_) => *told,
        };
        self.watched_images.tell(id, look, |state| *state == ImageState::Deregistered);
    }

    /// Looks at an image with which something has failed: one whose content is damaged is invalid.
    pub(crate) fn look_for_damage(&self, id: AmiId, failed: &Error) {
        if failed.kind() != ErrorKind::Corrupt {
            return;
        }
        if let Err(e) = self.set_invalid(id) {
            tracing::warn!(image = %id, error = chain(&e), "cannot note that an image is damaged");
        }
    }

    fn set_invalid(&self, id: AmiId) -> Result<()> {
        let naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let record = self.image(id)?;
        let Some(damage) = self.damage_of(&record.image) else { return Ok(()) };
        if !record.image.state().can_become(ImageState::Invalid) {
            return Ok(());
        }
        let mut image = record.image.clone();
        image.set_state(ImageState::Invalid)?;
        image.set_state_reason(Some(StateReason::new("Server.InternalError", chain(&damage))));
        self.store.commit(|c| c.put(&ImageRecord { image, ..record }))?;
        drop(naming);
        self.tell_image(id);
        Ok(())
    }

    /// What says that content of an image's is there and is not what its digest says, if it is so.
    fn damage_of(&self, image: &Image) -> Option<Error> {
        let mappings = image.ami().manifest().block_device_mappings();
        let opened = mappings.iter().filter_map(|m| m.content()).map(|digest| self.content(digest));
        opened.filter_map(Result::err).find(|e| e.kind() == ErrorKind::Corrupt)
    }
}

//! Ids of images, none of which is used again.
//!
//! An id is a digest of region, owner, name and content, so that two images that are alike in these would have the same: how
//! many there were before is a part of it, where there were any.

use ami_core::{AmiId, AnyAmi, Image};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::record::{FormerImage, ImageRecord};
use crate::region::Inner;
use crate::store::{Changes, Record};

/// How many images there were that are alike and are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct UsedIds {
    /// The id of the first.
    id: AmiId,
    count: u64,
}

impl Record for UsedIds {
    const TABLE: &'static str = "used-image-ids";

    fn key(&self) -> String {
        self.id.to_string()
    }
}

impl Inner {
    /// The same image under an id that none has had. The caller holds `naming` for writing.
    pub(crate) fn under_new_id(&self, image: Image) -> Result<Image> {
        let used = self.store.get::<UsedIds>(&image.ami().with_incarnation(0).id().to_string())?;
        let mut image = image.with_incarnation(used.map_or(0, |used| used.count));
        // One that is deregistered and has been kept, or went before that was counted.
        while self.is_used(image.id())? {
            let next = image.ami().incarnation() + 1;
            image = image.with_incarnation(next);
        }
        Ok(image)
    }

    /// Whether an image that is gone had the id of this one.
    pub(crate) fn was_used(&self, ami: &AnyAmi) -> Result<bool> {
        let first = ami.with_incarnation(0).id().to_string();
        let used = self.store.get::<UsedIds>(&first)?.map_or(0, |used| used.count);
        Ok(ami.incarnation() < used || self.store.get::<FormerImage>(&ami.id().to_string())?.is_some())
    }

    fn is_used(&self, id: AmiId) -> Result<bool> {
        let id = id.to_string();
        Ok(self.store.get::<ImageRecord>(&id)?.is_some() || self.store.get::<FormerImage>(&id)?.is_some())
    }

    /// Notes that the id of an image which goes has been used.
    pub(crate) fn put_used(&self, changes: &mut Changes, image: &Image) -> Result<()> {
        let id = image.ami().with_incarnation(0).id();
        let before = self.store.get::<UsedIds>(&id.to_string())?.map_or(0, |used| used.count);
        changes.put(&UsedIds { id, count: before.max(image.ami().incarnation() + 1) })
    }
}

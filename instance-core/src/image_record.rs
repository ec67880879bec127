//! What a region keeps of its images.

use ami_core::{Image, InstanceId, SnapshotId, StateReason};
use serde::{Deserialize, Serialize};

use crate::boot_cache::BootPlan;
use crate::store::Record;

/// An image and what it boots.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub(crate) struct ImageRecord {
    pub(crate) image: Image,
    /// What it boots; of an image that was put into the catalogue as a record alone, that is found out when it
    /// is launched.
    pub(crate) boot: Option<BootPlan>,
}

impl Record for ImageRecord {
    const TABLE: &'static str = "images";

    fn key(&self) -> String {
        self.image.ami().id().to_string()
    }
}

/// The same as it is stored: what came later of an image is beside it, where an earlier version passes over what it does not
/// know.
#[derive(Serialize, Deserialize)]
struct Written {
    image: Image,
    boot: Option<BootPlan>,
    /// Those stay for as long as it does.
    snapshots: Vec<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_instance: Option<InstanceId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state_reason: Option<StateReason>,
}

impl From<Written> for ImageRecord {
    fn from(written: Written) -> Self {
        let Written { mut image, boot, snapshots, source_instance, state_reason } = written;
        image.set_snapshots(snapshots);
        image.set_source(image.source_image().cloned(), source_instance);
        image.set_state_reason(state_reason);
        Self { image, boot }
    }
}

impl From<ImageRecord> for Written {
    fn from(record: ImageRecord) -> Self {
        let ImageRecord { image, boot } = record;
        Self {
            boot,
            snapshots: image.snapshots().collect(),
            source_instance: image.source_instance(),
            state_reason: image.state_reason().cloned(),
            image: alone(image),
        }
    }
}

/// The image without what is beside it.
fn alone(mut image: Image) -> Image {
    image.set_snapshots([]);
    image.set_source(image.source_image().cloned(), None);
    image.set_state_reason(None);
    image
}

/// An image that was deregistered while there were instances of it: what an image of one of them is
/// described after.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct FormerImage(pub(crate) Image);

impl FormerImage {
    pub(crate) fn of(image: Image) -> Self {
        Self(alone(image))
    }
}

impl Record for FormerImage {
    const TABLE: &'static str = "former-images";

    fn key(&self) -> String {
        self.0.ami().id().to_string()
    }
}

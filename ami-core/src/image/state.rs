//! States of images, and why they are in them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::words;

words! {
    /// The state of an image: all of EC2's.
    ///
    /// | From | To |
    /// |---|---|
    /// | pending | available, transient, failed, error, invalid, deregistered |
    /// | transient | pending, available, failed, error, invalid, deregistered |
    /// | available | disabled, invalid, deregistered |
    /// | disabled | available, deregistered |
    /// | invalid, failed, error | deregistered |
    /// | deregistered | nothing |
    ///
    /// Which of them there are is up to who keeps the images. The id of an image is a digest of its content, so that an image
    /// has none, and no record, before its content is whole: the regions of `instance-core` say of those that are being made
    /// by name what is `pending`, and what is `failed` (`Region::unfinished_images`), and of those that are there what is
    /// `available`, `disabled` or `invalid`. There `transient` and `error` are words that EC2 has: what meets an obstacle has
    /// `failed`, be it whose fault it may, and its [`StateReason`] says whose it was.
    ///
    /// ```
    /// use ami_core::ImageState;
    ///
    /// assert!(ImageState::Pending.can_become(ImageState::Available));
    /// let leads_nowhere = |from: ImageState| ImageState::ALL.iter().all(|to| !from.can_become(*to));
    /// let ends: Vec<_> = ImageState::ALL.iter().filter(|state| leads_nowhere(**state)).collect();
    /// assert_eq!(ends, [&ImageState::Deregistered]);
    /// ```
    ImageState, "state of an image" {
        /// Being made.
        Pending = "pending",
        /// Ready to be launched.
        Available = "available",
        /// Its content is no longer whole.
        Invalid = "invalid",
        /// Given up: no instance can be launched any more, those that run are untouched.
        Deregistered = "deregistered",
        /// Its making has met an obstacle that may pass.
        Transient = "transient",
        /// It could not be made.
        Failed = "failed",
        /// It could not be made because of an error of the service.
        Error = "error",
        /// Set aside by its owner: hidden from everybody else, and not to be launched.
        Disabled = "disabled",
    }
}

impl ImageState {
    /// Whether an image in this state can come into the state `next`.
    pub const fn can_become(self, next: Self) -> bool {
        use ImageState::{Available, Deregistered, Disabled, Error, Failed, Invalid, Pending, Transient};
        match self {
            Pending => matches!(next, Available | Transient | Failed | Error | Invalid | Deregistered),
            Transient => matches!(next, Pending | Available | Failed | Error | Invalid | Deregistered),
            Available => matches!(next, Disabled | Invalid | Deregistered),
            Disabled => matches!(next, Available | Deregistered),
            Invalid | Failed | Error => matches!(next, Deregistered),
            Deregistered => false,
        }
    }
}

/// Why an image or an instance is in its state (`StateReason`).
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
/// use ami_core::{ImageState, StateReason};
///
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let mut image = Image::new(ami);
/// image.set_state(ImageState::Invalid)?;
/// image.set_state_reason(Some(StateReason::new("Server.InternalError", "its content is damaged")));
/// let reason = image.state_reason().ok_or("it has one")?;
/// assert_eq!((reason.code.as_str(), reason.to_string().len()), ("Server.InternalError", 44));
/// image.set_state(ImageState::Deregistered)?; // for another reason
/// assert_eq!(image.state_reason(), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StateReason {
    /// EC2's code, such as `Client.UserInitiatedShutdown`: it begins with whose fault or wish it was.
    pub code: String,
    /// The same in words.
    pub message: String,
}

impl StateReason {
    /// A reason of this code, in these words.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }
}

impl fmt::Display for StateReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

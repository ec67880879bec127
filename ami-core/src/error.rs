//! The crate's error: a kind to match on, EC2's code for it, and a text.

use std::error::Error as StdError;
use std::fmt;

use crate::{AccountId, AmiId, ArchitectureMismatch, MalformedDigest, MalformedId, UnknownArchitecture};

/// What went wrong, to match on.
///
/// ```
/// use ami_core::{AmiId, Catalog, ErrorKind, MemoryCatalog};
///
/// let id: AmiId = "ami-0123456789abcdef0".parse()?;
/// match MemoryCatalog::new().get(&id) {
///     Err(e) if e.kind() == ErrorKind::NotFound => assert_eq!(e.kind().code(), "InvalidAMIID.NotFound"),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A text is no id of the kind asked for.
    MalformedId,
    /// A text is no account id.
    MalformedAccount,
    /// A name breaks EC2's rule for the names of images.
    MalformedName,
    /// The owner has another image of that name in the region, or the very image is or was there.
    DuplicateName,
    /// There is no image with that id.
    NotFound,
    /// The image is in a state in which it cannot be used so.
    Unavailable,
    /// The account may not do this.
    AuthFailure,
    /// The account has not accepted the terms of a product.
    OptInRequired,
    /// A block device mapping cannot be.
    InvalidBlockDeviceMapping,
    /// A value is outside what its parameter takes.
    InvalidParameterValue,
    /// What is added to an attribute of an image, or removed from one, is no item of it.
    InvalidAttributeItemValue,
    /// A filter has more values than one may have.
    FilterLimitExceeded,
    /// Two values exclude each other.
    InvalidParameterCombination,
    /// A value that has no default was not given.
    MissingParameter,
    /// Bytes are no manifest of an image.
    InvalidManifest,
    /// Content is other than its digest or id says.
    DigestMismatch,
    /// An image is of another architecture than the one asked for.
    ArchitectureMismatch,
    /// A tag's key breaks the rule for keys.
    MalformedTagKey,
    /// There are more tags than a resource can have.
    TagLimitExceeded,
    /// The state of an image does not allow the change.
    IncorrectState,
    /// Someone else changed the image in the meantime.
    Conflict,
    /// A token is not that of an earlier page.
    InvalidNextToken,
    /// A text is no id of anything that can have tags.
    InvalidResourceId,
    /// The catalog's own storage failed.
    Internal,
}

impl ErrorKind {
    /// The code of EC2's error.
    pub const fn code(self) -> &'static str {
        match self {
            Self::MalformedId => "InvalidAMIID.Malformed",
            Self::MalformedAccount => "InvalidUserID.Malformed",
            Self::MalformedName => "InvalidAMIName.Malformed",
            Self::DuplicateName => "InvalidAMIName.Duplicate",
            Self::NotFound => "InvalidAMIID.NotFound",
            Self::Unavailable => "InvalidAMIID.Unavailable",
            Self::AuthFailure => "AuthFailure",
            Self::OptInRequired => "OptInRequired",
            Self::InvalidBlockDeviceMapping => "InvalidBlockDeviceMapping",
            Self::InvalidParameterValue | Self::ArchitectureMismatch => "InvalidParameterValue",
            Self::InvalidAttributeItemValue => "InvalidAMIAttributeItemValue",
            Self::FilterLimitExceeded => "FilterLimitExceeded",
            Self::InvalidParameterCombination => "InvalidParameterCombination",
            Self::MissingParameter => "MissingParameter",
            Self::InvalidManifest | Self::DigestMismatch => "InvalidManifest",
            Self::MalformedTagKey => "InvalidTagKey.Malformed",
            Self::TagLimitExceeded => "TagLimitExceeded",
            Self::IncorrectState | Self::Conflict => "IncorrectState",
            Self::InvalidNextToken => "InvalidNextToken",
            Self::InvalidResourceId => "InvalidID",
            Self::Internal => "InternalError",
        }
    }
}

/// Why something about an image cannot be done.
///
/// ```
/// use ami_core::{Ami, ErrorKind, X86_64};
///
/// let err = Ami::<X86_64>::builder("web").build(&"local".parse()?, &"123456789012".parse()?).unwrap_err();
/// assert_eq!(err.kind(), ErrorKind::MissingParameter);
/// assert_eq!(err.code(), "MissingParameter");
/// assert_eq!(err.to_string(), "the image has no root device name");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    code: &'static str,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. An implementation of [`Catalog`](crate::Catalog) makes its errors so.
    ///
    /// ```
    /// use std::error::Error as _;
    /// use ami_core::{AmiId, Error, ErrorKind};
    ///
    /// // What a catalog of one's own says.
    /// let full = Error::new(ErrorKind::Internal, "the catalog cannot be written")
    ///     .with_source(std::io::Error::from(std::io::ErrorKind::StorageFull));
    /// assert!(full.source().is_some() && full.code() == "InternalError");
    /// let id: AmiId = "ami-0123456789abcdef0".parse()?;
    /// assert_eq!(Error::not_found(&id).kind(), ErrorKind::NotFound);
    /// assert_eq!(Error::conflict(&id).kind(), ErrorKind::Conflict);
    /// let taken = Error::duplicate_name("web", &"123456789012".parse()?, &id);
    /// assert_eq!((taken.code(), Error::used_id(&id).kind()), ("InvalidAMIName.Duplicate", taken.kind()));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, code: kind.code(), message: message.into(), source: None }
    }

    /// The same error, with what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// There is no image `id`.
    pub fn not_found(id: &AmiId) -> Self {
        Self::new(ErrorKind::NotFound, format!("the image {id} does not exist"))
    }

    /// The account has an image of that name already, the image `holder`.
    pub fn duplicate_name(name: &str, owner: &AccountId, holder: &AmiId) -> Self {
        let message = format!("the name {} of account {owner} is taken by {holder}", quote(name));
        Self::new(ErrorKind::DuplicateName, message)
    }

    /// There was an image `id`, and an id is used once.
    pub fn used_id(id: &AmiId) -> Self {
        let message = format!("there was an image {id}, which was removed; its id is not used again");
        Self::new(ErrorKind::DuplicateName, message)
    }

    /// The image `id` is no longer what the caller took it for.
    pub fn conflict(id: &AmiId) -> Self {
        Self::new(ErrorKind::Conflict, format!("the image {id} was changed in the meantime"))
    }

    /// What went wrong, to match on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The code of EC2's error, such as `InvalidAMIID.NotFound`.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// What caused it, for an error of another crate's that says the same.
    pub fn into_source(self) -> Option<Box<dyn StdError + Send + Sync>> {
        self.source
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<MalformedId> for Error {
    fn from(err: MalformedId) -> Self {
        Self { code: err.code(), ..Self::new(ErrorKind::MalformedId, err.to_string()) }
    }
}

impl From<MalformedDigest> for Error {
    fn from(err: MalformedDigest) -> Self {
        Self::new(ErrorKind::InvalidParameterValue, err.to_string())
    }
}

impl From<UnknownArchitecture> for Error {
    fn from(err: UnknownArchitecture) -> Self {
        Self::new(ErrorKind::InvalidParameterValue, err.to_string())
    }
}

impl From<ArchitectureMismatch> for Error {
    fn from(err: ArchitectureMismatch) -> Self {
        Self::new(ErrorKind::ArchitectureMismatch, err.to_string())
    }
}

pub(crate) fn invalid_value(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidParameterValue, message)
}

/// `text` in quotes and escaped, cut to a length that an error message can carry.
pub(crate) fn quote(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

/// Whether `text` is printable and of 1 to `max` bytes: the rule for free texts.
pub(crate) fn check_text(what: &str, text: &str, max: usize) -> Result<(), Error> {
    if text.is_empty() || text.len() > max || text.chars().any(char::is_control) {
        let message =
            format!("the {what} {} must be 1 to {max} bytes without control characters", quote(text));
        return Err(invalid_value(message));
    }
    Ok(())
}

/// Gives a validated text type its display, its debug form and its place in JSON, all through
/// `FromStr` and `as_str`.
macro_rules! text_type {
    ($name:ident) => {
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Debug::fmt(self.as_str(), f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl TryFrom<String> for $name {
            type Error = $crate::Error;

            fn try_from(text: String) -> Result<Self, $crate::Error> {
                text.parse()
            }
        }

        impl TryFrom<&str> for $name {
            type Error = $crate::Error;

            fn try_from(text: &str) -> Result<Self, $crate::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.as_str().to_owned()
            }
        }
    };
}

/// An enumeration whose values are words of EC2's: in text, in JSON, and back.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant,)*
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The value in EC2's words.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::Error;

            fn from_str(text: &str) -> Result<Self, $crate::Error> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => {
                        let words = [$($word),*].join(", ");
                        let text = $crate::error::quote(text);
                        Err($crate::error::invalid_value(format!("{text} is no {}; use one of {words}", $what)))
                    }
                }
            }
        }
    };
}

pub(crate) use {text_type, words};

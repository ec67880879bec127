//! What can go wrong while an image is built.

use std::error::Error as StdError;
use std::{fmt, io};

use crate::Prerequisite;
use crate::host::install_command;

/// A result of this crate.
///
/// ```
/// fn login_user(recipe: &str) -> quick_start::Result<&'static str> {
///     Ok(quick_start::recipe(recipe)?.login_user())
/// }
/// assert_eq!(login_user("minimal")?, "root");
/// # Ok::<(), quick_start::Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
///
/// ```
/// use quick_start::ErrorKind;
///
/// let advice = match quick_start::recipe("debian-12-cloud")?.check_host() {
///     Ok(()) => "this machine can build it".to_owned(),
///     Err(e) if e.kind() == ErrorKind::MissingPrerequisite => match e.install_command() {
///         Some(command) => command, // sudo apt-get update && sudo apt-get install -y …
///         None => "install Debian's tools".to_owned(),
///     },
///     Err(e) => e.to_string(),
/// };
/// println!("{advice}");
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The catalogue has no recipe of that name.
    RecipeNotFound,
    /// A recipe is not for that architecture.
    UnsupportedArchitecture,
    /// A machine of this architecture, or of this distribution, cannot build it.
    UnsupportedHost,
    /// The host lacks programs or files that packages bring: [`Error::missing`] names them.
    MissingPrerequisite,
    /// The user may not do on this host what building takes.
    NotPermitted,
    /// The distribution has no such package.
    PackageNotFound,
    /// What was built is not in its directory any more: another build has taken its place.
    ImageReplaced,
    /// Bytes are not what their digest or their format says.
    Corrupt,
    /// A program that was called has failed, apt-get without a network among them.
    ProgramFailed,
    /// A value is outside what its parameter takes.
    InvalidParameter,
    /// A token is not that of an earlier page.
    InvalidNextToken,
    /// Whoever watched its progress ended it.
    Cancelled,
    /// The file system has no space left.
    NoSpace,
    /// The region did not take the image: the source is an [`instance_core::Error`].
    Region,
    /// Any other failure of the operating system.
    Io,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use quick_start::ErrorKind;
///
/// let error = quick_start::recipe("windows").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::RecipeNotFound);
/// assert!(error.missing().is_empty() && error.install_command().is_none());
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    missing: Vec<Prerequisite>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), missing: Vec::new(), source: None }
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn missing_on_host(missing: Vec<Prerequisite>) -> Self {
        let names: Vec<_> = missing.iter().map(|prerequisite| prerequisite.name()).collect();
        let context = format!("this host lacks {}", names.join(", "));
        let context = match install_command(&missing) {
            Some(command) => format!("{context}; please run: {command}"),
            None => format!("{context}, and has no apt-get to install them with"),
        };
        Self { missing, ..Self::new(ErrorKind::MissingPrerequisite, context) }
    }

    pub(crate) fn io(source: impl Into<io::Error>, context: impl Into<String>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::new(kind, context).with_source(source)
    }

    /// The same, with what it happened to said first.
    pub(crate) fn about(mut self, what: impl fmt::Display) -> Self {
        self.context = format!("{what}: {}", self.context);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the host lacks, if that is it.
    pub fn missing(&self) -> &[Prerequisite] {
        &self.missing
    }

    /// The line that installs what is missing, where apt-get is there to do it.
    pub fn install_command(&self) -> Option<String> {
        install_command(&self.missing)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<ami_core::Error> for Error {
    fn from(error: ami_core::Error) -> Self {
        let kind = match error.kind() {
            ami_core::ErrorKind::InvalidNextToken => ErrorKind::InvalidNextToken,
            _ => ErrorKind::InvalidParameter,
        };
        Self::new(kind, error.to_string())
    }
}

/// Says what an operation of the host's was for.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::io(e, what()))
    }
}

//! What is installed on an image: its operating system and the software on it.

use serde::{Deserialize, Serialize};

use crate::error::{Error, check_text, words};

words! {
    /// The family of an operating system.
    ///
    /// ```
    /// use ami_core::{OperatingSystem, OsFamily};
    ///
    /// let family: OsFamily = "bsd".parse()?;
    /// assert_eq!(OperatingSystem::new(family, "openbsd", "7.6").family(), OsFamily::Bsd);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    OsFamily, "family of operating systems" {
        /// Linux.
        Linux = "linux",
        /// A BSD.
        Bsd = "bsd",
        /// Windows.
        Windows = "windows",
        /// Anything else, such as a unikernel or a test program without an operating system.
        Other = "other",
    }
}

/// The operating system of an image, such as Debian 12.
///
/// ```
/// use ami_core::{OperatingSystem, OsFamily};
///
/// let os = OperatingSystem::linux("debian", "12");
/// assert_eq!((os.family(), os.name(), os.version()), (OsFamily::Linux, "debian", "12"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatingSystem {
    family: OsFamily,
    name: String,
    version: String,
}

impl OperatingSystem {
    /// An operating system; name and version as `ID` and `VERSION_ID` of os-release(5) give them.
    pub fn new(family: OsFamily, name: impl Into<String>, version: impl Into<String>) -> Self {
        Self { family, name: name.into(), version: version.into() }
    }

    /// A Linux distribution.
    pub fn linux(name: impl Into<String>, version: impl Into<String>) -> Self {
        Self::new(OsFamily::Linux, name, version)
    }

    /// The family.
    pub fn family(&self) -> OsFamily {
        self.family
    }

    /// The name, such as `debian`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version, such as `12`; empty for a rolling release.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        check_text("name of the operating system", &self.name, 128)?;
        check_version("version of the operating system", &self.version, 128)
    }
}

/// A piece of software on an image: a package and its version.
///
/// ```
/// use ami_core::Software;
///
/// let ssh = Software::new("openssh-server", "1:9.2p1-2+deb12u3");
/// assert_eq!((ssh.name(), ssh.version()), ("openssh-server", "1:9.2p1-2+deb12u3"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Software {
    name: String,
    version: String,
}

impl Software {
    /// The software `name` in `version`.
    pub fn new(name: impl Into<String>, version: impl Into<String>) -> Self {
        Self { name: name.into(), version: version.into() }
    }

    /// The name, such as `openssh-server`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version, such as `1:9.2p1-2+deb12u3`; empty if it has none.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        check_text("name of the software", &self.name, 255)?;
        check_version("version of the software", &self.version, 255)
    }
}

/// A rolling release has no version, and some software has none either.
fn check_version(what: &str, version: &str, max: usize) -> Result<(), Error> {
    if version.is_empty() { Ok(()) } else { check_text(what, version, max) }
}

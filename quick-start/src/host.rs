//! What a host has to have installed, and where it is found.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Error, Result};

/// Where administration programs live that an ordinary user's `PATH` leaves out.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// A program or a file that has to be on the host, and the Debian package that brings it.
///
/// ```
/// use quick_start::Prerequisite;
///
/// let mke2fs = Prerequisite::new("mke2fs", "e2fsprogs");
/// let keys = Prerequisite::new("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring");
/// println!("{} comes with {}: {}", keys.name(), keys.package(), keys.is_there());
/// # assert_eq!(mke2fs.package(), "e2fsprogs");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prerequisite {
    name: &'static str,
    package: &'static str,
}

impl Prerequisite {
    /// The program `name`, which is looked for on the search path, or the file with this absolute path.
    pub const fn new(name: &'static str, package: &'static str) -> Self {
        Self { name, package }
    }

    /// The program's name, or the file's path.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The Debian package that brings it.
    pub fn package(&self) -> &'static str {
        self.package
    }

    /// Whether the host has it now.
    pub fn is_there(&self) -> bool {
        if self.name.starts_with('/') { Path::new(self.name).exists() } else { find(self.name).is_some() }
    }
}

pub(crate) const APT_GET: Prerequisite = Prerequisite::new("apt-get", "apt");
pub(crate) const DPKG_DEB: Prerequisite = Prerequisite::new("dpkg-deb", "dpkg");
pub(crate) const FAKEROOT: Prerequisite = Prerequisite::new("fakeroot", "fakeroot");
pub(crate) const MKE2FS: Prerequisite = Prerequisite::new("mke2fs", "e2fsprogs");
pub(crate) const MMDEBSTRAP: Prerequisite = Prerequisite::new("mmdebstrap", "mmdebstrap");
pub(crate) const NEWUIDMAP: Prerequisite = Prerequisite::new("newuidmap", "uidmap");
pub(crate) const SETPRIV: Prerequisite = Prerequisite::new("setpriv", "util-linux");
/// The keys that Debian's archives are signed with.
pub(crate) const KEYRING: Prerequisite =
    Prerequisite::new("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring");

/// Fails unless all of them are there.
///
/// ```
/// use quick_start::{ErrorKind, Prerequisite, require};
///
/// let wanted = [Prerequisite::new("sh", "dash"), Prerequisite::new("no-such-program", "no-such-package")];
/// let error = require(&wanted).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::MissingPrerequisite);
/// assert_eq!(error.missing(), &wanted[1..]);
/// ```
///
/// # Errors
///
/// [`MissingPrerequisite`](crate::ErrorKind::MissingPrerequisite), which names all that are not.
pub fn require(prerequisites: &[Prerequisite]) -> Result<()> {
    let missing: Vec<_> = prerequisites.iter().filter(|p| !p.is_there()).copied().collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::missing_on_host(missing)) }
}

/// The line that installs these, if apt-get is there and there is anything to install.
pub(crate) fn install_command(missing: &[Prerequisite]) -> Option<String> {
    let packages = packages(missing);
    let sudo = if is_root() { "" } else { "sudo " };
    (!packages.is_empty() && APT_GET.is_there())
        .then(|| format!("{sudo}apt-get update && {sudo}apt-get install -y {}", packages.join(" ")))
}

/// The packages that bring these, each once.
fn packages(prerequisites: &[Prerequisite]) -> Vec<&'static str> {
    let mut packages: Vec<_> = prerequisites.iter().map(Prerequisite::package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The search path for programs: the caller's own, then the system directories.
pub(crate) fn search_path() -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&own).chain(SYSTEM_DIRS.iter().map(Into::into));
    env::join_paths(dirs).unwrap_or(own)
}

/// The file of the program called `name`: on the caller's search path, or where administration programs are, which
/// an ordinary user's leaves out.
///
/// ```
/// assert!(quick_start::find_program("sh").is_some());
/// assert_eq!(quick_start::find_program("no-such-program"), None);
/// ```
pub fn find_program(name: impl AsRef<Path>) -> Option<PathBuf> {
    find(name.as_ref())
}

fn find(name: impl AsRef<Path>) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|dir| dir.join(name.as_ref())).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// A command with the search path of [`find_program`], in the C locale, without standard input.
///
/// ```
/// let output = quick_start::command("echo").arg("hello").output()?;
/// assert_eq!(output.stdout, b"hello\n");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", search_path()).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

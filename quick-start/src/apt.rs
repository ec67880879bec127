//! Packages of Debian and Ubuntu, fetched and unpacked without being installed.
//!
//! apt decides which version is current and checks the archive's signature; the file that arrives is
//! compared once more with the digest in the signed index, and `dpkg-deb` unpacks it into a cache.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use ami_core::{Architecture, Digest, DigestWriter};
use deb822_fast::borrowed::BorrowedParser;
use serde::{Deserialize, Serialize};

use crate::error::Context as _;
use crate::host::{self, KEYRING};
use crate::progress::Reporter;
use crate::work::Work;
use crate::{Error, ErrorKind, Result, process};

/// Where Debian's packages come from.
pub(crate) const MIRROR: &str = "http://deb.debian.org/debian";

/// Whose packages they are, and where apt keeps its account of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Apt {
    /// The release of Debian's and the architecture, as Debian names it; the host's own if there is none.
    release: Option<(&'static str, &'static str)>,
    /// Where the account is that is not the host's.
    dir: PathBuf,
    /// Whether that is used, and not the host's.
    own_lists: bool,
    /// Whether its lists were fetched just now: they are as new as they can be.
    pub(crate) updated: bool,
}

impl Apt {
    /// The host's packages, as apt is set up there. Where its lists are missing or stale, lists of our own are
    /// fetched below `cache`: nothing of the host's changes, and nobody has to be root.
    pub(crate) fn of_host(cache: &Path) -> Self {
        Self { release: None, dir: cache.join("apt-host"), ..Self::default() }
    }

    /// The packages of a release of Debian's.
    pub(crate) fn of_debian(cache: &Path, suite: &'static str, architecture: Architecture) -> Result<Self> {
        let architecture = debian_name(architecture);
        let dir = cache.join(format!("apt-{suite}-{architecture}"));
        let apt = Self { release: Some((suite, architecture)), dir, own_lists: true, updated: false };
        apt.make_dirs()?;
        let source = format!("deb [signed-by={}] {MIRROR} {suite} main\n", KEYRING.name());
        let list = apt.dir.join("sources.list");
        fs::write(&list, source).context(|| format!("cannot write {}", list.display()))?;
        let status = apt.dir.join("status");
        fs::write(&status, "").context(|| format!("cannot write {}", status.display()))?;
        Ok(apt)
    }

    fn make_dirs(&self) -> Result<()> {
        for place in ["lists/partial", "cache/archives/partial"] {
            let dir = self.dir.join(place);
            fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut apt = process::command(program);
        let mut option = |name: &str, value: &dyn std::fmt::Display| {
            apt.arg("-o").arg(format!("{name}={value}"));
        };
        if self.own_lists {
            option("Dir::State::lists", &self.dir.join("lists").display());
            option("Dir::Cache", &self.dir.join("cache").display());
            option("Acquire::Languages", &"none");
        }
        if let Some((_, architecture)) = self.release {
            option("Dir::Etc::sourcelist", &self.dir.join("sources.list").display());
            option("Dir::Etc::sourceparts", &"/dev/null");
            // What the host has installed, and which versions its administrator prefers, is of another system.
            option("Dir::State::status", &self.dir.join("status").display());
            option("Dir::Etc::preferences", &"/dev/null");
            option("Dir::Etc::preferencesparts", &"/dev/null");
            // Without a network it is not content with old lists, nor with none.
            option("APT::Update::Error-Mode", &"any");
            option("APT::Architecture", &architecture);
            option("APT::Architectures", &architecture);
        }
        if host::is_root() {
            // apt would drop to its own user, which may not write here.
            option("APT::Sandbox::User", &"root");
        }
        apt
    }

    /// The version of the first of `names` that apt knows, fetching its lists anew if it knows none.
    pub(crate) fn candidate(&mut self, names: &[&str], reporter: &mut Reporter<'_>) -> Result<Candidate> {
        if let Some(candidate) = self.known(names, reporter)? {
            return Ok(candidate);
        }
        // An earlier build may have fetched lists.
        if !self.own_lists && self.dir.join("lists").is_dir() {
            self.own_lists = true;
            if let Some(candidate) = self.known(names, reporter)? {
                return Ok(candidate);
            }
        }
        if !self.updated {
            self.update(reporter)?;
        }
        self.known(names, reporter)?.ok_or_else(|| {
            let what = format!("apt knows no package {}", names.join(" or "));
            Error::new(ErrorKind::PackageNotFound, what)
        })
    }

    fn known(&self, names: &[&str], reporter: &mut Reporter<'_>) -> Result<Option<Candidate>> {
        for name in names {
            let mut show = self.command("apt-cache");
            match process::output(show.args(["show", "--no-all-versions", name]), reporter) {
                Ok(text) => match parse(&text) {
                    Some(candidate) => return Ok(Some(candidate)),
                    None => continue,
                },
                Err(e) if e.kind() == ErrorKind::ProgramFailed => continue,
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Fetches the package lists anew where they are our own.
    pub(crate) fn update_own(&mut self, reporter: &mut Reporter<'_>) -> Result<()> {
        if self.own_lists { self.update(reporter) } else { Ok(()) }
    }

    /// Fetches package lists of our own anew.
    pub(crate) fn update(&mut self, reporter: &mut Reporter<'_>) -> Result<()> {
        reporter.detail("updating the package lists");
        self.own_lists = true;
        self.make_dirs()?;
        process::output(self.command("apt-get").args(["-q", "update"]), reporter)?;
        self.updated = true;
        Ok(())
    }

    /// Fetches the package into `cache`, which the caller has locked, and unpacks it there, or finds it there from an
    /// earlier time.
    pub(crate) fn unpack(
        &self,
        package: Package,
        cache: &Path,
        reporter: &mut Reporter<'_>,
    ) -> Result<Unpacked> {
        let Package { name, version, architecture, .. } = &package;
        let root = cache.join(format!("{name}_{version}_{architecture}"));
        // A crash may have left an empty one.
        if root.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            return Ok(Unpacked { package, root });
        }
        let work = Work::new(cache)?;
        self.download(&package, work.path(), reporter)?;
        let archive = single_file(work.path())?;
        let actual = digest_of(&archive)?;
        if actual != package.sha256 {
            let what =
                format!("{name} {version} has SHA-256 {actual}, but the index says {}", package.sha256);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let tree = work.path().join("tree");
        process::output(process::command("dpkg-deb").arg("-x").arg(&archive).arg(&tree), reporter)?;
        work.sync()?;
        fs::rename(&tree, &root).context(|| format!("cannot move a package to {}", root.display()))?;
        Ok(Unpacked { package, root })
    }

    fn download(&self, package: &Package, into: &Path, reporter: &mut Reporter<'_>) -> Result<()> {
        let Package { name, version, architecture, .. } = package;
        let mut apt = self.command("apt-get");
        apt.current_dir(into).args(["-q", "download"]).arg(format!("{name}:{architecture}={version}"));
        process::output(&mut apt, reporter).map_err(|e| e.about(format!("cannot fetch {name}"))).map(drop)
    }
}

/// The architecture as Debian names it.
pub(crate) const fn debian_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::X86 => "i386",
        Architecture::X86_64 => "amd64",
        Architecture::Arm64 => "arm64",
    }
}

/// A version of a package, as the index of its distribution describes it.
///
/// ```no_run
/// let built = quick_start::Build::new(quick_start::recipe("minimal")?, "images/minimal").run()?;
/// for package in built.packages() {
///     println!("{} {} {}", package.name, package.version, package.architecture);
/// }
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its architecture, as Debian names it.
    pub architecture: String,
    /// The SHA-256 of the file that it comes in, in hexadecimal; empty where a whole distribution was installed.
    pub sha256: String,
    /// One line.
    pub description: String,
}

/// The version of a package that apt would install.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) package: Package,
    depends: Vec<String>,
}

impl Candidate {
    /// The package whose name starts so that it depends on first.
    pub(crate) fn dependency(&self, prefix: &str) -> Option<&str> {
        self.depends.iter().find(|name| name.starts_with(prefix)).map(String::as_str)
    }
}

/// A package whose files lie in `root`.
pub(crate) struct Unpacked {
    pub(crate) package: Package,
    pub(crate) root: PathBuf,
}

/// Reads the first stanza of `apt-cache show`.
fn parse(text: &str) -> Option<Candidate> {
    // Those of other versions are not read: one that apt does not understand is no concern here.
    let stanza = text.split("\n\n").next()?;
    let paragraph = BorrowedParser::new(stanza).parse_all().ok()?.into_iter().next()?;
    let field = |name: &str| Some((*paragraph.get(name)?.first()?).to_owned());
    let package = Package {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
        sha256: field("SHA256").filter(|digest| digest.len() == 64)?,
        description: field("Description").or_else(|| field("Description-en")).unwrap_or_default(),
    };
    Some(Candidate { package, depends: field("Depends").map(|list| names(&list)).unwrap_or_default() })
}

/// The package names of a dependency field, first alternatives only.
fn names(depends: &str) -> Vec<String> {
    let first = |clause: &str| clause.split(['|', '(', ':']).next().unwrap_or_default().trim().to_owned();
    depends.split(',').map(first).collect()
}

fn single_file(dir: &Path) -> Result<PathBuf> {
    let context = || format!("cannot read {}", dir.display());
    let entries = fs::read_dir(dir).context(context)?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().context(context)?;
    match <[PathBuf; 1]>::try_from(paths) {
        Ok([path]) => Ok(path),
        Err(paths) => {
            let what = format!("apt-get has downloaded {} files and not one", paths.len());
            Err(Error::new(ErrorKind::Corrupt, what))
        }
    }
}

/// The SHA-256 of a file, in hexadecimal.
fn digest_of(path: &Path) -> Result<String> {
    let context = || format!("cannot read {}", path.display());
    let mut digest = DigestWriter::new();
    io::copy(&mut File::open(path).context(context)?, &mut digest).context(context)?;
    Ok(Digest::to_hex(&digest.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee";

    /// Versions that a host has installed are none of a release's, whatever is newer.
    #[test]
    fn a_release_has_nothing_that_the_host_has_installed() {
        let home = tempfile::tempdir().unwrap();
        let apt = Apt::of_debian(home.path(), "bookworm", Architecture::X86_64).unwrap();
        if !host::APT_GET.is_there() {
            eprintln!("SKIPPED: there is no apt");
            return;
        }
        let (status, config) = (home.path().join("status"), home.path().join("apt.conf"));
        let installed = "Package: own\nStatus: install ok installed\nArchitecture: amd64\nVersion: 9\n\n";
        fs::write(&status, installed).unwrap();
        fs::write(&config, format!("Dir::State::status \"{}\";\n", status.display())).unwrap();
        let knows = |mut apt: Command| {
            let output = apt.args(["pkgnames"]).env("APT_CONFIG", &config).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap().contains("own")
        };
        assert!(!knows(apt.command("apt-cache")));
        assert!(knows(Apt::of_host(home.path()).command("apt-cache")), "the test is none");
    }

    #[test]
    fn reads_the_first_stanza() {
        let text = format!(
            "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nArchitecture: amd64\n\
             Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), a | b, c:any\n\
             Description: Linux for x86-64 cloud (meta-package)\n more: text\n\
             Description-md5: 11b0\nSHA256: {DIGEST}\n\nPackage: other\nVersion: 1\n"
        );
        let candidate = parse(&text).unwrap();
        let package = &candidate.package;
        assert_eq!(package.name, "linux-image-cloud-amd64");
        assert_eq!(package.version, "6.1.192-2");
        assert_eq!(package.architecture, "amd64");
        assert_eq!(package.sha256, DIGEST);
        assert_eq!(package.description, "Linux for x86-64 cloud (meta-package)");
        assert_eq!(candidate.depends, ["linux-image-6.1.0-56-cloud-amd64", "a", "c"]);
        assert_eq!(candidate.dependency("linux-image-6"), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(candidate.dependency("linux-image-7"), None);
    }

    #[test]
    fn refuses_an_entry_without_what_is_needed() {
        for text in [
            "",
            "Package: a\nVersion: 1\nArchitecture: amd64\n",
            "Package: a\nVersion: 1\nArchitecture: amd64\nSHA256: 00\n",
            "Version: 1\nArchitecture: amd64\nSHA256: e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee\n",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! Packages of Debian and Ubuntu, fetched and unpacked without being installed.
//!
//! apt decides which version is current and checks the archive's signature; the file that arrives is
//! compared once more with the digest in the signed index, and `dpkg-deb` unpacks it into a cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::prerequisites::{self, update_package_lists};
use crate::{digest, process};

/// Whose packages they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Apt {
    /// The host's, as apt is set up there.
    #[default]
    Host,
    /// Those of a release of Debian's for an architecture, of which apt keeps its account in a directory of
    /// its own.
    Debian {
        /// That directory.
        dir: PathBuf,
        /// As Debian names it.
        architecture: String,
    },
}

impl Apt {
    /// The packages of `suite` for `architecture`, with apt's account of them in `dir`.
    pub(crate) fn of_debian(dir: &Path, suite: &str, architecture: &str) -> anyhow::Result<Self> {
        let context = || format!("cannot make {}", dir.display());
        for place in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(place)).with_context(context)?;
        }
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let source = format!("deb [signed-by={keys}] http://deb.debian.org/debian {suite} main\n");
        fs::write(dir.join("sources.list"), source).with_context(context)?;
        Ok(Self::Debian { dir: dir.to_owned(), architecture: architecture.to_owned() })
    }

    fn command(&self, program: &str) -> std::process::Command {
        let mut apt = process::command(program);
        if let Self::Debian { dir, architecture } = self {
            for (option, value) in [
                ("Dir::State::lists", dir.join("lists")),
                ("Dir::Cache", dir.join("cache")),
                ("Dir::Etc::sourcelist", dir.join("sources.list")),
                ("Dir::Etc::sourceparts", "/dev/null".into()),
                ("APT::Architecture", architecture.into()),
                ("APT::Architectures", architecture.into()),
                ("Acquire::Languages", "none".into()),
            ] {
                apt.arg("-o").arg(format!("{option}={}", value.display()));
            }
        }
        if prerequisites::is_root() {
            // apt would drop to its own user, which may not write here.
            apt.args(["-o", "APT::Sandbox::User=root"]);
        }
        apt
    }

    /// Fetches the package lists anew.
    fn update(&self) -> anyhow::Result<()> {
        match self {
            Self::Host => update_package_lists(),
            Self::Debian { architecture, .. } => {
                eprintln!("  updating the package lists for {architecture}");
                process::output(self.command("apt-get").args(["-q", "update"])).map(drop)
            }
        }
    }
}

/// What apt's index says of one version of one package.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) sha256: String,
    pub(crate) description: String,
    #[serde(skip)]
    depends: Vec<String>,
    #[serde(skip)]
    apt: Apt,
}

/// A package whose files lie in `root`.
pub(crate) struct Unpacked {
    pub(crate) package: Package,
    pub(crate) root: PathBuf,
}

impl Package {
    /// The version that `apt` would install of the first of `names` that it knows.
    pub(crate) fn candidate(apt: &Apt, names: &[&str]) -> anyhow::Result<Self> {
        let known = || names.iter().find_map(|name| show(apt, name).ok());
        if let Some(package) = known() {
            return Ok(package);
        }
        apt.update()?;
        known().with_context(|| format!("apt knows no package {}", names.join(" or ")))
    }

    /// The package of this name, or the one whose name starts so that it depends on first.
    pub(crate) fn dependency(&self, prefix: &str) -> anyhow::Result<&str> {
        let found = self.depends.iter().find(|name| name.starts_with(prefix));
        found.map(String::as_str).with_context(|| format!("{} depends on no {prefix}*", self.name))
    }

    /// Fetches the package into `cache` and unpacks it there, or finds it there from an earlier time.
    pub(crate) fn unpack(self, cache: &Path) -> anyhow::Result<Unpacked> {
        let root = cache.join(format!("{}_{}_{}", self.name, self.version, self.architecture));
        if root.is_dir() {
            return Ok(Unpacked { package: self, root });
        }
        fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let work = tempfile::tempdir_in(cache).context("cannot make a directory for the download")?;
        if self.download(work.path()).is_err() {
            // The index names a file that the archive has replaced since.
            self.apt.update()?;
            self.download(work.path())?;
        }
        let archive = single_file(work.path())?;
        let actual = digest::of_file(&archive)?;
        if actual != self.sha256 {
            bail!("{} {} has SHA-256 {actual}, but the index says {}", self.name, self.version, self.sha256);
        }
        let tree = work.path().join("tree");
        process::output(process::command("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
        fs::rename(&tree, &root).with_context(|| format!("cannot move a package to {}", root.display()))?;
        Ok(Unpacked { package: self, root })
    }

    fn download(&self, into: &Path) -> anyhow::Result<()> {
        let mut apt = self.apt.command("apt-get");
        apt.current_dir(into).arg("-q");
        apt.arg("download").arg(format!("{}:{}={}", self.name, self.architecture, self.version));
        process::output(&mut apt).with_context(|| format!("cannot fetch {}", self.name)).map(drop)
    }
}

fn show(apt: &Apt, name: &str) -> anyhow::Result<Package> {
    let text = process::output(apt.command("apt-cache").args(["show", "--no-all-versions", name]))?;
    let package = parse(&text).with_context(|| format!("apt's index has no usable entry for {name}"))?;
    Ok(Package { apt: apt.clone(), ..package })
}

/// Reads the first stanza of `apt-cache show`.
fn parse(text: &str) -> Option<Package> {
    let stanza = text.split("\n\n").next()?;
    let field = |name: &str| {
        stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
    };
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
        sha256: field("SHA256").filter(|digest| digest.len() == 64)?,
        description: field("Description").or_else(|| field("Description-en")).unwrap_or_default(),
        depends: field("Depends").map(|list| names(&list)).unwrap_or_default(),
        apt: Apt::Host,
    })
}

/// The package names of a dependency field, first alternatives only.
fn names(depends: &str) -> Vec<String> {
    let first = |clause: &str| clause.split(['|', '(', ':']).next().unwrap_or_default().trim().to_owned();
    depends.split(',').map(first).collect()
}

fn single_file(dir: &Path) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    match <[PathBuf; 1]>::try_from(paths) {
        Ok([path]) => Ok(path),
        Err(paths) => bail!("expected one downloaded package, found {}", paths.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee";

    #[test]
    fn reads_the_first_stanza() {
        let text = format!(
            "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nArchitecture: amd64\n\
             Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), a | b, c:any\n\
             Description: Linux for x86-64 cloud (meta-package)\n more: text\n\
             Description-md5: 11b0\nSHA256: {DIGEST}\n\nPackage: other\nVersion: 1\n"
        );
        let package = parse(&text).unwrap();
        assert_eq!(package.name, "linux-image-cloud-amd64");
        assert_eq!(package.version, "6.1.192-2");
        assert_eq!(package.architecture, "amd64");
        assert_eq!(package.sha256, DIGEST);
        assert_eq!(package.description, "Linux for x86-64 cloud (meta-package)");
        assert_eq!(package.depends, ["linux-image-6.1.0-56-cloud-amd64", "a", "c"]);
        assert_eq!(package.dependency("linux-image-6").unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert!(package.dependency("linux-image-7").is_err());
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

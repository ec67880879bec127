//! What minimal guests are made of: a distribution's kernel with its modules, and its static busybox.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ami_core::{Architecture, OperatingSystem};

use crate::apt::{Apt, Package, Unpacked, debian_name};
use crate::build::absolute;
use crate::error::Context as _;
use crate::host::{APT_GET, DPKG_DEB, KEYRING, Prerequisite, SETPRIV};
use crate::lock::Locked;
use crate::modules::Modules;
use crate::progress::{Progress, Reporter};
use crate::{Error, ErrorKind, Result, distribution, process};

const OF_HOST: &[Prerequisite] = &[APT_GET, DPKG_DEB, SETPRIV];
const OF_DEBIAN: &[Prerequisite] = &[APT_GET, DPKG_DEB, KEYRING, SETPRIV];

/// Whose packages a guest is made of, and which kernel it gets.
///
/// ```
/// use ami_core::Architecture;
/// use quick_start::PackageSource;
///
/// let own = PackageSource::of_host();
/// let foreign = PackageSource::of_debian("13", "trixie", Architecture::X86_64, "linux-image-amd64");
/// assert_ne!(own, foreign);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackageSource {
    /// The release of Debian's; the host's own distribution if there is none.
    release: Option<Release>,
    architecture: Architecture,
    /// The packages that depend on the current kernel; the first that is there is taken.
    kernels: [&'static str; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Release {
    version: &'static str,
    suite: &'static str,
}

impl PackageSource {
    /// The host's own distribution, for 64-bit x86, with its kernel for virtual machines.
    pub const fn of_host() -> Self {
        // Debian's and Ubuntu's.
        let kernels = ["linux-image-cloud-amd64", "linux-image-virtual"];
        Self { release: None, architecture: Architecture::X86_64, kernels }
    }

    /// A release of Debian's, such as `12` and `bookworm`, with the kernel that the package `kernel` depends on.
    pub const fn of_debian(
        version: &'static str,
        suite: &'static str,
        architecture: Architecture,
        kernel: &'static str,
    ) -> Self {
        Self { release: Some(Release { version, suite }), architecture, kernels: [kernel; 2] }
    }

    /// The architecture.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// What has to be on the host to fetch them.
    pub fn prerequisites(&self) -> &'static [Prerequisite] {
        if self.is_of_host() { OF_HOST } else { OF_DEBIAN }
    }

    pub(crate) fn is_of_host(&self) -> bool {
        self.release.is_none()
    }

    pub(crate) fn operating_system(&self) -> Result<OperatingSystem> {
        match self.release {
            Some(release) => Ok(OperatingSystem::linux("debian", release.version)),
            None => distribution::of_host(),
        }
    }

    fn apt(&self, cache: &Path) -> Result<Apt> {
        match self.release {
            Some(release) => Apt::of_debian(cache, release.suite, self.architecture),
            None => Ok(Apt::of_host(cache)),
        }
    }
}

/// The unpacked packages of a minimal guest, and what is used of them.
///
/// ```no_run
/// use quick_start::{Initrd, PackageSource, Sources};
///
/// let sources = Sources::fetch(&PackageSource::of_host(), "packages".as_ref(), &mut |_| ())?;
/// let initrd = Initrd::new("#!/bin/sh\nexec reboot -f\n").applets(&["reboot", "sh"]).build(&sources)?;
/// println!("{} boots with {} bytes", sources.kernel_version(), initrd.len());
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug)]
pub struct Sources {
    operating_system: OperatingSystem,
    kernel_version: String,
    vmlinuz: Vec<u8>,
    pub(crate) modules: Modules,
    pub(crate) busybox: Vec<u8>,
    /// The commands that this busybox has.
    pub(crate) applets: BTreeSet<String>,
    packages: Vec<Package>,
}

impl Sources {
    /// Fetches the packages that are current, as far as the directory `cache` does not hold them yet, and tells how far
    /// it is.
    ///
    /// # Errors
    ///
    /// [`MissingPrerequisite`](ErrorKind::MissingPrerequisite),
    /// [`UnsupportedHost`](ErrorKind::UnsupportedHost), [`PackageNotFound`](ErrorKind::PackageNotFound),
    /// [`ProgramFailed`](ErrorKind::ProgramFailed), [`Corrupt`](ErrorKind::Corrupt),
    /// [`Cancelled`](ErrorKind::Cancelled), or what the host met.
    pub fn fetch(source: &PackageSource, cache: &Path, tell: &mut dyn FnMut(Progress)) -> Result<Self> {
        crate::require(source.prerequisites())?;
        let cache = &*absolute(cache)?;
        let mut reporter = Reporter::new(tell)?;
        let fetched = Self::fetch_with(source, cache, false, &mut reporter)?;
        reporter.finish();
        Ok(fetched)
    }

    /// The same. Where the package lists are our own, `update` fetches them anew.
    pub(crate) fn fetch_with(
        source: &PackageSource,
        cache: &Path,
        update: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self> {
        let operating_system = source.operating_system()?;
        reporter.step("fetching the kernel", 40)?;
        let _locked = Locked::new(cache, reporter)?;
        let mut apt = source.apt(cache)?;
        if update {
            apt.update_own(reporter)?;
        }
        let fetched = match Self::current(source, cache, &mut apt, reporter) {
            // The lists name a file that the archive has replaced since, and maybe a kernel.
            Err(e) if e.kind() == ErrorKind::ProgramFailed && !apt.updated => {
                apt.update(reporter).and_then(|()| Self::current(source, cache, &mut apt, reporter))
            }
            fetched => fetched,
        };
        fetched.map_err(|e| {
            e.about(format!(
                "cannot fetch the packages of {} {}",
                operating_system.name(),
                operating_system.version()
            ))
        })
    }

    /// What the package lists say is current.
    fn current(
        source: &PackageSource,
        cache: &Path,
        apt: &mut Apt,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self> {
        let kernel = kernel(apt, cache, &source.kernels, reporter)?;
        reporter.step("fetching busybox", 50)?;
        let busybox = apt.candidate(&["busybox-static"], reporter)?;
        let busybox = apt.unpack(busybox.package, cache, reporter)?;
        let program = find(std::slice::from_ref(&busybox), "bin/busybox")?;
        let sources = Self {
            vmlinuz: read(&find(&kernel.parts, &format!("boot/vmlinuz-{}", kernel.version))?)?,
            modules: Modules::index(&find(&kernel.parts, &format!("lib/modules/{}", kernel.version))?)?,
            busybox: read(&program)?,
            applets: applets(&program, reporter)?,
            kernel_version: kernel.version,
            packages: kernel.parts.into_iter().chain([busybox]).map(|part| part.package).collect(),
            operating_system: source.operating_system()?,
        };
        let wanted = debian_name(source.architecture);
        match sources.packages.iter().find(|package| package.architecture != wanted) {
            None => Ok(sources),
            Some(Package { name, architecture, .. }) => {
                let what = format!("apt offers {name} for {architecture} and not for {wanted}");
                Err(Error::new(ErrorKind::UnsupportedHost, what))
            }
        }
    }

    /// The distribution whose packages they are.
    pub fn operating_system(&self) -> &OperatingSystem {
        &self.operating_system
    }

    /// The kernel's version, such as `6.1.0-56-cloud-amd64`.
    pub fn kernel_version(&self) -> &str {
        &self.kernel_version
    }

    /// The kernel as its package ships it.
    pub fn vmlinuz(&self) -> &[u8] {
        &self.vmlinuz
    }

    /// The packages, for the record.
    pub fn packages(&self) -> &[Package] {
        &self.packages
    }
}

/// A kernel's packages: the image, and its modules where they are apart.
struct Kernel {
    version: String,
    parts: Vec<Unpacked>,
}

fn kernel(apt: &mut Apt, cache: &Path, kernels: &[&str], reporter: &mut Reporter<'_>) -> Result<Kernel> {
    let current = apt.candidate(kernels, reporter)?;
    let image = current.dependency("linux-image-").ok_or_else(|| {
        Error::new(ErrorKind::PackageNotFound, format!("{} depends on no kernel", current.package.name))
    })?;
    let image = apt.candidate(&[image], reporter)?;
    let version = image.package.name.trim_start_matches("linux-image-").to_owned();
    // Ubuntu's image depends on its modules, Debian's has them in it.
    let modules =
        image.dependency("linux-modules-").map(|name| apt.candidate(&[name], reporter)).transpose()?;
    let packages = std::iter::once(image).chain(modules);
    let parts =
        packages.map(|candidate| apt.unpack(candidate.package, cache, reporter)).collect::<Result<_>>()?;
    Ok(Kernel { version, parts })
}

/// The file or directory `path` in one of `packages`: in the root directory or, where the distribution
/// has moved all into it, in `/usr`.
fn find(packages: &[Unpacked], path: &str) -> Result<PathBuf> {
    let places =
        packages.iter().flat_map(|unpacked| ["", "usr"].map(|dir| unpacked.root.join(dir).join(path)));
    places.into_iter().find(|path| path.exists()).ok_or_else(|| {
        let names: Vec<_> = packages.iter().map(|unpacked| &*unpacked.package.name).collect();
        Error::new(ErrorKind::PackageNotFound, format!("there is no {path} in {}", names.join(" and ")))
    })
}

fn applets(busybox: &Path, reporter: &mut Reporter<'_>) -> Result<BTreeSet<String>> {
    let list = process::output(process::command(text(busybox)?).arg("--list"), reporter)?;
    Ok(list.lines().map(str::to_owned).collect())
}

/// A path for a program's name.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::new(ErrorKind::InvalidParameter, format!("{} is not UTF-8", path.display())))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::*;

    /// An archive of shell scripts' making: lists of the first day are followed by those of the second, when the files of the
    /// first are gone.
    const APT: &str = r#"
case " $* " in
*" update "*) test -e "$HERE/online" && echo 2 > "$HERE/day" ;;
*" download "*) case "$*" in *="$(cat "$HERE/today")") cp "$HERE/deb" a.deb ;; *) exit 100 ;; esac ;;
*) for package; do :; done
   case $package in
   linux-image-cloud-amd64) echo "Depends: linux-image-$(cat "$HERE/day")" ;;
   esac
   echo "Package: $package"; echo "Version: $(cat "$HERE/day")"; echo "Architecture: amd64"
   echo "SHA256: $(sha256sum < "$HERE/deb" | cut -c1-64)" ;;
esac
"#;

    /// In a process of its own, whose search path begins with that archive.
    #[test]
    fn lists_that_are_stale_are_fetched_anew_once() {
        const STAGE: &str = "QUICK_START_TEST_APT";
        if let Some(home) = env::var_os(STAGE).map(PathBuf::from) {
            let fetch = || {
                let cache = tempfile::tempdir().unwrap();
                Sources::fetch(&PackageSource::of_host(), cache.path(), &mut |_| ())
            };
            // Offline.
            assert_eq!(fetch().unwrap_err().kind(), ErrorKind::ProgramFailed);
            fs::write(home.join("online"), "").unwrap();
            let sources = fetch().unwrap();
            assert_eq!(sources.kernel_version(), "2");
            assert!(sources.packages().iter().all(|package| package.version == "2"));
            // Nor is it fetched for ever.
            fs::write(home.join("today"), "3").unwrap();
            assert_eq!(fetch().unwrap_err().kind(), ErrorKind::ProgramFailed);
            return;
        }
        if crate::require(OF_HOST).is_err() {
            eprintln!("SKIPPED: there is no apt");
            return;
        }
        let home = tempfile::tempdir().unwrap();
        let here = home.path();
        for (name, text) in [
            (
                "tree/DEBIAN/control",
                "Package: a\nVersion: 1\nArchitecture: amd64\nMaintainer: a\nDescription: a\n",
            ),
            ("tree/bin/busybox", "#!/bin/sh\necho sh\n"),
            ("tree/boot/vmlinuz-2", "kernel"),
            ("tree/lib/modules/2/modules.builtin", ""),
            ("tree/lib/modules/2/kernel/none", ""),
            ("day", "1"),
            ("today", "2"),
        ] {
            fs::create_dir_all(here.join(name).parent().unwrap()).unwrap();
            fs::write(here.join(name), text).unwrap();
        }
        let script = format!("#!/bin/sh\nHERE='{0}'\n{APT}", here.display());
        for program in ["apt-get", "apt-cache", "tree/bin/busybox"] {
            if program.starts_with("apt") {
                fs::write(here.join(program), &script).unwrap();
            }
            fs::set_permissions(here.join(program), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let built = Command::new("dpkg-deb").arg("-b").arg(here.join("tree")).arg(here.join("deb")).output();
        assert!(built.unwrap().status.success());
        let path = format!("{}:{}", here.display(), env::var("PATH").unwrap_or_default());
        let mut again = Command::new(env::current_exe().unwrap());
        again.args(["--exact", "sources::tests::lists_that_are_stale_are_fetched_anew_once"]);
        let output = again.env(STAGE, here).env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

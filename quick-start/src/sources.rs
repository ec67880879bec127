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
        let of_what = |e: Error| {
            let os = &operating_system;
            e.about(format!("cannot fetch the packages of {} {}", os.name(), os.version()))
        };
        let kernel = kernel(&mut apt, cache, &source.kernels, reporter).map_err(of_what)?;
        reporter.step("fetching busybox", 50)?;
        let busybox = apt.candidate(&["busybox-static"], reporter).map_err(of_what)?;
        let busybox = apt.unpack(busybox.package, cache, reporter).map_err(of_what)?;
        let program = find(std::slice::from_ref(&busybox), "bin/busybox")?;
        let sources = Self {
            vmlinuz: read(&find(&kernel.parts, &format!("boot/vmlinuz-{}", kernel.version))?)?,
            modules: Modules::index(&find(&kernel.parts, &format!("lib/modules/{}", kernel.version))?)?,
            busybox: read(&program)?,
            applets: applets(&program, reporter)?,
            kernel_version: kernel.version,
            packages: kernel.parts.into_iter().chain([busybox]).map(|part| part.package).collect(),
            operating_system,
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

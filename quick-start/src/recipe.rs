//! The catalogue: what can be built, and what that takes.

use ami_core::{Architecture, OperatingSystem};

use crate::cloud::{self, Release};
use crate::disk;
use crate::host::{
    self, APT_GET, DPKG_DEB, FAKEROOT, KEYRING, MKE2FS, MMDEBSTRAP, NEWUIDMAP, Prerequisite, SETPRIV,
};
use crate::sources::PackageSource;
use crate::{Error, ErrorKind, Result};

const MINIMAL: &[Prerequisite] = &[APT_GET, DPKG_DEB, FAKEROOT, MKE2FS, SETPRIV];
const MINIMAL_OF_DEBIAN: &[Prerequisite] = &[APT_GET, DPKG_DEB, FAKEROOT, KEYRING, MKE2FS, SETPRIV];
const CLOUD: &[Prerequisite] = &[APT_GET, DPKG_DEB, FAKEROOT, KEYRING, MKE2FS, MMDEBSTRAP, SETPRIV];
/// Of who is not root.
const CLOUD_IN_NAMESPACE: &[Prerequisite] =
    &[APT_GET, DPKG_DEB, FAKEROOT, KEYRING, MKE2FS, MMDEBSTRAP, NEWUIDMAP, SETPRIV];

/// All recipes, in the order of their names.
static RECIPES: &[Recipe] = &[
    Recipe {
        name: "debian-12-cloud",
        description: "Debian 12 as clouds have it: cloud-init, an SSH server, the kernel for virtual machines",
        usual: Method::Cloud(Release { version: "12", suite: "bookworm" }),
        others: &[],
        login_user: "debian",
    },
    Recipe {
        name: "debian-12-minimal",
        description: "BusyBox on a kernel of Debian 12, up in a second, with a shell on its console",
        usual: bookworm(Architecture::X86_64, "linux-image-cloud-amd64"),
        others: &[bookworm(Architecture::X86, "linux-image-686")],
        login_user: "root",
    },
    Recipe {
        name: "debian-13-minimal",
        description: "BusyBox on a kernel of Debian 13, up in a second, with a shell on its console",
        usual: Method::Minimal(PackageSource::of_debian(
            "13",
            "trixie",
            Architecture::X86_64,
            "linux-image-cloud-amd64",
        )),
        others: &[],
        login_user: "root",
    },
    Recipe {
        name: "minimal",
        description: "BusyBox on the kernel of this host's own distribution, up in a second, with a shell on its console",
        usual: Method::Minimal(PackageSource::of_host()),
        others: &[],
        login_user: "root",
    },
];

const fn bookworm(architecture: Architecture, kernel: &'static str) -> Method {
    Method::Minimal(PackageSource::of_debian("12", "bookworm", architecture, kernel))
}

/// The catalogue of all recipes, in the order of their names. [`DescribeRecipes`](crate::DescribeRecipes) searches it.
///
/// ```
/// for recipe in quick_start::recipes() {
///     let can = recipe.check_host().map_or_else(|why| why.to_string(), |()| "can be built here".to_owned());
///     println!("{}: {} ({can})", recipe.name(), recipe.description());
/// }
/// # assert!(quick_start::recipes().iter().map(|r| r.name()).is_sorted());
/// ```
pub fn recipes() -> &'static [Recipe] {
    RECIPES
}

/// The recipe of this name.
///
/// ```
/// assert_eq!(quick_start::recipe("debian-12-cloud")?.login_user(), "debian");
/// # Ok::<(), quick_start::Error>(())
/// ```
///
/// # Errors
///
/// [`RecipeNotFound`](ErrorKind::RecipeNotFound).
pub fn recipe(name: &str) -> Result<&'static Recipe> {
    RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| {
        let names: Vec<_> = RECIPES.iter().map(Recipe::name).collect();
        let what = format!("the catalogue has no recipe {name:?}, but {}", names.join(", "));
        Error::new(ErrorKind::RecipeNotFound, what)
    })
}

/// How an image is built, and what that takes. [`recipes`] gives those that there are, [`Build`](crate::Build) follows
/// one.
#[derive(Debug, PartialEq, Eq)]
pub struct Recipe {
    name: &'static str,
    description: &'static str,
    usual: Method,
    /// For other architectures.
    others: &'static [Method],
    login_user: &'static str,
}

/// How it is built for an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Minimal(PackageSource),
    Cloud(Release),
}

impl Method {
    fn architecture(&self) -> Architecture {
        match self {
            Self::Minimal(source) => source.architecture(),
            // What it installs is named for this one.
            Self::Cloud(_) => Architecture::X86_64,
        }
    }
}

/// What building an image asks of a host. [`Recipe::requirements`] gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Requirements {
    /// What has to be installed.
    pub prerequisites: &'static [Prerequisite],
    /// What the user has to be allowed.
    pub privilege: Privilege,
    /// How many bytes it takes on disk while it is being built, roughly.
    pub space: u64,
}

/// What a user has to be allowed on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Privilege {
    /// Nothing.
    None,
    /// To be root, or to make user namespaces.
    RootOrUserNamespaces,
}

impl Recipe {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it makes, in a line.
    pub fn description(&self) -> &'static str {
        self.description
    }

    /// The platform: the operating system of what it makes.
    ///
    /// ```
    /// let system = quick_start::recipe("debian-13-minimal")?.operating_system()?;
    /// assert_eq!((system.name(), system.version()), ("debian", "13"));
    /// # Ok::<(), quick_start::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`UnsupportedHost`](ErrorKind::UnsupportedHost) if it is the host's and the host does not say which that is.
    pub fn operating_system(&self) -> Result<OperatingSystem> {
        match self.usual {
            Method::Minimal(source) => source.operating_system(),
            Method::Cloud(release) => Ok(OperatingSystem::linux("debian", release.version)),
        }
    }

    /// The architectures that it makes images for, the usual one first.
    ///
    /// ```
    /// use ami_core::Architecture::{X86, X86_64};
    ///
    /// assert!(quick_start::recipe("debian-12-minimal")?.architectures().eq([X86_64, X86]));
    /// # Ok::<(), quick_start::Error>(())
    /// ```
    pub fn architectures(&self) -> impl Iterator<Item = Architecture> {
        self.methods().map(Method::architecture)
    }

    /// Whom one is on what it makes: `root` has a shell on the console, others log in by SSH.
    pub fn login_user(&self) -> &'static str {
        self.login_user
    }

    /// The size of the root disk in bytes, most of which is a hole.
    pub fn disk_size(&self) -> u64 {
        match self.usual {
            Method::Minimal(_) => disk::MINIMAL.size,
            Method::Cloud(_) => disk::CLOUD.size,
        }
    }

    /// What building it asks of a host, which also has to reach a mirror of the distribution's; of a user who is
    /// not root it may ask for more.
    ///
    /// ```
    /// use quick_start::Privilege;
    ///
    /// let wanted = quick_start::recipe("minimal")?.requirements();
    /// assert_eq!(wanted.privilege, Privilege::None);
    /// assert!(wanted.prerequisites.iter().any(|p| p.name() == "mke2fs" && p.package() == "e2fsprogs"));
    /// # Ok::<(), quick_start::Error>(())
    /// ```
    pub fn requirements(&self) -> Requirements {
        let (prerequisites, privilege, mib) = match self.usual {
            Method::Minimal(source) if source.is_of_host() => (MINIMAL, Privilege::None, 512),
            Method::Minimal(_) => (MINIMAL_OF_DEBIAN, Privilege::None, 512),
            Method::Cloud(_) if host::is_root() => (CLOUD, Privilege::RootOrUserNamespaces, 4096),
            Method::Cloud(_) => (CLOUD_IN_NAMESPACE, Privilege::RootOrUserNamespaces, 4096),
        };
        Requirements { prerequisites, privilege, space: mib * disk::MIB }
    }

    /// Whether this machine can build it now, and if not, what is missing. Whether a mirror is reached is seen when it
    /// is built.
    ///
    /// # Errors
    ///
    /// [`MissingPrerequisite`](ErrorKind::MissingPrerequisite), [`NotPermitted`](ErrorKind::NotPermitted),
    /// [`UnsupportedHost`](ErrorKind::UnsupportedHost).
    pub fn check_host(&self) -> Result<()> {
        // The guest's own busybox is asked which commands it has, and the packages' scripts run.
        if !cfg!(target_arch = "x86_64") {
            let what = format!("{} is built on 64-bit x86 alone", self.name);
            return Err(Error::new(ErrorKind::UnsupportedHost, what));
        }
        crate::require(self.requirements().prerequisites)?;
        self.operating_system()?;
        match self.usual {
            Method::Minimal(_) => Ok(()),
            Method::Cloud(_) => cloud::check_user(),
        }
    }

    fn methods(&self) -> impl Iterator<Item = &Method> {
        std::iter::once(&self.usual).chain(self.others)
    }

    /// How it is built for this architecture, or for the usual one.
    pub(crate) fn method(&self, architecture: Option<Architecture>) -> Result<(Architecture, Method)> {
        let wanted = architecture.unwrap_or(self.usual.architecture());
        match self.methods().find(|method| method.architecture() == wanted) {
            Some(method) => Ok((wanted, *method)),
            None => {
                let what = format!("the recipe {} is not for {wanted}", self.name);
                Err(Error::new(ErrorKind::UnsupportedArchitecture, what))
            }
        }
    }
}

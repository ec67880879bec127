//! Building an image into a directory, and finding it there again.

use std::fs;
use std::path::{Path, PathBuf};

use ami_core::{Architecture, Digest, DigestWriter, OperatingSystem};
use serde::{Deserialize, Serialize};

use crate::apt::Package;
use crate::disk;
use crate::error::Context as _;
use crate::lock::Locked;
use crate::progress::{Progress, Reporter};
use crate::recipe::{Method, Recipe};
use crate::sources::Sources;
use crate::work::Work;
use crate::{Error, ErrorKind, Result, cloud, minimal};

/// The file that says what the others were built from. It is written last.
const MANIFEST: &str = "build.json";

/// A build of an image: what a recipe makes, in a directory.
///
/// What is there already is found, and building it again is instant: it is kept by the recipe, all of its texts, and the
/// packages that it was built from. Several builds in one directory wait for one another, also those of other processes.
///
/// ```no_run
/// use quick_start::Build;
///
/// let recipe = quick_start::recipe("minimal")?;
/// let image = Build::new(recipe, "images/minimal").run_with(&mut |p| println!("{}", p.what))?;
/// println!("{} of {:?}", image.disk().display(), image.operating_system());
/// assert_eq!(Build::new(recipe, "images/minimal").run()?.digest(), image.digest()); // at once
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "nothing is built before it is run"]
pub struct Build {
    recipe: &'static Recipe,
    dir: PathBuf,
    packages: Option<PathBuf>,
    architecture: Option<Architecture>,
    update: bool,
}

impl Build {
    /// A build of what `recipe` makes into the directory `dir`, which is made if it is not there. It is for one recipe
    /// and one architecture, and what it has of another goes.
    pub fn new(recipe: &'static Recipe, dir: impl Into<PathBuf>) -> Self {
        Self { recipe, dir: dir.into(), packages: None, architecture: None, update: false }
    }

    /// For this architecture, and not for the recipe's usual one.
    pub fn architecture(mut self, architecture: Architecture) -> Self {
        self.architecture = Some(architecture);
        self
    }

    /// Where packages are kept that are unpacked, so that several builds share them; `packages` in the directory of the
    /// build if this is not called. It cannot be that directory itself.
    pub fn packages(mut self, dir: impl Into<PathBuf>) -> Self {
        self.packages = Some(dir.into());
        self
    }

    /// Whether the packages that are current are asked for, and not what is there contented with: those of the host's own
    /// distribution as its package lists say, which are for its administrator to update. If these are the same, what is
    /// there stays.
    pub fn update(mut self, update: bool) -> Self {
        self.update = update;
        self
    }

    /// What an earlier build has left, if that was by this recipe as it is now. Needs nothing of the host.
    pub fn find(&self) -> Option<BuiltImage> {
        self.absolute().ok()?.found()
    }

    /// The same build, wherever the process goes: programs that it calls work in other directories.
    fn absolute(&self) -> Result<Self> {
        let packages = self.packages.as_deref().map(absolute).transpose()?;
        Ok(Self { dir: absolute(&self.dir)?, packages, ..self.clone() })
    }

    fn found(&self) -> Option<BuiltImage> {
        let (architecture, method) = self.recipe.method(self.architecture).ok()?;
        let manifest = Manifest::read(&self.dir)?;
        let is_whole = |meta: fs::Metadata| meta.is_file() && meta.len() > 0;
        let is_there = |name: &&str| self.dir.join(name).metadata().is_ok_and(is_whole);
        let current = manifest.recipe == self.recipe.name()
            && manifest.architecture == architecture
            && manifest.made_by == made_by(&method)
            && files(&method).iter().all(is_there);
        current.then(|| BuiltImage { recipe: self.recipe, dir: self.dir.clone(), manifest })
    }

    /// Builds it, unless it is there. Nothing is left of a build that fails or is cancelled but packages that were fetched
    /// whole, and package lists; an earlier build stays as it was.
    ///
    /// # Errors
    ///
    /// Those of [`Recipe::check_host`], [`UnsupportedArchitecture`](ErrorKind::UnsupportedArchitecture),
    /// [`PackageNotFound`](ErrorKind::PackageNotFound), [`InvalidParameter`](ErrorKind::InvalidParameter) for packages
    /// in the build's own directory, [`ProgramFailed`](ErrorKind::ProgramFailed), as without a network, [`Corrupt`](ErrorKind::Corrupt), [`Cancelled`](ErrorKind::Cancelled), [`NoSpace`](ErrorKind::NoSpace),
    /// or what else the host met.
    pub fn run(&self) -> Result<BuiltImage> {
        self.run_with(&mut |_| ())
    }

    /// The same, with somebody who is told how far it is and may [cancel](Progress::cancel) it.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_with(&self, tell: &mut dyn FnMut(Progress)) -> Result<BuiltImage> {
        let (architecture, method) = self.recipe.method(self.architecture)?;
        let build = self.absolute()?;
        if let Some(found) = build.found().filter(|_| !self.update) {
            return Ok(found);
        }
        self.recipe.check_host()?;
        let mut reporter = Reporter::new(tell)?;
        let built = build.build(architecture, &method, &mut reporter)?;
        reporter.finish();
        Ok(built)
    }

    fn build(
        &self,
        architecture: Architecture,
        method: &Method,
        reporter: &mut Reporter<'_>,
    ) -> Result<BuiltImage> {
        let _locked = Locked::new(&self.dir, reporter)?;
        let found = self.found();
        // Another process may have built it meanwhile.
        if let Some(found) = found.as_ref().filter(|_| !self.update) {
            return Ok(found.clone());
        }
        let sources = match method {
            Method::Minimal(source) => {
                let packages = self.packages.clone().unwrap_or_else(|| self.dir.join("packages"));
                self.check_apart(&packages)?;
                let sources = Sources::fetch_with(source, &packages, self.update, reporter)?;
                if let Some(found) = found.filter(|found| found.packages() == sources.packages()) {
                    return Ok(found);
                }
                Some(sources)
            }
            Method::Cloud(_) => None,
        };
        let work = Work::new(&self.dir)?;
        let made = match (method, &sources) {
            (Method::Cloud(release), _) => cloud::make(work.path(), release, reporter)?,
            (_, Some(sources)) => minimal::make(work.path(), sources, architecture, reporter)?,
            (Method::Minimal(_), None) => return Err(Error::new(ErrorKind::Io, "there are no sources")),
        };
        reporter.check()?;
        let manifest = Manifest {
            recipe: self.recipe.name().to_owned(),
            architecture,
            made_by: made_by(method),
            operating_system: made.operating_system,
            packages: made.packages,
        };
        manifest.install(files(method), &work, &self.dir)?;
        Ok(BuiltImage { recipe: self.recipe, dir: self.dir.clone(), manifest })
    }

    /// Each is locked: a build with one directory for both would wait for itself.
    fn check_apart(&self, packages: &Path) -> Result<()> {
        match (self.dir.canonicalize(), packages.canonicalize()) {
            (Ok(dir), Ok(packages)) if dir == packages => {
                let what = format!("{} is built in, and cannot be where packages are kept", dir.display());
                Err(Error::new(ErrorKind::InvalidParameter, what))
            }
            _ => Ok(()),
        }
    }
}

/// What a method makes beside the files.
pub(crate) struct Made {
    pub(crate) operating_system: OperatingSystem,
    pub(crate) packages: Vec<Package>,
}

/// An image that was built, to be registered.
///
/// ```no_run
/// # fn register(region: &instance_core::Region) -> Result<(), Box<dyn std::error::Error>> {
/// use ami_core::{Category, DescribeImages};
/// use quick_start::Build;
///
/// let built = Build::new(quick_start::recipe("minimal")?, "images/minimal").run()?;
/// let image = built.register(region)?;
/// assert_eq!(image.category(region.account()), Some(Category::QuickStart));
/// let found = region.describe_images(&DescribeImages::new().owner("amazon".parse()?))?;
/// assert_eq!(found.items, [image]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    recipe: &'static Recipe,
    dir: PathBuf,
    manifest: Manifest,
}

/// What a directory's files were built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    recipe: String,
    architecture: Architecture,
    /// The digest of all texts that decide what is built from the packages.
    made_by: Digest,
    operating_system: OperatingSystem,
    packages: Vec<Package>,
}

impl BuiltImage {
    /// The recipe that it was built by.
    pub fn recipe(&self) -> &'static Recipe {
        self.recipe
    }

    /// The architecture.
    pub fn architecture(&self) -> Architecture {
        self.manifest.architecture
    }

    /// The operating system on it.
    pub fn operating_system(&self) -> &OperatingSystem {
        &self.manifest.operating_system
    }

    /// The packages that it was built from.
    pub fn packages(&self) -> &[Package] {
        &self.manifest.packages
    }

    /// The directory that it is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root disk, a raw image. It is read and not written: the build is found by its name.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(disk::NAME)
    }

    /// Whether the directory still has it. What was opened before is the very image then: a build takes the manifest away
    /// before it puts other files in place.
    pub(crate) fn is_there(&self) -> bool {
        Manifest::read(&self.dir).as_ref() == Some(&self.manifest)
    }

    /// The digest of what it was built from: the recipe with all of its texts, the architecture and the packages.
    pub fn digest(&self) -> Digest {
        let Manifest { recipe, architecture, made_by, packages, .. } = &self.manifest;
        let made_by = made_by.to_hex();
        let of_packages = packages.iter().flat_map(|p| [&*p.name, &*p.version, &*p.architecture, &*p.sha256]);
        digest_of_texts([recipe, architecture.as_str(), &made_by].into_iter().chain(of_packages))
    }
}

impl Manifest {
    fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(MANIFEST)).ok()?).ok()
    }

    /// Moves finished files to where they are looked for, and then says what they are.
    fn install(&self, files: &[&str], from: &Work, to: &Path) -> Result<()> {
        let manifest = from.path().join(MANIFEST);
        let text = serde_json::to_vec_pretty(self).context(|| format!("cannot write {MANIFEST}"))?;
        fs::write(&manifest, text).context(|| format!("cannot write {}", manifest.display()))?;
        from.sync()?;
        match fs::remove_file(to.join(MANIFEST)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(e, "cannot take back what an earlier build has left"));
            }
            _ => {}
        }
        for name in files.iter().copied().chain([MANIFEST]) {
            let moved = fs::rename(from.path().join(name), to.join(name));
            moved.context(|| format!("cannot put {name} into {}", to.display()))?;
        }
        Ok(())
    }
}

/// The path from the root directory: apt takes others for such as are below its own.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("there is no path {path:?}"))
}

fn files(method: &Method) -> &'static [&'static str] {
    match method {
        Method::Minimal(_) => minimal::FILES,
        Method::Cloud(_) => cloud::FILES,
    }
}

/// The digest of all that decides what a method makes of its packages, and which these are.
fn made_by(method: &Method) -> Digest {
    let texts = match method {
        Method::Minimal(_) => minimal::texts(),
        Method::Cloud(_) => cloud::texts(),
    };
    let parameters = format!("{method:?}");
    digest_of_texts(texts.into_iter().chain([&*parameters]))
}

/// The digest of several texts, each told apart from the next.
pub(crate) fn digest_of_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Digest {
    let mut digest = DigestWriter::new();
    for text in texts {
        digest.update(&(text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    }
    digest.finish()
}

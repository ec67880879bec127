//! `cargo xtask guest`: the Linux guests that examples, tests and benchmarks boot.
//!
//! ```text
//! amd64/vmlinuz              the distribution's kernel for virtual machines, as shipped
//! amd64/initrd.img           the quick-start guest's initrd
//! amd64/disk.raw             the quick-start guest's root disk: GPT, ext4, a shell on ttyS0
//! amd64/build.json           what these were built from
//! amd64/conformance.img      the conformance guest, an initrd that needs no disk
//! amd64/boot.img             an initrd that reboots as soon as it is up
//! amd64/lab.img              the initrd of `cargo xtask lab`
//! amd64/manifest.json        what all of these were made of
//! debian-12-cloud/disk.raw   with `--cloud`: Debian with cloud-init and an SSH server, as clouds have it
//! i386, debian-13            with `--others`: kernel and conformance guest of other releases of Debian, and a root disk
//! full, debian-13-full       and their kernels that are made for all hardware
//! ```
//!
//! They lie under `$AMI_GUEST_DIR`, or else `target/guest`. The disks are built by recipes of the crate `quick-start`,
//! the other initrds of the same packages: the binaries of the host's distribution, fetched through apt and unpacked
//! beside the artifacts; nothing is installed on the host but the
//! tools that build a file system. Artifacts are made anew when the recipes change or when
//! `--update` asks for the packages that are current; several calls at once wait for one another.

mod initrds;
pub(crate) mod others;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ami_core::Digest;
use anyhow::Context as _;
use quick_start::{Build, BuiltImage, PackageSource, Prerequisite, Recipe, Sources};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::progress::{step, told};
use crate::{prerequisites, workspace};

/// The recipe of the quick-start guest's disk.
const QUICK_START: &str = "minimal";
/// The recipe of the cloud guest's, and the directory that it is in.
pub(crate) const CLOUD: &str = "debian-12-cloud";

/// Make the Linux guests.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    /// Fetch the packages that are current, even if the artifacts are there
    #[arg(long)]
    update: bool,
    /// Make the cloud guest as well: Debian with cloud-init and an SSH server, a root disk of 2 GiB
    #[arg(long)]
    cloud: bool,
    /// Make the conformance guests of other kernels as well: Debian 12 for 32-bit x86, Debian 13, and the full ones of both
    #[arg(long)]
    others: bool,
}

/// The command.
pub(crate) fn run(args: &GuestArgs) -> anyhow::Result<ExitCode> {
    let artifacts = if args.update { build(&workspace::guest_dir()) } else { ensure() }?;
    println!("{}", artifacts.dir().display());
    if args.cloud {
        println!("{}", cloud(args.update)?.disk().display());
    }
    if args.others {
        for other in &others::ALL {
            println!("{}", other.ensure(args.update)?.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The finished artifacts.
pub(crate) struct Artifacts {
    quick_start: BuiltImage,
}

impl Artifacts {
    /// Beside the quick start's own.
    const NAMES: [&str; 3] = ["conformance.img", "boot.img", "lab.img"];

    /// The quick start's root disk.
    pub(crate) fn quick_start(&self) -> &BuiltImage {
        &self.quick_start
    }

    /// The directory they lie in.
    pub(crate) fn dir(&self) -> &Path {
        self.quick_start.dir()
    }

    /// The kernel of all guests, and of the lab.
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        self.dir().join("vmlinuz")
    }

    /// The lab's initrd.
    pub(crate) fn lab_initrd(&self) -> PathBuf {
        self.dir().join("lab.img")
    }

    /// The artifacts under `guest_dir`, if all are there and made by these recipes.
    fn find(guest_dir: &Path) -> Option<Self> {
        let quick_start = quick_start(guest_dir).ok()?.find()?;
        Self::complete(quick_start)
    }

    /// The same, of which the disk is there.
    fn complete(quick_start: BuiltImage) -> Option<Self> {
        let text = fs::read(quick_start.dir().join(MANIFEST)).ok()?;
        let manifest: Manifest = serde_json::from_slice(&text).ok()?;
        let is_there = |name: &&str| quick_start.dir().join(name).is_file();
        let complete = manifest == Manifest::of(&quick_start) && Self::NAMES.iter().all(is_there);
        complete.then_some(Self { quick_start })
    }
}

const MANIFEST: &str = "manifest.json";

/// What a set of artifacts was made of.
#[derive(PartialEq, Serialize, Deserialize)]
struct Manifest {
    recipes: Digest,
    quick_start: Digest,
}

impl Manifest {
    fn of(quick_start: &BuiltImage) -> Self {
        Self { recipes: initrds::recipes(), quick_start: quick_start.digest() }
    }
}

/// The artifacts, made if they aren't there.
pub(crate) fn ensure() -> anyhow::Result<Artifacts> {
    let dir = workspace::guest_dir();
    Artifacts::find(&dir).map_or_else(|| build(&dir), Ok)
}

/// What [`ensure`] needs on the host. A command that needs more asks for all at once.
pub(crate) fn tools() -> &'static [Prerequisite] {
    match Artifacts::find(&workspace::guest_dir()) {
        Some(_) => &[],
        None => prerequisites_of(QUICK_START),
    }
}

/// The cloud guest, built if it isn't there, or if `update` asks for the packages that are current.
pub(crate) fn cloud(update: bool) -> anyhow::Result<BuiltImage> {
    let build = cloud_build()?.update(update);
    if build.find().is_none() || update {
        prerequisites::require(prerequisites_of(CLOUD))?;
    }
    told(|progress| build.run_with(progress))
}

/// The cloud guest, if it is there.
pub(crate) fn find_cloud() -> Option<BuiltImage> {
    cloud_build().ok()?.find()
}

/// What [`cloud`] needs on the host.
pub(crate) fn tools_of_cloud() -> &'static [Prerequisite] {
    if find_cloud().is_some() { &[] } else { prerequisites_of(CLOUD) }
}

fn cloud_build() -> anyhow::Result<Build> {
    Ok(Build::new(quick_start::recipe(CLOUD)?, workspace::guest_dir().join(CLOUD)))
}

fn prerequisites_of(recipe: &str) -> &'static [Prerequisite] {
    quick_start::recipe(recipe).map_or(&[], |recipe: &Recipe| recipe.requirements().prerequisites)
}

fn quick_start(guest_dir: &Path) -> anyhow::Result<Build> {
    let recipe = quick_start::recipe(QUICK_START)?;
    Ok(Build::new(recipe, guest_dir.join("amd64")).packages(packages(guest_dir)))
}

/// Where the packages are unpacked.
fn packages(guest_dir: &Path) -> PathBuf {
    guest_dir.join("packages")
}

/// Makes them of the packages that are current.
fn build(guest_dir: &Path) -> anyhow::Result<Artifacts> {
    prerequisites::require(prerequisites_of(QUICK_START))?;
    fs::create_dir_all(guest_dir).with_context(|| format!("cannot make {}", guest_dir.display()))?;
    let lock = File::create(guest_dir.join(".lock")).context("cannot make the lock file")?;
    flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guest directory")?;
    let disk = quick_start(guest_dir)?.update(true);
    let quick_start = told(|progress| disk.run_with(progress))?;
    if let Some(artifacts) = Artifacts::complete(quick_start.clone()) {
        return Ok(artifacts); // Another process made them meanwhile.
    }
    let sources = Sources::fetch(&PackageSource::of_host(), &packages(guest_dir), &mut |_| ())?;
    let work = tempfile::tempdir_in(guest_dir).context("cannot make a working directory")?;
    step("building the other guests", || make(work.path(), &sources, &quick_start))?;
    install(Artifacts::NAMES.into_iter().chain([MANIFEST]), work.path(), quick_start.dir())?;
    Ok(Artifacts { quick_start })
}

/// Makes what the quick start does not, in `dir`.
fn make(dir: &Path, sources: &Sources, quick_start: &BuiltImage) -> anyhow::Result<()> {
    let manifest = serde_json::to_vec_pretty(&Manifest::of(quick_start))?;
    for (name, content) in [
        ("conformance.img", initrds::conformance(sources)?),
        ("boot.img", initrds::boot(sources)?),
        ("lab.img", initrds::lab(sources)?),
        (MANIFEST, manifest),
    ] {
        fs::write(dir.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

/// Moves finished artifacts to where they are looked for, the manifest last. An older one goes before, so that none says of
/// new artifacts what is true of old ones.
fn install(names: impl IntoIterator<Item = &'static str>, from: &Path, to: &Path) -> anyhow::Result<()> {
    match fs::remove_file(to.join(MANIFEST)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot remove the old {MANIFEST}"));
        }
        _ => {}
    }
    for name in names {
        fs::rename(from.join(name), to.join(name)).with_context(|| format!("cannot put {name} in place"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_never_describes_other_artifacts() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(to.path().join(MANIFEST), "old").unwrap();
        fs::write(from.path().join("disk.raw"), "new").unwrap();
        // As if it were cut off: there is no new manifest.
        assert!(install(["disk.raw", MANIFEST], from.path(), to.path()).is_err());
        assert!(to.path().join("disk.raw").exists() && !to.path().join(MANIFEST).exists());
        fs::write(from.path().join("disk.raw"), "newer").unwrap();
        fs::write(from.path().join(MANIFEST), "new").unwrap();
        install(["disk.raw", MANIFEST], from.path(), to.path()).unwrap();
        assert_eq!(fs::read(to.path().join(MANIFEST)).unwrap(), b"new");
    }
}

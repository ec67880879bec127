//! `cargo xtask guest`: the Linux guests that examples, tests and benchmarks boot.
//!
//! ```text
//! amd64/vmlinuz              the distribution's kernel for virtual machines, as shipped
//! amd64/initrd.img           the quick-start guest's initrd
//! amd64/disk.raw             the quick-start guest's root disk: GPT, ext4, a shell on ttyS0
//! amd64/conformance.img      the conformance guest, an initrd that needs no disk
//! amd64/boot.img             an initrd that reboots as soon as it is up
//! amd64/lab.img              the initrd of `cargo xtask lab`
//! amd64/manifest.json        what they were made of
//! amd64/cloud.raw            with `--cloud`: Debian with cloud-init and an SSH server, as clouds have it
//! i386, debian-13            with `--others`: kernel and conformance guest of other releases of Debian, and a root disk
//! full, debian-13-full       and their kernels that are made for all hardware
//! ```
//!
//! They lie under `$AMI_GUEST_DIR`, or else `target/guest`. Kernel and busybox are the binaries of
//! the host's distribution, fetched through apt and unpacked beside the artifacts; nothing is installed on the host but the
//! tools that build a file system. Artifacts are made anew when this program's recipes change or when
//! `--update` asks for the packages that are current; several calls at once wait for one another.

mod archive;
pub(crate) mod cloud;
mod disk;
mod distribution;
mod initrd;
mod modules;
pub(crate) mod others;
mod rootfs;
mod sources;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::deb::Package;
use crate::prerequisites::{self, APT_GET, DPKG_DEB, FAKEROOT, MKE2FS, Tool};
use crate::progress::step;
use crate::{digest, workspace};
use distribution::Distribution;
use sources::Sources;

/// What building them calls.
const TOOLS: [Tool; 4] = [APT_GET, DPKG_DEB, FAKEROOT, MKE2FS];

/// All that decides what the artifacts hold, apart from the packages and the C compiler.
const RECIPES: [&str; 12] = [
    include_str!("archive.rs"),
    include_str!("disk.rs"),
    include_str!("distribution.rs"),
    include_str!("initrd.rs"),
    include_str!("modules.rs"),
    include_str!("rootfs.rs"),
    include_str!("../../guest/conformance-init.sh"),
    include_str!("../../guest/initrd-init.sh"),
    include_str!("../../guest/lab-init.sh"),
    include_str!("../../guest/conformance-button.sh"),
    include_str!("../../guest/vsock.c"),
    include_str!("../../../hypervisor-kvm/tests/common/guest.rs"),
];

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
    println!("{}", artifacts.dir.display());
    if args.cloud {
        println!("{}", cloud::ensure(args.update)?.display());
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
    dir: PathBuf,
    distribution: Distribution,
}

impl Artifacts {
    const NAMES: [&str; 6] = ["vmlinuz", "initrd.img", "disk.raw", "conformance.img", "boot.img", "lab.img"];

    /// The quick start's root disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// The distribution whose packages they are made of.
    pub(crate) fn distribution(&self) -> &Distribution {
        &self.distribution
    }

    /// The directory they lie in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernel of all guests, and of the lab.
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The lab's initrd.
    pub(crate) fn lab_initrd(&self) -> PathBuf {
        self.dir.join("lab.img")
    }

    /// The artifacts under `guest_dir`, if all are there and made by these recipes.
    fn find(guest_dir: &Path) -> Option<Self> {
        let dir = guest_dir.join("amd64");
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join("manifest.json")).ok()?).ok()?;
        let complete = Self::NAMES.iter().all(|name| dir.join(name).is_file());
        let Manifest { recipes: made_by, distribution, .. } = manifest;
        (complete && made_by == recipes()).then_some(Self { dir, distribution })
    }
}

/// What a set of artifacts was made of.
#[derive(Serialize, Deserialize)]
struct Manifest {
    recipes: String,
    distribution: Distribution,
    packages: Vec<Package>,
}

/// The artifacts, made if they aren't there.
pub(crate) fn ensure() -> anyhow::Result<Artifacts> {
    let dir = workspace::guest_dir();
    Artifacts::find(&dir).map_or_else(|| build(&dir), Ok)
}

/// What [`ensure`] needs on the host. A command that needs more asks for all at once.
pub(crate) fn tools() -> &'static [Tool] {
    if Artifacts::find(&workspace::guest_dir()).is_some() { &[] } else { &TOOLS }
}

fn build(guest_dir: &Path) -> anyhow::Result<Artifacts> {
    prerequisites::require(&TOOLS)?;
    fs::create_dir_all(guest_dir).with_context(|| format!("cannot make {}", guest_dir.display()))?;
    let lock = File::create(guest_dir.join(".lock")).context("cannot make the lock file")?;
    flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guest directory")?;
    let sources = Sources::fetch(&guest_dir.join("packages"))?;
    if let Some(artifacts) = Artifacts::find(guest_dir).filter(|a| a.is_made_of(&sources.packages)) {
        return Ok(artifacts); // Another process made them meanwhile.
    }
    let work = tempfile::tempdir_in(guest_dir).context("cannot make a working directory")?;
    step("building the guests", || make(work.path(), &sources))?;
    install(work.path(), &guest_dir.join("amd64"), sources.distribution)
}

impl Artifacts {
    fn is_made_of(&self, packages: &[Package]) -> bool {
        let text = fs::read(self.dir.join("manifest.json")).unwrap_or_default();
        let same = |manifest: Manifest| {
            let digests = |list: &[Package]| list.iter().map(|p| p.sha256.clone()).collect::<Vec<_>>();
            digests(&manifest.packages) == digests(packages)
        };
        serde_json::from_slice(&text).is_ok_and(same)
    }
}

/// Makes all artifacts in `dir`.
fn make(dir: &Path, sources: &Sources) -> anyhow::Result<()> {
    let write = |name: &str, content: &[u8]| {
        fs::write(dir.join(name), content).with_context(|| format!("cannot write {name}"))
    };
    write("vmlinuz", &sources.vmlinuz)?;
    write("conformance.img", &initrd::build(&initrd::CONFORMANCE, sources)?)?;
    write("boot.img", &initrd::build(&initrd::BOOT, sources)?)?;
    write("lab.img", &initrd::build(&initrd::LAB, sources)?)?;
    let quick_start = initrd::build(&initrd::QUICK_START, sources)?;
    write("initrd.img", &quick_start)?;
    let tree = dir.join("tree");
    rootfs::build(&tree, sources, &quick_start)?;
    disk::build(&dir.join("disk.raw"), &disk::QUICK_START, disk::Content::Tree(&tree))?;
    let (distribution, packages) = (sources.distribution.clone(), sources.packages.clone());
    let manifest = Manifest { recipes: recipes(), distribution, packages };
    write("manifest.json", &serde_json::to_vec_pretty(&manifest)?)
}

/// Moves finished artifacts to where they are looked for, the manifest last.
fn install(from: &Path, to: &Path, distribution: Distribution) -> anyhow::Result<Artifacts> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for name in Artifacts::NAMES.into_iter().chain(["manifest.json"]) {
        fs::rename(from.join(name), to.join(name)).with_context(|| format!("cannot put {name} in place"))?;
    }
    Ok(Artifacts { dir: to.to_owned(), distribution })
}

fn recipes() -> String {
    digest::of_texts(&RECIPES) + &digest::of_texts(&rootfs::texts())
}

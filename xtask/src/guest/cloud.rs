//! The cloud guest's root disk: Debian as its own packages make it, with cloud-init, an SSH server and the
//! kernel for virtual machines.
//!
//! Nothing in it knows of this project. cloud-init finds by the machine's identity that it runs in EC2.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};

use super::disk::{self, Content};
use crate::prerequisites::{self, FAKEROOT, MKE2FS, MMDEBSTRAP, Tool};
use crate::progress::step;
use crate::{digest, process, workspace};

const NAME: &str = "cloud.raw";
/// The file that says by which recipes it was made.
const MADE_BY: &str = "cloud.recipe";
/// What building it calls.
const TOOLS: [Tool; 3] = [MMDEBSTRAP, FAKEROOT, MKE2FS];

/// The version of Debian whose cloud-init and kernel this is.
pub(crate) const VERSION: &str = "12";
const SUITE: &str = "bookworm";
const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// Beside the essential packages and what they depend on.
const PACKAGES: [&str; 14] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "cloud-init",
    "cloud-guest-utils",
    "openssh-server",
    "sudo",
    "netbase",
    "ifupdown",
    "isc-dhcp-client",
    "iproute2",
    "iputils-ping",
    "ca-certificates",
    "linux-image-cloud-amd64",
];

/// Runs before the packages are installed, the kernel among them.
const BEFORE: &str = include_str!("../../guest/cloud/before.sh");
/// Runs when they are installed.
const AFTER: &str = include_str!("../../guest/cloud/after.sh");

/// What `dpkg` leaves out, which no server reads.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// What [`ensure`] needs on the host.
pub(crate) fn tools() -> &'static [Tool] {
    if is_current() { &[] } else { &TOOLS }
}

/// Whether the disk is there, made by these recipes.
fn is_current() -> bool {
    let dir = workspace::guest_dir().join("amd64");
    let made_by = fs::read_to_string(dir.join(MADE_BY));
    dir.join(NAME).is_file() && made_by.is_ok_and(|text| text == recipe())
}

/// The disk, made if it is not there, or if `update` asks for the packages that are current.
pub(crate) fn ensure(update: bool) -> anyhow::Result<PathBuf> {
    let dir = workspace::guest_dir().join("amd64");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let lock = fs::File::create(dir.join(".cloud-lock")).context("cannot make the lock file")?;
    flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guest directory")?;
    let (path, made_by) = (dir.join(NAME), dir.join(MADE_BY));
    if is_current() && !update {
        return Ok(path);
    }
    prerequisites::require(&TOOLS)?;
    let work = tempfile::tempdir_in(&dir).context("cannot make a working directory")?;
    let archive = work.path().join("root.tar");
    step("installing Debian into the cloud guest", || {
        let [before, after] = [("before.sh", BEFORE), ("after.sh", AFTER)].map(|(name, script)| {
            let path = work.path().join(name);
            fs::write(&path, script).map(|()| path)
        });
        let hook = |kind: &str, script: PathBuf| format!("--{kind}-hook=sh -e '{}' \"$1\"", script.display());
        let mut mmdebstrap = process::command("mmdebstrap");
        mmdebstrap.args(["--quiet", "--variant=minbase", "--aptopt=Acquire::Languages \"none\""]);
        mmdebstrap.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
        mmdebstrap.arg(format!("--include={}", PACKAGES.join(",")));
        mmdebstrap.args([hook("essential", before?), hook("customize", after?)]);
        mmdebstrap.arg(SUITE).arg(&archive);
        mmdebstrap.args([
            format!("deb {MIRROR} {SUITE} main"),
            format!("deb {MIRROR} {SUITE}-updates main"),
            format!("deb {SECURITY} {SUITE}-security main"),
        ]);
        process::output(&mut mmdebstrap).map(drop)
    })?;
    step("making the cloud guest's disk", || {
        let unpacked = work.path().join("tree");
        fs::create_dir(&unpacked)?;
        disk::build(&work.path().join(NAME), &disk::CLOUD, Content::Archive(&archive, &unpacked))
    })?;
    fs::rename(work.path().join(NAME), &path).context("cannot put the cloud guest's disk in place")?;
    fs::write(&made_by, recipe()).context("cannot say what the cloud guest's disk was made by")?;
    Ok(path)
}

fn recipe() -> String {
    digest::of_texts(&[include_str!("cloud.rs"), include_str!("disk.rs"), BEFORE, AFTER])
}

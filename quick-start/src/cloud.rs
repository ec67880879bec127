//! Cloud guests: Debian as its own packages make it, with cloud-init, an SSH server and the kernel for virtual
//! machines.
//!
//! Nothing in them knows of this project. cloud-init finds by the machine's identity that it runs in EC2.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use ami_core::OperatingSystem;
use deb822_fast::borrowed::{BorrowedParagraph, BorrowedParser};

use crate::apt::{MIRROR, Package};
use crate::build::Made;
use crate::disk::{self, Content};
use crate::error::Context as _;
use crate::host::{self, KEYRING};
use crate::progress::Reporter;
use crate::{Error, ErrorKind, Result, process};

const SECURITY: &str = "http://deb.debian.org/debian-security";

/// A release of Debian's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) version: &'static str,
    pub(crate) suite: &'static str,
}

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
const BEFORE: &str = include_str!("../guest/cloud/before.sh");
/// Runs when they are installed.
const AFTER: &str = include_str!("../guest/cloud/after.sh");

/// What `dpkg` leaves out, which no server reads.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// What such a guest is made of beside the packages.
pub(crate) fn texts() -> Vec<&'static str> {
    vec![include_str!("cloud.rs"), include_str!("disk.rs"), BEFORE, AFTER]
}

/// The files that are made.
pub(crate) const FILES: &[&str] = &[disk::NAME];

/// Whether this user can install a system: root can, and who may be root in a namespace.
pub(crate) fn check_user() -> Result<()> {
    if host::is_root() {
        return Ok(());
    }
    let switches = ["/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/unprivileged_userns_clone"];
    let is_off = |path: &&str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
    let why = match switches.into_iter().find(is_off) {
        Some(switch) => format!("{switch} is 0"),
        None if !has_subordinate_ids() => "the user has no line in /etc/subuid and /etc/subgid".to_owned(),
        // There are more ways to forbid it than can be read: AppArmor, seccomp.
        None if !can_unshare() => "the user may not make a user namespace (unshare -U)".to_owned(),
        None => return Ok(()),
    };
    Err(Error::new(ErrorKind::NotPermitted, format!("only root can install a system here: {why}")))
}

fn can_unshare() -> bool {
    let tried =
        host::command("unshare").args(["-U", "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// Whether root of a namespace, which is another user here, reaches the directory `dir`.
fn check_reach(dir: &Path) -> Result<()> {
    let closed = |dir: &&Path| dir.metadata().is_ok_and(|dir| dir.permissions().mode() & 0o001 == 0);
    let dir = dir.canonicalize().context(|| format!("cannot reach {}", dir.display()))?;
    match dir.ancestors().find(closed) {
        None => Ok(()),
        Some(closed) => {
            let closed = closed.display();
            let what =
                format!("only root can install a system there: others may not enter {closed} (chmod o+x)");
            Err(Error::new(ErrorKind::NotPermitted, what))
        }
    }
}

/// Whether the user may have several users in a namespace (subuid(5)).
fn has_subordinate_ids() -> bool {
    let own = ["-u", "-un"].map(|option| {
        let id = host::command("id").arg(option).output();
        id.map(|id| format!("{}:", String::from_utf8_lossy(&id.stdout).trim())).unwrap_or_default()
    });
    ["/etc/subuid", "/etc/subgid"].iter().all(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().any(|line| own.iter().any(|own| own.len() > 1 && line.starts_with(own)))
    })
}

/// Makes them in the directory `dir`.
pub(crate) fn make(dir: &Path, release: &Release, reporter: &mut Reporter<'_>) -> Result<Made> {
    if !host::is_root() {
        check_reach(dir)?;
    }
    let archive = dir.join("root.tar");
    reporter.step("installing Debian", 90)?;
    install(dir, release, &archive, reporter)?;
    let mut record = process::command("tar");
    record.arg("-xOf").arg(&archive).arg("./var/lib/dpkg/status");
    let packages = installed(&process::output(&mut record, reporter)?)?;
    reporter.step("making the root disk", 100)?;
    let unpacked = dir.join("tree");
    fs::create_dir(&unpacked).context(|| format!("cannot make {}", unpacked.display()))?;
    disk::build(&dir.join(disk::NAME), &disk::CLOUD, Content::Archive(&archive, &unpacked), reporter)?;
    let operating_system = OperatingSystem::linux("debian", release.version);
    Ok(Made { operating_system, packages })
}

/// Installs the packages into the file `archive`.
fn install(dir: &Path, release: &Release, archive: &Path, reporter: &mut Reporter<'_>) -> Result<()> {
    let script = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).context(|| format!("cannot write {}", path.display())).map(|()| path)
    };
    let hook = |kind: &str, script: PathBuf| format!("--{kind}-hook=sh -e '{}' \"$1\"", script.display());
    let mut mmdebstrap = process::command("mmdebstrap");
    // Whatever it makes on its way goes with the working directory.
    mmdebstrap.env("TMPDIR", dir);
    // Left to itself it would try more for who is not root, with which packages' scripts fail.
    mmdebstrap.arg(if host::is_root() { "--mode=root" } else { "--mode=unshare" });
    mmdebstrap.args(["--variant=minbase", "--aptopt=Acquire::Languages \"none\""]);
    mmdebstrap.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    mmdebstrap.arg(format!("--include={}", PACKAGES.join(",")));
    mmdebstrap.args([
        hook("essential", script("before.sh", BEFORE)?),
        hook("customize", script("after.sh", AFTER)?),
    ]);
    // A host of another distribution does not trust Debian's keys by itself.
    mmdebstrap.arg(format!("--keyring={}", KEYRING.name()));
    let suite = release.suite;
    mmdebstrap.arg(suite).arg(archive).args([
        format!("deb {MIRROR} {suite} main"),
        format!("deb {MIRROR} {suite}-updates main"),
        format!("deb {SECURITY} {suite}-security main"),
    ]);
    let tell = |reporter: &mut Reporter<'_>, line: &str| {
        let step = line.strip_prefix("I: ").and_then(|step| step.strip_suffix("..."));
        if let Some(step) = step {
            reporter.detail(step);
        }
    };
    process::run(&mut mmdebstrap, reporter, tell).map(drop)
}

/// What dpkg's record calls installed.
fn installed(status: &str) -> Result<Vec<Package>> {
    let damaged = |_| Error::new(ErrorKind::Corrupt, "the record of what was installed is damaged");
    let paragraphs = BorrowedParser::new(status).parse_all().map_err(damaged)?;
    let package = |paragraph: &BorrowedParagraph<'_>| {
        let field = |name| paragraph.get(name).and_then(|lines| lines.first()).copied();
        let is_there = field("Status")?.ends_with(" installed");
        let package = Package {
            name: field("Package")?.to_owned(),
            version: field("Version")?.to_owned(),
            architecture: field("Architecture")?.to_owned(),
            sha256: String::new(),
            description: field("Description").unwrap_or_default().to_owned(),
        };
        is_there.then_some(package)
    };
    Ok(paragraphs.iter().filter_map(package).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_cannot_enter_is_named() {
        let home = tempfile::tempdir().unwrap();
        let (closed, dir) = (home.path().join("closed"), home.path().join("closed/dir"));
        fs::create_dir_all(&dir).unwrap();
        for (path, mode, named) in [
            (home.path(), 0o711, None),
            (&*dir, 0o755, None),
            (&*closed, 0o750, Some(&closed)),
            (&*dir, 0o700, Some(&dir)),
        ] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let said = check_reach(&dir).map_err(|e| (e.kind(), e.to_string()));
            match named {
                None => assert_eq!(said, Ok(())),
                Some(named) => {
                    let (kind, text) = said.unwrap_err();
                    assert_eq!(kind, ErrorKind::NotPermitted);
                    assert!(text.contains(&format!("{} ", named.display())), "{text}");
                }
            }
        }
    }

    #[test]
    fn reads_dpkgs_record() {
        let record = "Package: adduser\nStatus: install ok installed\nArchitecture: all\nVersion: 3.134\n\
                      Description: add and remove users\n This package\n .\n more\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n";
        let found = installed(record).unwrap();
        let said: Vec<_> = found.iter().map(|p| [&*p.name, &*p.version, &*p.description]).collect();
        assert_eq!(said, [["adduser", "3.134", "add and remove users"]]);
        assert_eq!(installed("no record").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

//! The minimal guest's root file system, as a directory tree on the host.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use crate::apt::Package;
use crate::disk::MINIMAL;
use crate::error::Context as _;
use crate::modules::modules_dep;
use crate::progress::Reporter;
use crate::sources::{Sources, text};
use crate::{Result, distribution, process};

/// The files that are the same in every build: path, mode, content.
const FILES: [(&str, u32, &str); 10] = [
    ("etc/acpi/PWRF/00000080", 0o755, include_str!("../guest/rootfs/etc/acpi/PWRF/00000080")),
    ("etc/group", 0o644, include_str!("../guest/rootfs/etc/group")),
    ("etc/hostname", 0o644, include_str!("../guest/rootfs/etc/hostname")),
    ("etc/hosts", 0o644, include_str!("../guest/rootfs/etc/hosts")),
    ("etc/init.d/rcK", 0o755, include_str!("../guest/rootfs/etc/init.d/rcK")),
    ("etc/init.d/rcS", 0o755, include_str!("../guest/rootfs/etc/init.d/rcS")),
    ("etc/inittab", 0o644, include_str!("../guest/rootfs/etc/inittab")),
    ("etc/passwd", 0o644, include_str!("../guest/rootfs/etc/passwd")),
    ("etc/profile", 0o644, include_str!("../guest/rootfs/etc/profile")),
    ("sbin/console-shell", 0o755, include_str!("../guest/rootfs/sbin/console-shell")),
];

const DIRS: [&str; 16] = [
    "bin", "boot", "dev", "etc", "home", "lib", "mnt", "proc", "run", "sbin", "srv", "sys", "usr/bin",
    "usr/sbin", "var/lib", "var/log",
];

/// What `modprobe` finds in the running guest.
const MODULES: [&str; 6] = ["virtio_mmio", "virtio_pci", "virtio_blk", "ext4", "button", "evdev"];

/// The content of those files.
pub(crate) fn texts() -> Vec<&'static str> {
    FILES.iter().map(|(_, _, content)| *content).collect()
}

/// Builds the tree in the empty directory `root`.
pub(crate) fn build(
    root: &Path,
    sources: &Sources,
    initrd: &[u8],
    reporter: &mut Reporter<'_>,
) -> Result<()> {
    let tree = Tree { root };
    for dir in DIRS {
        tree.dir(dir, 0o755)?;
    }
    tree.dir("root", 0o700)?;
    tree.dir("tmp", 0o1777)?;
    for (path, mode, content) in FILES {
        tree.file(path, mode, content.as_bytes())?;
    }
    tree.file("etc/os-release", 0o644, distribution::os_release(sources.operating_system()).as_bytes())?;
    busybox(&tree, sources, reporter)?;
    modules(&tree, sources)?;
    boot(&tree, sources, initrd)?;
    tree.file("var/lib/dpkg/status", 0o644, dpkg_status(sources).as_bytes())
}

/// A directory tree that is being filled.
struct Tree<'a> {
    root: &'a Path,
}

impl Tree<'_> {
    fn dir(&self, path: &str, mode: u32) -> Result<()> {
        let path = self.root.join(path);
        let made = make_dirs(&path).and_then(|()| set_mode(&path, mode));
        made.context(|| format!("cannot make {}", path.display()))
    }

    fn file(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = self.with_parent(path)?;
        let written = fs::write(&path, content).and_then(|()| set_mode(&path, mode));
        written.context(|| format!("cannot write {}", path.display()))
    }

    fn symlink(&self, path: &str, target: &str) -> Result<()> {
        let path = self.with_parent(path)?;
        symlink(target, &path).context(|| format!("cannot make the link {}", path.display()))
    }

    fn with_parent(&self, path: &str) -> Result<PathBuf> {
        let path = self.root.join(path);
        if let Some(parent) = path.parent() {
            make_dirs(parent).context(|| format!("cannot make {}", parent.display()))?;
        }
        Ok(path)
    }
}

/// Makes a directory, and those above it that are not there, which everybody may read whatever this process's umask is.
fn make_dirs(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_dirs(parent)?;
    }
    fs::create_dir(path)?;
    set_mode(path, 0o755)
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Busybox, and a link for each command it has.
fn busybox(tree: &Tree<'_>, sources: &Sources, reporter: &mut Reporter<'_>) -> Result<()> {
    tree.file("bin/busybox", 0o755, &sources.busybox)?;
    let program = tree.root.join("bin/busybox");
    let links = process::output(process::command(text(&program)?).arg("--list-full"), reporter)?;
    for link in links.lines().filter(|link| *link != "bin/busybox") {
        tree.symlink(link, "/bin/busybox")?;
    }
    Ok(())
}

fn modules(tree: &Tree<'_>, sources: &Sources) -> Result<()> {
    let dir = format!("lib/modules/{}", sources.kernel_version());
    let modules = sources.modules.closure(&MODULES)?;
    for module in &modules {
        tree.file(&format!("{dir}/{}", module.path.display()), 0o644, &module.content)?;
    }
    tree.file(&format!("{dir}/modules.dep"), 0o644, modules_dep(&modules).as_bytes())
}

/// The kernel, the initrd, and the Boot Loader Specification entry that names them.
fn boot(tree: &Tree<'_>, sources: &Sources, initrd: &[u8]) -> Result<()> {
    let (version, partition) = (sources.kernel_version(), MINIMAL.partition);
    tree.file(&format!("boot/vmlinuz-{version}"), 0o644, sources.vmlinuz())?;
    tree.file(&format!("boot/initrd.img-{version}"), 0o644, initrd)?;
    let entry = format!(
        "title   AMI quick start\n\
         version {version}\n\
         linux   /boot/vmlinuz-{version}\n\
         initrd  /boot/initrd.img-{version}\n\
         options root=PARTUUID={partition} rw console=ttyS0 quiet panic=-1\n"
    );
    tree.file(&format!("boot/loader/entries/{version}.conf"), 0o644, entry.as_bytes())
}

/// What is installed, as dpkg records it.
fn dpkg_status(sources: &Sources) -> String {
    let stanza = |package: &Package| {
        format!(
            "Package: {}\nStatus: install ok installed\nArchitecture: {}\nVersion: {}\nDescription: {}\n\n",
            package.name, package.architecture, package.version, package.description
        )
    };
    sources.packages().iter().map(stanza).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In a process of its own, which has the umask.
    #[test]
    fn a_tree_is_readable_whatever_the_umask() {
        const STAGE: &str = "QUICK_START_TEST_UMASK";
        if std::env::var_os(STAGE).is_none() {
            let mut again = Command::new("sh");
            again.args(["-c", "umask 077; exec \"$@\"", "sh"]).arg(std::env::current_exe().unwrap());
            again.args(["--exact", "rootfs::tests::a_tree_is_readable_whatever_the_umask"]);
            let output = again.env(STAGE, "077").output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            return;
        }
        let home = tempfile::tempdir().unwrap();
        let root = &home.path().join("tree");
        let tree = Tree { root };
        tree.dir("usr/bin", 0o755).unwrap();
        tree.dir("tmp", 0o1777).unwrap();
        tree.file("lib/modules/6.1/a.ko", 0o644, b"").unwrap();
        tree.symlink("usr/sbin/ip", "/bin/busybox").unwrap();
        for (path, mode) in [
            ("", 0o755),
            ("usr", 0o755),
            ("usr/bin", 0o755),
            ("usr/sbin", 0o755),
            ("tmp", 0o1777),
            ("lib", 0o755),
            ("lib/modules/6.1", 0o755),
            ("lib/modules/6.1/a.ko", 0o644),
        ] {
            let found = root.join(path).metadata().unwrap().permissions().mode() & 0o7777;
            assert_eq!(found, mode, "{path}: {found:o}");
        }
    }
}

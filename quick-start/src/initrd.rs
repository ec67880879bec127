//! The initial RAM disks: busybox, modules in load order, and a script as `/init`.

use ami_core::Architecture;

use crate::archive::Archive;
use crate::sources::Sources;
use crate::{Error, ErrorKind, Result};

/// The initrd of a minimal guest, which finds the root file system and hands over to it.
pub(crate) fn of_minimal(architecture: Architecture) -> Initrd<'static> {
    const APPLETS: &[&str] = &[
        "cat",
        "cut",
        "dd",
        "echo",
        "findfs",
        "grep",
        "insmod",
        "mount",
        "poweroff",
        "sed",
        "sh",
        "switch_root",
        "tr",
        "usleep",
        "xxd",
    ];
    // Both ways in which a virtio disk may be attached, and the file system on it.
    const MODULES: &[&str] = &["virtio_mmio", "virtio_pci", "virtio_blk", "ext4"];
    // Where ext4 is a module, it asks for its checksum by a name that is no module's.
    const MODULES_686: &[&str] = &["virtio_mmio", "virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];
    let modules = if architecture == Architecture::X86 { MODULES_686 } else { MODULES };
    Initrd::new(INIT).modules(modules).applets(APPLETS)
}

/// Its `/init`.
pub(crate) const INIT: &str = include_str!("../guest/initrd-init.sh");

/// An initial RAM disk of [`Sources`], to be built: `/init`, the drivers that it loads and the commands that it calls.
///
/// Below `/modules` are the kernel's modules, unpacked, and `order`, a list of them in which each comes after what it
/// depends on; below `/bin` are busybox and a link to it for each command. Equal sources make equal bytes.
///
/// ```no_run
/// # fn build(sources: &quick_start::Sources) -> quick_start::Result<Vec<u8>> {
/// use quick_start::Initrd;
///
/// let init = "#!/bin/sh\nwhile read -r module; do insmod /modules/$module; done </modules/order\nexec sh\n";
/// let initrd = Initrd::new(init)
///     .modules(&["virtio_pci", "virtio_net"])
///     .applets(&["insmod", "sh"])
///     .program("etc/acpi/PWRF/00000080", b"#!/bin/sh\npoweroff -f\n")
///     .build(sources)?;
/// # Ok(initrd)
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "an initrd is made only when built"]
pub struct Initrd<'a> {
    init: &'a str,
    modules: &'a [&'a str],
    applets: &'a [&'a str],
    programs: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Initrd<'a> {
    /// One with this script, or other text that a kernel runs, as its `/init`.
    pub fn new(init: &'a str) -> Self {
        Self { init, modules: &[], applets: &[], programs: Vec::new() }
    }

    /// The modules that there are, with all that they depend on. Such as are built into the kernel are left out.
    pub fn modules(self, modules: &'a [&'a str]) -> Self {
        Self { modules, ..self }
    }

    /// The commands of busybox's that there are.
    pub fn applets(self, applets: &'a [&'a str]) -> Self {
        Self { applets, ..self }
    }

    /// A script or a program, in `bin`, `etc` or `etc/acpi/PWRF`.
    pub fn program(mut self, path: &'a str, content: &'a [u8]) -> Self {
        self.programs.push((path, content));
        self
    }

    /// The archive.
    ///
    /// # Errors
    ///
    /// [`PackageNotFound`](ErrorKind::PackageNotFound) for a module or a command that the packages have not,
    /// [`Corrupt`](ErrorKind::Corrupt) for a module that is none.
    pub fn build(&self, sources: &Sources) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for dir in ["bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "modules", "proc", "root", "sys"] {
            archive.dir(dir)?;
        }
        archive.program("bin/busybox", &sources.busybox)?;
        for applet in self.applets {
            if !sources.applets.contains(*applet) {
                let what = format!("this busybox has no {applet}, which the guest needs");
                return Err(Error::new(ErrorKind::PackageNotFound, what));
            }
            archive.symlink(&format!("bin/{applet}"), "busybox")?;
        }
        let mut order = String::new();
        for module in sources.modules.closure(self.modules)? {
            let name = module.file_name();
            archive.file(&format!("modules/{name}"), &module.content)?;
            order += &format!("{name}\n");
        }
        archive.file("modules/order", order.as_bytes())?;
        for (path, content) in &self.programs {
            archive.program(path, content)?;
        }
        archive.program("init", self.init.as_bytes())?;
        archive.finish()
    }
}

//! What a disk boots.

use ami_core::Architecture;
use storage_block::Disk;

use crate::kernel::{self, Kernel};
use crate::search::{self, Located};
use crate::{Error, ErrorKind, Result};

const MAX_KERNEL: u64 = 256 << 20;
const MAX_INITRDS: u64 = 1 << 30;
/// Far more than any kernel takes; each hypervisor has its own limit below.
const MAX_COMMAND_LINE: usize = 64 << 10;

/// What a disk boots: the kernel, what is loaded beside it, and its command line.
///
/// ```no_run
/// use boot_image::BootEntry;
/// use storage_block::RawFile;
///
/// let disk = RawFile::open("debian.raw", true)?.into_disk();
/// let entry = BootEntry::find(&disk)?;
/// println!("{} for {}", entry.title.as_deref().unwrap_or("no title"), entry.architecture);
/// println!("{} {:?} on partition {:?}", entry.kernel_path, entry.initrd_paths, entry.partition);
/// let vmlinux = entry.unpack_kernel()?;
/// std::fs::write("vmlinux", &vmlinux.image)?;
/// std::fs::write("initrd", entry.initrd.as_deref().unwrap_or_default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootEntry {
    /// The kernel file, as it lies on the disk; see [`unpack_kernel`](Self::unpack_kernel).
    pub kernel: Vec<u8>,
    /// The initial RAM disk; several are joined into one.
    pub initrd: Option<Vec<u8>>,
    /// The kernel's command line.
    pub command_line: String,
    /// The machine that the kernel runs on.
    pub architecture: Architecture,
    /// The title that a boot menu would show.
    pub title: Option<String>,
    /// The version that the entry, or else the kernel's file name, names.
    pub version: Option<String>,
    /// Where the kernel lies in its file system, without symbolic links.
    pub kernel_path: String,
    /// Where the initial RAM disks lie in the same file system, without symbolic links.
    pub initrd_paths: Vec<String>,
    /// The number of the partition that these lie on; `None` where the disk has no partitions.
    pub partition: Option<u32>,
    /// The configuration that named all this.
    pub source: BootSource,
}

/// The configuration that named a [`BootEntry`].
///
/// ```
/// use boot_image::{BootEntry, BootSource};
///
/// fn named_by(entry: &BootEntry) -> &str {
///     match &entry.source {
///         BootSource::LoaderEntry(path) | BootSource::Grub(path) => path,
///         _ => "the kernel's own name",
///     }
/// }
/// # let _ = named_by;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BootSource {
    /// An entry of the Boot Loader Specification, type 1: the path of its `.conf` file.
    LoaderEntry(String),
    /// A menu entry of GRUB: the path of `grub.cfg`.
    Grub(String),
    /// No configuration: Debian's `vmlinuz` link or the newest kernel by its file name, with a
    /// default command line.
    KernelFile,
}

impl BootEntry {
    /// Finds what `disk` boots, and reads it.
    ///
    /// The file systems searched are those of the partitions in the GUID partition table, or the one
    /// that takes the whole disk. The first of these that names a kernel that is there decides:
    ///
    /// 1. The entries of the Boot Loader Specification, type 1, in `/boot/loader/entries/*.conf`, in
    ///    the specification's order. A default in `loader.conf` is not followed.
    /// 2. `/boot/grub/grub.cfg` or `/boot/grub2/grub.cfg`: its default entry, or else its first.
    /// 3. Debian's links `/vmlinuz` and `/boot/vmlinuz`, then the newest `/boot/vmlinuz-*`, with the
    ///    initial RAM disk that belongs to it and the command line
    ///    `root=PARTUUID=<root partition> ro console=ttyS0`. ARM64 gets no `console`: there the
    ///    firmware tables name it. A disk without partitions gets `root=UUID=<file system>` if there
    ///    is an initial RAM disk, since the kernel alone cannot find that, and else
    ///    `root=/dev/vda`.
    ///
    /// Where `/boot` is a partition of its own, the same paths are looked for from its root.
    ///
    /// # Errors
    ///
    /// As [`ErrorKind`] lists them. One damaged file system is an error only if no other boots.
    pub fn find(disk: &Disk) -> Result<Self> {
        let Located { fs, partition, kernel_path, initrd_paths, mut command_line, title, version, source } =
            search::locate(disk)?;
        if command_line.len() > MAX_COMMAND_LINE {
            let len = command_line.len();
            return Err(Error::new(ErrorKind::TooLarge, format!("the command line is {len} bytes long")));
        }
        if command_line.contains(|c: char| c.is_control() && c != '\t') {
            return Err(Error::new(ErrorKind::Corrupt, "the command line contains control characters"));
        }
        let kernel = read(&fs, &kernel_path, MAX_KERNEL)?;
        let architecture = kernel::architecture_of(&kernel).map_err(|e| e.about(&kernel_path))?;
        if source == BootSource::KernelFile && architecture != Architecture::Arm64 {
            command_line.push_str(" console=ttyS0");
        }
        let mut initrd: Option<Vec<u8>> = None;
        for path in &initrd_paths {
            let joined = initrd.get_or_insert_default();
            // The kernel looks for the next archive at a multiple of four bytes.
            joined.resize(joined.len().next_multiple_of(4), 0);
            let next = read(&fs, path, MAX_INITRDS - joined.len() as u64)?;
            if joined.is_empty() {
                *joined = next;
            } else {
                joined.extend(next);
            }
        }
        Ok(Self {
            kernel,
            initrd,
            command_line,
            architecture,
            title,
            version,
            kernel_path,
            initrd_paths,
            partition,
            source,
        })
    }

    /// Unpacks the kernel into what a hypervisor loads.
    ///
    /// # Errors
    ///
    /// As [`unpack_kernel`](crate::unpack_kernel).
    pub fn unpack_kernel(&self) -> Result<Kernel<'_>> {
        kernel::unpack_kernel(&self.kernel).map_err(|e| e.about(&self.kernel_path))
    }
}

fn read(fs: &crate::filesystem::FileSystem, path: &str, limit: u64) -> Result<Vec<u8>> {
    let gone = || Error::new(ErrorKind::Corrupt, format!("{path} was there and is gone"));
    fs.read(path, limit)?.ok_or_else(gone)
}

//! Finds what a disk image boots, as EC2 boots an AMI from its own root volume, and unpacks the
//! kernel into what a hypervisor loads: no firmware runs, and no work is left to the guest.
//!
//! ```
//! use boot_image::{BootEntry, ErrorKind};
//! use storage_block::MemoryDisk;
//!
//! let disk = MemoryDisk::new(1 << 20)?.into_disk();
//! match BootEntry::find(&disk) {
//!     Ok(entry) => {
//!         let kernel = entry.unpack_kernel()?;
//!         println!("{} boots {} bytes: {}", entry.kernel_path, kernel.image.len(), entry.command_line);
//!     }
//!     Err(e) => assert_eq!(e.kind(), ErrorKind::NoFileSystem), // this disk is all zeroes
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it reads
//!
//! A GUID partition table or none; ext4 (ext2 and ext3 as well, and a journal that still has to be
//! replayed); entries of the Boot Loader Specification, GRUB's configuration as `grub-mkconfig`
//! writes it, and Debian's kernel files; see [`BootEntry::find`]. Kernels for 32-bit and 64-bit x86
//! and 64-bit ARM; see [`unpack_kernel`].
//!
//! # I/O and errors
//!
//! Calls block and read the disk from the calling thread; nothing is written. What is read are
//! tables, directories and configuration, and the files of the one entry found, which are held in
//! memory. An [`Error`] has a [`kind`](Error::kind) and says what is wrong and where.
//!
//! # What it trusts
//!
//! Nothing in the image. Every size is checked against the disk or a limit before memory is
//! allocated for it; a kernel unpacks to 512 MiB at most. The search over all file systems of a disk may cost
//! some seconds at most, counted in directories gone through and text read, so that equal disks have equal
//! answers. The checksum of the ext4 superblock is
//! verified, and those of inodes, directories and extents are not, as in a file system made without
//! them. The disk must not change while it is read.
//!
//! # What it leaves out
//!
//! MBR partition tables, other file systems (XFS, Btrfs, FAT), LVM and encryption, unified kernel
//! images, and boot loader features that need a boot loader to run: menus, one-time entries and
//! GRUB scripts with a kernel inside a condition. Each is a clear error.

mod budget;
mod decompress;
mod entry;
mod error;
mod file;
mod filesystem;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod grub;
mod kernel;
mod loader_entry;
mod lzo;
mod partition;
mod search;
mod superblock;
mod version;
mod window;

pub use entry::{BootEntry, BootSource};
pub use error::{Error, ErrorKind, Result};
pub use file::read_file;
pub use kernel::{Kernel, unpack_kernel, write_sparse};

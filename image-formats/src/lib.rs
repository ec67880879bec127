//! Disk images of other programs, read and written: raw, qcow2 and VMDK.
//!
//! An image is opened as a [`Disk`](storage_block::Disk), from which a [`Store`](storage_block::Store) makes a snapshot;
//! any disk, of a snapshot or a volume, is exported as an image.
//!
//! ```
//! use std::ops::ControlFlow;
//! use image_formats::{Compression, ExportOptions, Format, export, open};
//! use storage_block::{MemoryDisk, Store};
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! # let disk = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
//! # export(&disk, dir.join("debian.img"), &ExportOptions::new(Format::Vmdk), &mut |_| ControlFlow::Continue(()))?;
//! let path = dir.join("debian.img");
//! let image = open(&path, Format::probe(&path)?)?;
//! let store = Store::open(dir.join("store"))?;
//! let (snapshot, _) = store.import(&image, &mut |_| ())?;
//!
//! let options = ExportOptions::new(Format::Qcow2).compression(Compression::Zlib);
//! export(&snapshot.disk(), dir.join("debian.qcow2"), &options, &mut |_| ControlFlow::Continue(()))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it reads and writes
//!
//! | format | read | written |
//! |---|---|---|
//! | raw | files and block devices | sparse |
//! | qcow2 | versions 2 and 3, every cluster size, clusters packed with deflate or Zstandard | version 3, the same |
//! | VMDK | monolithicSparse, streamOptimized; monolithicFlat, twoGbMaxExtentSparse and -Flat [when allowed] | streamOptimized, monolithicSparse |
//!
//! [when allowed]: OpenOptions::extents_beside
//!
//! # Input and output
//!
//! Calls block and do their work on the calling thread. Images are streamed: memory is needed for the tables that say
//! where data lies, and not for data; holes are neither read nor written. An exported image appears under its name
//! when it is complete and durable, and never otherwise.
//!
//! # Errors
//!
//! [`Error`] has a [`kind`](Error::kind), names the file, and has the system's error as its source. A disk that was
//! opened says what is wrong with its tables as a [`storage_block::Error`], when it meets that.
//!
//! # What it trusts
//!
//! Nothing in an image. No file is opened but the one that was named, unless the caller allows for those beside it.
//! Sizes and places are checked against the file and against limits before memory is allocated for them, and a table or a
//! cluster that lies on another table is refused. What is read never lies outside of the image. A small image can
//! unpack to a large disk, as that is what packing is for: [`OpenOptions::max_size`] bounds the disk, and with it time
//! and space. The file must not change while it is open.
//!
//! qcow2 images are read by [imago](https://docs.rs/imago), to which nothing of an image comes unchecked and whose
//! panics, should it have any, are errors here.
//!
//! # What it leaves out
//!
//! Backing files, parents and snapshots inside an image (convert it to one without), encryption, extended L2 entries
//! of qcow2, the formats of ESX's own file system, VHD and VHDX. Each is a clear error.

mod bytes;
mod error;
mod export;
mod format;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::unwrap_used, reason = "it is test code, outside of a test function")]
pub mod fuzzing;
mod open;
mod pack;
mod qcow2;
mod read_only;
mod source;
mod vmdk;

pub use error::{Error, ErrorKind, Result};
pub use export::{Compression, ExportOptions, ExportStats, Progress, export};
pub use format::Format;
pub use open::{OpenOptions, open};

//! Block storage for machine images: immutable snapshots, and volumes that begin as one.
//!
//! A [`Store`] keeps [`Snapshot`]s: disks cut into chunks of 64 KiB, each stored once under its SHA-256 digest. A
//! [`Volume`] begins as a snapshot, in the same time however large that is, and keeps what is written
//! to it in a file of its own. A snapshot of a volume stores the chunks that have changed, while the volume goes on
//! being written; several volumes can be [frozen](Volume::freeze) at one instant, and
//! [`Snapshot::changed_blocks`] lists what differs between two snapshots. Whatever can be read and
//! written is a [`Disk`], and [`nbd::Server`] gives any disk to another process.
//!
//! ```
//! use storage_block::{RawFile, Store, Volume};
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! # RawFile::create(dir.join("debian.raw"), 1 << 30)?;
//! let store = Store::open(dir.join("store"))?;
//! let image = RawFile::open(dir.join("debian.raw"), true)?.into_disk();
//! let (snapshot, _) = store.import(&image, &mut |_| ())?;
//!
//! let volume = Volume::create(&dir.join("vol-1"), Some(&snapshot), 8 << 30)?;
//! volume.disk().write_at(b"mine alone", 4096)?;
//! let (next, stats) = volume.snapshot(&store)?;
//! assert_ne!(next.digest(), snapshot.digest());
//! assert_eq!(stats.changed_bytes, 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Input and output
//!
//! Every call of a [`Disk`] does its work on the thread that makes it, with `pread` and `pwrite`, and from the
//! files into the caller's buffers without a copy, be they slices or a guest's memory ([`IoBufMut`]). Whoever wants
//! many requests under way at once has a [`Queue`], which the kernel's io_uring serves or a few threads; a [`Limiter`]
//! keeps either to so many operations and bytes in a second. Only queues and the NBD server
//! have threads of their own. Others last no longer than a call: imports, snapshots and sweeps share their work among a few,
//! and what makes a new volume durable, as its first flush does, has a directory synchronised by one while it synchronises
//! another.
//!
//! Handles are cheap to clone, may be used from any thread, and close with their last clone. A read never goes
//! through more than one snapshot, however many came before it.
//!
//! What a function says is durable survives a crash of the process and of the machine; what a disk was
//! told to write survives from the next [`Disk::flush`] on. The format of every file, and which operation
//! synchronises what, is in `docs/storage-format.md`.
//!
//! # Errors
//!
//! [`Error`] has a [`kind`](Error::kind), says what it happened to, and has the operating system's error as its
//! source. A file system that is full is [`ErrorKind::NoSpace`]: what was being made is taken back and
//! everything else is as it was, but for the bytes of a write to a disk: as after any other error each may be the old or the
//! new one, and of a write to a volume of more than 1 MiB the first parts mostly are. A damaged file is [`ErrorKind::Corrupt`], with the file's name and what is wrong.
//!
//! # Trust
//!
//! Disk contents, offsets and lengths, NBD clients and damaged files are not trusted. That nobody else
//! changes the files of a store or a volume is: a lock keeps a second owner out, and not a stranger.
//! A chunk is checked when it is first read after its store was opened, and not on each read: against the checksum that
//! was stored with it, or its digest where [`Verify`] says so. Manifests are checked against theirs whenever they are read;
//! [`Snapshot::verify`] and [`Store::scrub`] check all, against digests.
//!
//! # Space and secrecy
//!
//! A chunk that differs in a few blocks of 4 KiB from the one that was there before, or from zeroes, is stored as these
//! blocks, so that small writes make small snapshots. [`Compression`] is off unless it is asked for, and says why.
//! Snapshots and volumes can be encrypted, each under a key of its own: see [`keys`].
//!
//! # Memory
//!
//! Of a store all packs' indices are in memory: 54 to 64 bytes for each chunk, about 1 GiB for a TiB of chunks that are
//! not alike, and 32 MiB for each TiB of packs that were read from. A snapshot that is open has 40 KiB for each 64 MiB of
//! disk that was read through it, shared by all its volumes: 640 MiB for each TiB. A volume has 4 KiB for each 64 MiB in
//! which anything was written, and 2 KiB more from its first snapshot on: 96 MiB for each TiB. What a request takes beside
//! these does not depend on any size; an import takes a few MiB for each processor and 150 bytes for each new chunk. A sweep
//! takes up to 115 bytes for each chunk that is kept, 1 to 2 GiB for a TiB of them, 32 for each that goes with a whole pack, and
//! some 200 MiB for the packs that it rewrites.
//!
//! Of descriptors a store has one for each pack of up to 1 GiB that was read from, as long as it is open. A volume has two,
//! and a new one, until a flush has something to log, a third, which keeps room for that.
//! Whoever has a store of a TiB raises what a process may have (`RLIMIT_NOFILE`, often 1024), as nobody here does.
//!
//! # Left out
//!
//! Other image formats (see the crate `image-formats`), futures, and stores that several hosts share.

mod backend;
mod bounce;
mod buffer;
mod cache;
mod changed;
mod cipher;
mod codec;
mod direct;
mod disk;
mod error;
mod format;
mod freeze;
mod fs;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::unwrap_used, reason = "it is test code, outside of a test function")]
pub mod fuzzing;
mod import;
pub mod keys;
mod limit;
mod log;
mod lookup;
mod map;
mod memory;
pub mod nbd;
mod object;
mod options;
mod overlay;
mod pack;
mod pipeline;
mod places;
mod progress;
mod queue;
mod raw;
mod room;
mod scrub;
mod session;
mod snapshot;
mod sparse;
mod store;
mod sweep;
pub mod testing;
mod turns;
mod volume;

pub use ami_core::Digest;
pub use backend::{BlockBackend, Capabilities, Extent, SECTOR};
pub use buffer::{IoBuf, IoBufMut};
pub use changed::{Blocks, ChangedBlock, ChangedBlocks};
pub use codec::Compression;
pub use disk::Disk;
pub use error::{Error, ErrorKind, Result};
pub use import::SnapshotStats;
pub use limit::{IoLimits, Limiter, Rate};
pub use memory::MemoryDisk;
pub use options::{StoreOptions, Verify, VolumeOptions};
pub use progress::Progress;
pub use queue::{Completion, Engine, Queue, QueueOptions};
pub use raw::RawFile;
pub use scrub::ScrubReport;
pub use snapshot::Snapshot;
pub use store::Store;
pub use sweep::{Reclaimed, Sweep};
pub use volume::{FrozenVolumes, Volume};

#[cfg(test)]
mod tests;

//! Instances as live objects of machine images: the region that keeps them, the life that they lead,
//! and the contract with the hypervisors that run them.
//!
//! ```
//! use ami_core::{Ami, X86_64};
//! use instance_core::testing::{FakeHypervisor, tiny_elf};
//! use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
//! use storage_block::MemoryDisk;
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! let region = Region::open(dir, FakeHypervisor::new())?; // or a real one
//! let disk = MemoryDisk::new(1 << 20)?.into_disk();
//! let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
//! let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
//!
//! let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
//! let copy = server.create_image("web-changed")?;
//! let twin = region.launch(&copy.ami.typed::<X86_64>()?, LaunchSpec::new("t2.nano".parse()?))?;
//! assert_eq!(twin.state(), server.state());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Map
//!
//! - [`Region`]: a directory with images, volumes and instances, and the process that owns it.
//! - [`Instance`]: an object made from an image. [`InstanceState`] is its life, [`InstanceDescription`]
//!   what is known of it, [`Console`](console::Console) its serial console, and
//!   [`Shell`](shell::Shell) a session on that.
//! - [`machine`]: what a region asks of a hypervisor. [`testing`] has the suite that every hypervisor
//!   passes, and one that runs nothing.
//! - [`watch`]: values that can be waited for, by blocking or as a future of no particular runtime.
//!
//! # Input, output and errors
//!
//! Calls block and do their work on the thread that makes them; the calls on one instance wait for each
//! other, and one thread a region follows up the machines that end by themselves. What a call
//! acknowledged is on disk: what a crash left half done is finished or undone by [`Region::open`].
//!
//! An [`Error`] has a [`kind`](Error::kind) to match on, EC2's [`code`](Error::code), and its cause as its
//! source. Consoles and shells fail as [`std::io`] does.
//!
//! # Trust
//!
//! Images, guests and what they write to their consoles are not trusted. The hypervisor is, and that
//! nobody else changes the files of a region: a lock keeps a second owner out, and not a stranger.
//!
//! # Left out
//!
//! Networks, key pairs, volumes attached to an instance that runs, instance store volumes, and EC2's
//! API over HTTP. How machines run is a hypervisor crate's.

mod boot_cache;
pub mod console;
mod database;
mod error;
mod forget;
mod images;
mod instance;
mod instance_type;
mod launch;
mod lifecycle;
mod lock;
pub mod machine;
mod record;
mod region;
pub mod shell;
mod state;
mod store;
mod supervisor;
pub mod testing;
pub mod watch;

pub use error::{Error, ErrorKind, Result};
pub use images::{CreatedImage, DirectBoot, ImageSource};
pub use instance::Instance;
pub use instance_type::InstanceType;
pub use launch::LaunchSpec;
pub use record::{Attachment, InstanceDescription, ShutdownBehavior, StateReason};
pub use region::{Region, RegionOptions, StateChange};
pub use state::{InstanceState, Transition};

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
//! - A region is used as an account: [`Region::as_account`]. [`Region::run_instances`] launches with a
//!   [`LaunchSpec`], and [`Region::launch_from_template`] with what a [`LaunchTemplate`] keeps; images, instances, volumes, snapshots and tags are described by requests with EC2's
//!   filters ([`Describe`], [`DescribeTags`], [`ami_core::DescribeImages`]). [`Capacity`] is what the host
//!   holds.
//! - [`Instance::create_image`] makes an image of a server that goes on, whose guest may have an
//!   [agent](RegionOptions::guest_agent) flush its file systems for it; [`Region::begin_create_snapshot`] and
//!   [`Region::create_snapshots`] make snapshots of volumes.
//! - [`state_store`]: where a region keeps what it knows, if not in its own file.
//! - [`machine`]: what a region asks of a hypervisor. [`testing`] has the suite that every hypervisor
//!   passes, and one that runs nothing.
//! - [`net`]: the cables between machines and networks. [`network`]: what a region asks of a network.
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
//! EC2's API over HTTP. How machines run is a hypervisor
//! crate's, how frames go a network's.

mod attach;
mod block_device;
mod boot_cache;
mod capacity;
pub mod console;
mod copy_image;
mod create_image;
mod describe;
mod description;
mod directory;
mod error;
mod forget;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod garbage;
mod guest_agent;
mod hibernation;
mod image_calls;
mod image_ids;
mod image_record;
mod image_source;
mod image_states;
mod images;
mod instance;
mod instance_type;
mod launch;
mod launch_template;
mod lifecycle;
mod lock;
pub mod machine;
mod metadata_options;
mod migrate;
mod modify;
pub mod net;
pub mod network;
mod nocloud;
mod options;
mod power;
mod products;
mod record;
mod recovery;
mod region;
#[cfg(feature = "sbom")]
mod sbom;
mod scrub;
pub mod shell;
mod snapshots;
mod ssh;
mod state;
mod state_changes;
pub mod state_store;
mod status;
mod store;
mod storing;
mod supervisor;
mod tags;
mod tasks;
pub mod testing;
mod volume_modification;
mod volume_states;
mod volumes;
pub mod vsock;
pub mod watch;
mod watched;

pub use ami_core::StateReason;
pub use block_device::{BlockDeviceMappingRequest, BlockDeviceRequestKind, EbsRequest};
pub use capacity::Capacity;
pub use copy_image::CopyImage;
pub use create_image::{CreateImage, CreatedImage, ImageConsistency};
pub use describe::{Describe, DescribeInstances, DescribeSnapshots, DescribeVolumes};
pub use description::{Attachment, InstanceDescription, ShutdownBehavior};
pub use error::{Error, ErrorKind, Result};
pub use image_calls::RegionCatalog;
pub use image_source::{DirectBoot, ImageSource};
pub use instance::Instance;
pub use instance_type::{EbsBandwidth, InstanceStore, InstanceType, NetworkBandwidth};
pub use launch::{LaunchSpec, Reservation};
pub use launch_template::{
    DescribeLaunchTemplateVersions, DescribeLaunchTemplates, LaunchTemplate, LaunchTemplateRef,
    LaunchTemplateVersion, LaunchTemplateVersionSpec, TemplateVersion,
};
pub use metadata_options::{HttpTokens, MetadataOptions};
pub use nocloud::NoCloudSeed;
pub use options::RegionOptions;
pub use region::Region;
#[cfg(feature = "sbom")]
pub use sbom::{InstalledPackage, SoftwareBill};
pub use scrub::RegionScrub;
pub use snapshots::{CreateSnapshots, PendingSnapshot, SnapshotDescription, SnapshotState};
pub use ssh::SshAccess;
pub use state::{InstanceState, Transition};
pub use state_changes::{StateChange, StateChanges};
pub use status::{DescribeInstanceStatus, InstanceStatus, Status};
pub use tags::{DescribeTags, TagDescription};
pub use tasks::{
    CopyImageTask, CreateImageTask, DescribeCopyImageTasks, DescribeCreateImageTasks,
    DescribeExportImageTasks, DescribeImportImageTasks, ExportImageTask, Exported, ImportImage,
    ImportImageTask, Task, TaskDescription, TaskStatus, Tell, UnfinishedImage,
};
pub use volume_modification::{ModifyVolume, VolumeModification, VolumeModificationState};
pub use volumes::{VolumeAttachment, VolumeDescription, VolumeSpec, VolumeState};

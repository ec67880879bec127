//! Amazon Machine Images as classes: immutable, typed, content-addressed descriptions of servers.
//!
//! ```
//! use ami_core::{Ami, BlockDeviceMapping, Digest, OperatingSystem, X86_64};
//!
//! let ami = Ami::<X86_64>::builder("web-server")
//!     .operating_system(OperatingSystem::linux("debian", "12"))
//!     .root_device("/dev/xvda")
//!     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"the root volume"), 8))
//!     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
//!
//! let copy = ami.copy_to(&"eu-west-1".parse()?, ami.owner(), "web-server")?;
//! assert_ne!(copy.id(), ami.id()); // an id belongs to one region
//! assert_eq!(copy.digest(), ami.digest()); // a digest to one content
//! # Ok::<(), ami_core::Error>(())
//! ```
//!
//! # Map
//!
//! - [`Manifest`]: what an image is. Immutable; its [`Digest`] is that of its canonical JSON.
//! - [`Ami`]: a manifest in a region, under a name, with an owner. Immutable; its [`AmiId`] is derived
//!   from these. [`AmiBuilder`] makes one. The type parameter is the architecture, so that the
//!   compiler keeps an [`Ami<Arm64>`](Arm64) from where an [`Ami<X86_64>`](X86_64) is asked for; [`AnyAmi`]
//!   holds either.
//! - [`DeclaredAmi`]: an image as a program expects it, written down as a constant and compared with what there is.
//! - [`Image`]: the record that a region keeps of an `Ami`, with what its owner can change: state,
//!   launch permissions, tags, description, deprecation.
//! - [`Catalog`]: where the records are kept; [`Query`] and [`Filter`] choose among them.
//! - [`AccountImages`]: a catalog as one account uses it, with EC2's calls. [`Image::authorize`] decides who
//!   may see, launch, copy or change an image, and nothing else does.
//! - [`ResourceId`], [`Page`] and [`Pattern`]: what the answers about images and about other resources share.
//!
//! The format of a manifest is that of [`Manifest::to_canonical_json`]; golden files in `tests/golden` keep it.
//!
//! # Input, output and errors
//!
//! No function opens a file, a socket or a thread. The system's clock is read by [`Timestamp::now`], and
//! by [`AmiBuilder::build`] and [`AccountImages`] where no time is given; its random numbers by `random` of
//! the ids.
//! The rest depends on its arguments alone.
//!
//! An [`Error`] has a [`kind`](Error::kind) to match on and EC2's [`code`](Error::code). Text that does not
//! parse has small errors of its own, such as [`MalformedId`], that convert into it.
//!
//! # Trust
//!
//! Nothing that is read is trusted: [`Manifest::from_json`] and the serde implementations check
//! everything that the builder checks, and derive digests and ids anew. A deserializer bounds the length
//! and the depth of its input itself; `from_json` does so too.
//!
//! # Left out
//!
//! Content: a manifest names snapshots, kernels and initial RAM disks by digest, and `storage-block`
//! holds them. Launching: `instance-core` does that. Of EC2's attributes of images: paravirtual
//! images, ENA, SR-IOV and UEFI settings, IOPS and throughput of volumes, and protection against
//! deregistration.

mod access;
mod account;
mod ami;
mod arch;
mod attribute;
mod boot;
mod builder;
mod catalog;
mod declared;
mod describe;
mod device;
mod digest;
mod error;
mod filter;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod image;
mod manifest;
mod page;
mod pattern;
mod region;
mod resource;
mod software;
mod tags;
pub mod testing;
mod time;

pub use access::{Action, check_terms, may_export};
pub use account::AccountImages;
pub use ami::{Ami, AnyAmi, ArchitectureMismatch};
pub use arch::{AnyArch, Arch, Architecture, Arm64, UnknownArchitecture, X86, X86_64};
pub use attribute::{Grantee, ModifyImageAttribute};
pub use boot::{Boot, BootMode, BootSource, TpmSupport};
pub use builder::AmiBuilder;
pub use catalog::{Catalog, CatalogExt, MemoryCatalog};
pub use declared::{DeclarationMismatch, DeclaredAmi, Difference};
pub use describe::{DescribeImages, ExecutableUser, Owner};
pub use device::{
    BlockDeviceKind, BlockDeviceMapping, DeviceName, Ebs, RootDeviceType, StoreRoot, VolumeType,
};
pub use digest::{Digest, DigestWriter, MalformedDigest};
pub use error::{Error, ErrorKind};
pub use filter::{Filter, Query};
pub use id::*;
pub use image::{
    Category, Image, ImageState, ImdsSupport, LaunchPermissions, OwnerAlias, ProductCode, ProductCodeKind,
    SourceImage, StateReason,
};
pub use manifest::{Manifest, VirtualizationType};
pub use page::{Page, PageRequest};
pub use pattern::Pattern;
pub use region::{AccountId, RegionName};
pub use resource::{ResourceId, ResourceType};
pub use software::{OperatingSystem, OsFamily, Software};
pub use tags::Tags;
pub use time::Timestamp;

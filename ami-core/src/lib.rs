//! Amazon Machine Images as classes.

mod ami;
mod arch;
mod boot;
mod builder;
mod catalog;
mod device;
mod digest;
mod error;
mod filter;
mod id;
mod image;
mod manifest;
mod region;
mod software;
mod tags;
pub mod testing;
mod time;

pub use ami::{Ami, AnyAmi, ArchitectureMismatch};
pub use arch::{AnyArch, Arch, Architecture, Arm64, UnknownArchitecture, X86, X86_64};
pub use boot::{Boot, BootMode, BootSource};
pub use builder::AmiBuilder;
pub use catalog::{Catalog, CatalogExt, MemoryCatalog};
pub use device::{BlockDeviceKind, BlockDeviceMapping, DeviceName, Ebs, VolumeType};
pub use digest::{Digest, DigestWriter, MalformedDigest};
pub use error::{Error, ErrorKind};
pub use filter::{Filter, Query};
pub use id::*;
pub use image::{Category, Image, ImageState, LaunchPermissions, OwnerAlias, ProductCode, ProductCodeKind};
pub use manifest::{Manifest, VirtualizationType};
pub use region::{AccountId, RegionName};
pub use software::{OperatingSystem, OsFamily, Software};
pub use tags::Tags;
pub use time::Timestamp;

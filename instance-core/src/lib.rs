//! Instances as live objects of machine images.

mod boot_cache;
pub mod console;
mod database;
mod error;
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

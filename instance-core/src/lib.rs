//! Instances as live objects of machine images.

pub mod console;
mod error;
mod instance_type;
pub mod machine;
pub mod shell;
mod state;
pub mod testing;
pub mod watch;

pub use error::{Error, ErrorKind, Result};
pub use instance_type::InstanceType;
pub use state::{InstanceState, Transition};

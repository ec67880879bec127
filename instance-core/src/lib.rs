//! Instances as live objects of machine images.

pub mod console;
pub mod machine;
mod state;
pub mod testing;
pub mod watch;

pub use state::{InstanceState, Transition};

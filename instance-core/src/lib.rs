//! Instances as live objects of machine images.

pub mod console;
pub mod machine;
pub mod watch;

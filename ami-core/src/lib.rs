//! Amazon Machine Images as classes.

mod arch;
mod id;

pub use arch::{AnyArch, Arch, Architecture, Arm64, UnknownArchitecture, X86, X86_64};
pub use id::*;

//! Where things are: the workspace, its target directory, the guest artifacts.

use std::env;
use std::path::{Path, PathBuf};

/// The workspace's root directory.
pub(crate) fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// A directory of ours under `target/`.
pub(crate) fn target(name: &str) -> PathBuf {
    root().join("target").join(name)
}

/// The directory of the guest artifacts: `$AMI_GUEST_DIR`, or else `target/guest`.
pub(crate) fn guest_dir() -> PathBuf {
    match env::var_os("AMI_GUEST_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => target("guest"),
    }
}

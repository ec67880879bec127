//! What serves the disks of machines.

use storage_block::Engine;

/// What serves a disk of a machine's: [`Machine::disk_engines`](super::Machine::disk_engines).
///
/// ```
/// use instance_core::machine::DiskEngine;
/// use storage_block::Engine;
///
/// /// The disks that could be faster where the host allowed io_uring.
/// fn served_by_threads(engines: &[DiskEngine]) -> Vec<&str> {
///     let slow = engines.iter().filter(|disk| disk.engine == Some(Engine::Threads));
///     slow.map(|disk| disk.serial.as_str()).collect()
/// }
/// let engines = [DiskEngine::new("root", Some(Engine::Threads)), DiskEngine::new("data", None)];
/// assert_eq!(served_by_threads(&engines), ["root"]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskEngine {
    /// The disk's serial number, by which its guest knows it.
    pub serial: String,
    /// What serves its requests. None before the guest first uses the disk: it is chosen then, and not again.
    pub engine: Option<Engine>,
}

impl DiskEngine {
    /// That the disk with this serial number is served so.
    pub fn new(serial: impl Into<String>, engine: Option<Engine>) -> Self {
        Self { serial: serial.into(), engine }
    }
}

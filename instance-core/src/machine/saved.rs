//! Machines that were saved, and what they are made from again.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{DiskSpec, NetSpec};
use crate::console::ConsolePort;
use crate::vsock::VsockSpec;

/// A machine as it was when [`Machine::save`](super::Machine::save) wrote it: an open file that is never
/// changed. Cheap to clone; any number of machines may be made from one, also at the same time.
///
/// Only hypervisors of the kind that wrote it can read it. What it holds is checked when it is
/// [restored](super::Hypervisor::restore).
///
/// ```
/// use instance_core::machine::SavedMachine;
///
/// let saved = SavedMachine::new(tempfile::tempfile()?)?;
/// assert_eq!(saved.len(), 0); // which no hypervisor takes for one
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SavedMachine(Arc<File>, u64);

impl SavedMachine {
    /// The file as it is now; whoever hands it over promises that it neither changes nor becomes shorter while
    /// machines made from it are there, which may read their memory from it at any time.
    ///
    /// # Errors
    ///
    /// What the operating system says of its length.
    pub fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self(Arc::new(file), len))
    }

    /// The length of the file in bytes. It may have holes, for memory that is zero.
    pub fn len(&self) -> u64 {
        self.1
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.1 == 0
    }

    /// The open file. Its position means nothing: read with an offset.
    pub fn file(&self) -> &Arc<File> {
        &self.0
    }
}

/// What a machine is made from that goes on where a [`SavedMachine`] was saved. Processors, memory and all that
/// the guest knows of its hardware are in there; what lies outside of the machine is given anew.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
/// use instance_core::machine::{Boot, Hypervisor, MachineSpec, RestoreSpec, SavedMachine};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
///
/// let (hypervisor, console) = (FakeHypervisor::new(), Console::new());
/// let boot = Boot::new(fake_kernel("")?, None, "");
/// let spec = MachineSpec::new("first", ami_core::Architecture::X86_64, boot, console.port());
/// let first = hypervisor.create(spec)?;
/// first.start()?;
/// console.reader().wait_for("GUEST READY", Instant::now() + Duration::from_secs(10))?;
/// first.pause()?;
/// let file = tempfile::tempfile()?;
/// first.save(&file)?;
///
/// let saved = SavedMachine::new(file)?;
/// for name in ["second", "third"] {
///     let restored = hypervisor.restore(RestoreSpec::new(name, saved.clone(), Console::new().port()))?;
///     restored.resume()?; // a guest that is up, and has not booted
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RestoreSpec {
    /// A name for threads, logs and errors, such as the instance id.
    pub name: String,
    /// What was saved.
    pub saved: SavedMachine,
    /// The disks, in the order in which the machine had them, with the same serial numbers and sizes. Their bytes
    /// must be those of the moment at which it was saved: a guest keeps in mind what it has read and written.
    pub disks: Vec<DiskSpec>,
    /// The network ports, in the order in which the machine had them, with the same addresses and MTUs.
    pub nets: Vec<NetSpec>,
    /// The place for streams, if the machine had one. The guest is told that its streams are no more.
    pub vsock: Option<VsockSpec>,
    /// The machine's side of its serial console.
    pub console: ConsolePort,
    /// The machine's side of its virtio console, if the machine had one. The guest is told the terminal's size.
    pub virtio_console: Option<ConsolePort>,
    /// As [`MachineSpec::runtime_dir`](super::MachineSpec::runtime_dir).
    pub runtime_dir: PathBuf,
}

impl RestoreSpec {
    /// A machine without disks, network ports and streams, with the temporary directory as its runtime directory.
    pub fn new(name: impl Into<String>, saved: SavedMachine, console: ConsolePort) -> Self {
        Self {
            name: name.into(),
            saved,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console,
            virtio_console: None,
            runtime_dir: std::env::temp_dir(),
        }
    }
}

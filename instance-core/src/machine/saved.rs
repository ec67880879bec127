//! Machines that were saved, and what they are made from again.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;

use super::{DiskSpec, NetSpec, OpenFile};
use crate::console::ConsolePort;
use crate::net::MacAddress;
use crate::vsock::VsockSpec;

/// A machine as it was when [`Machine::save`](super::Machine::save) wrote it: an [`OpenFile`]. It may have holes, for
/// memory that is zero. Cheap to clone; any number of machines may be made from one, also at the same time.
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
pub struct SavedMachine(OpenFile);

impl SavedMachine {
    /// The file as it is now; whoever hands it over promises that it neither changes nor becomes shorter while
    /// machines made from it are there, which may read their memory from it at any time.
    ///
    /// # Errors
    ///
    /// What the operating system says of its length.
    pub fn new(file: File) -> io::Result<Self> {
        OpenFile::new(file).map(Self)
    }
}

impl Deref for SavedMachine {
    type Target = OpenFile;

    fn deref(&self) -> &OpenFile {
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
    /// The disks that the machine had, with the same serial numbers, by which it knows them, and sizes; one that had grown
    /// by then, of which the machine was not told yet, may be larger where the hypervisor takes that. Their bytes
    /// must be those of the moment at which it was saved: a guest keeps in mind what it has read and written.
    pub disks: Vec<DiskSpec>,
    /// The network ports that the machine had, with the same addresses, by which it knows them, and MTUs.
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

/// Brings what is called so to the front, in this order, up to the first that is missing.
fn order<T, N>(all: &mut [T], names: impl IntoIterator<Item = N>, is: impl Fn(&T, &N) -> bool) {
    for (place, name) in names.into_iter().enumerate() {
        match all.iter().skip(place).position(|one| is(one, &name)) {
            Some(further) => all[place..=place + further].rotate_right(1),
            None => return,
        }
    }
}

impl RestoreSpec {
    /// Brings the disks into the order of these serial numbers, in which the machine had them; what is not among them
    /// comes last. Every hypervisor begins [`Hypervisor::restore`](super::Hypervisor::restore) with it.
    pub fn order_disks<'s>(&mut self, serials: impl IntoIterator<Item = &'s str>) {
        order(&mut self.disks, serials, |disk, serial| disk.serial == *serial);
    }

    /// The same of the network ports and their addresses.
    pub fn order_nets(&mut self, macs: impl IntoIterator<Item = MacAddress>) {
        order(&mut self.nets, macs, |net, mac| net.mac == *mac);
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_name_comes_in_the_order_of_the_names() {
        for (given, names, expected) in [
            ("abc", "cab", "cab"),
            ("abc", "b", "bac"),
            ("abc", "cxa", "cab"),
            ("aab", "baa", "baa"),
            ("", "ab", ""),
        ] {
            let mut all: Vec<char> = given.chars().collect();
            order(&mut all, names.chars(), |one, name| one == name);
            assert_eq!(all.iter().collect::<String>(), expected, "{given} by {names}");
        }
    }
}

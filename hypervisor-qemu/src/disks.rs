//! A machine's disks, each served over NBD to a connection that the child has.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use instance_core::machine::{DiskSpec, MachineError, MachineErrorKind};
use storage_block::Disk;
use storage_block::nbd::Server;

use crate::child::Inherited;

/// How many disks fit on the bridge behind which disks come and go, from address 1 on.
pub(crate) const SLOTS: usize = 30;

/// The disks that the machine has, or is about to have. Serves them until it is closed.
#[derive(Debug)]
pub(crate) struct Disks {
    runtime_dir: PathBuf,
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    /// The number of the next disk: none is used twice.
    next: usize,
    closed: bool,
}

/// A disk's device in QEMU.
#[derive(Debug)]
struct Entry {
    name: Name,
    serial: String,
    /// `None` when the machine has lost it, and QEMU's device is what is left.
    served: Option<Served>,
    /// The guest has been asked to let go.
    asked: bool,
}

#[derive(Debug)]
struct Served {
    disk: Disk,
    _server: Server,
}

/// What a disk is called in QEMU, and where its device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    number: usize,
    /// The address on the bridge; `None` for the first disk of the specification, which is not behind it.
    pub(crate) slot: Option<usize>,
    /// How often it has grown: each time, QEMU gets a connection of the new size.
    grown: usize,
}

impl Name {
    /// The device, and the node that it uses.
    pub(crate) fn device(self) -> String {
        format!("disk{}", self.number)
    }

    /// The node of the connection.
    pub(crate) fn connection(self) -> String {
        format!("disk{}-{}", self.number, self.grown)
    }
}

/// What is known of the disk that is to be detached or grown.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: Name,
    pub(crate) disk: Disk,
    /// Whether the guest has been asked before to let go.
    pub(crate) asked: bool,
}

impl Disks {
    /// Serves `disks`, and connects to each.
    ///
    /// The sockets lie in directories of their own in `runtime_dir`, which are gone again when this
    /// returns: a machine that runs leaves nothing behind, however its process ends.
    pub(crate) fn serve(
        disks: &[DiskSpec],
        runtime_dir: &Path,
    ) -> Result<(Self, Vec<(Name, Inherited)>), MachineError> {
        let (mut table, mut connections) = (Table::default(), Vec::new());
        for (number, disk) in disks.iter().enumerate() {
            let name = Name { number, slot: (number > 0).then_some(number), grown: 0 };
            let (server, connection) = connect(&disk.disk, runtime_dir)?;
            table.entries.push(Entry {
                name,
                serial: disk.serial.clone(),
                served: Some(Served { disk: disk.disk.clone(), _server: server }),
                asked: false,
            });
            connections.push((name, Inherited::new(connection).map_err(|e| failed(runtime_dir, e))?));
        }
        table.next = disks.len();
        let runtime_dir = runtime_dir.to_owned();
        Ok((Self { runtime_dir, table: Mutex::new(table), changed: Condvar::new() }, connections))
    }

    /// Serves one more disk, and connects to it.
    pub(crate) fn add(&self, disk: &DiskSpec) -> Result<(Name, UnixStream), MachineError> {
        let mut table = self.table();
        table.check_open("attach a disk to")?;
        if table.find(&disk.serial).is_ok() {
            return Err(MachineError::disk_exists(&disk.serial));
        }
        // The first of the specification takes none, but counts.
        let taken = table.entries.len();
        let free = |slot: &usize| table.entries.iter().all(|entry| entry.name.slot != Some(*slot));
        let Some(slot) = (1..=SLOTS).find(free).filter(|_| taken < SLOTS) else {
            let what = format!("QEMU's machines have at most {SLOTS} disks");
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        };
        let (server, connection) = connect(&disk.disk, &self.runtime_dir)?;
        let name = Name { number: table.next, slot: Some(slot), grown: 0 };
        table.next += 1;
        table.entries.push(Entry {
            name,
            serial: disk.serial.clone(),
            served: Some(Served { disk: disk.disk.clone(), _server: server }),
            asked: false,
        });
        Ok((name, connection))
    }

    /// The disk with this serial number. What is then done with it, one thread does at a time.
    pub(crate) fn find(&self, serial: &str) -> Result<Found, MachineError> {
        let mut table = self.table();
        table.check_open("change a disk of")?;
        let entry = table.find(serial)?;
        let Some(served) = &entry.served else { return Err(MachineError::no_such_disk(serial)) };
        Ok(Found { name: entry.name, disk: served.disk.clone(), asked: entry.asked })
    }

    /// Notes that the guest has been asked to let go of a disk.
    pub(crate) fn asked(&self, name: Name) {
        self.table().with(&name.device(), |entry| entry.asked = true);
    }

    /// Connects anew to a disk, whose connection has the size of then. [`switch`](Self::switch) keeps it.
    pub(crate) fn connect_again(&self, found: &Found) -> Result<(Name, Server, UnixStream), MachineError> {
        let (server, connection) = connect(&found.disk, &self.runtime_dir)?;
        Ok((Name { grown: found.name.grown + 1, ..found.name }, server, connection))
    }

    /// QEMU uses this connection now, and no longer the one before.
    pub(crate) fn switch(&self, name: Name, disk: Disk, server: Server) {
        let mut before = None;
        self.table().with(&name.device(), |entry| {
            if entry.served.is_some() {
                before = entry.served.replace(Served { disk, _server: server });
                entry.name = name;
            }
        });
    }

    /// Serves a disk no longer. When it returns, no request is under way any more, nor will one come.
    pub(crate) fn sever(&self, name: Name) {
        let served = self.table().with(&name.device(), |entry| entry.served.take()).flatten();
        // Not under the lock, since it waits for requests.
        drop(served);
        self.changed.notify_all();
    }

    /// QEMU's device is gone, and with it the disk, which was called so.
    pub(crate) fn gone(&self, device: &str) -> Option<Name> {
        let name = self.table().with(device, |entry| entry.name)?;
        self.sever(name);
        self.table().entries.retain(|entry| entry.name.device() != device);
        self.changed.notify_all();
        Some(name)
    }

    /// Waits until a disk is served no longer. False if it still is.
    pub(crate) fn wait_until_gone(&self, name: Name, until: Instant) -> Result<bool, MachineError> {
        let mut table = self.table();
        loop {
            if !table.entries.iter().any(|entry| entry.name.number == name.number) {
                return table.check_open("detach a disk from").map(|()| true);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Serves nothing any more, from now on. Returns when no request is under way any more.
    pub(crate) fn close(&self) {
        let mut table = self.table();
        table.closed = true;
        let entries = std::mem::take(&mut table.entries);
        drop(table);
        drop(entries);
        self.changed.notify_all();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn check_open(&self, action: &str) -> Result<(), MachineError> {
        match self.closed {
            true => Err(MachineError::new(
                MachineErrorKind::WrongState,
                format!("cannot {action} a machine that has ended"),
            )),
            false => Ok(()),
        }
    }

    fn find(&mut self, serial: &str) -> Result<&mut Entry, MachineError> {
        let wanted = |entry: &&mut Entry| entry.served.is_some() && entry.serial == serial;
        self.entries.iter_mut().find(wanted).ok_or_else(|| MachineError::no_such_disk(serial))
    }

    fn with<R>(&mut self, device: &str, act: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        self.entries.iter_mut().find(|entry| entry.name.device() == device).map(act)
    }
}

/// Serves a disk to one connection.
fn connect(disk: &Disk, runtime_dir: &Path) -> Result<(Server, UnixStream), MachineError> {
    let dir = std::fs::create_dir_all(runtime_dir)
        .and_then(|()| tempfile::Builder::new().prefix("qemu-").tempdir_in(runtime_dir));
    let dir = dir.map_err(|e| failed(runtime_dir, e))?;
    let server = Server::bind(dir.path().join("disk"), disk.clone()).map_err(|source| {
        MachineError::new(MachineErrorKind::Host, "cannot serve a disk over NBD").with_source(source)
    })?;
    // A socket's address has room for 108 bytes; this names it however deep it lies.
    let handle = File::open(dir.path()).map_err(|e| failed(runtime_dir, e))?;
    let short = format!("/proc/self/fd/{}/disk", handle.as_raw_fd());
    let connection = UnixStream::connect(short).map_err(|e| failed(runtime_dir, e))?;
    Ok((server, connection))
}

fn failed(runtime_dir: &Path, source: std::io::Error) -> MachineError {
    let what = format!("cannot connect a disk in {}", runtime_dir.display());
    MachineError::new(MachineErrorKind::Host, what).with_source(source)
}

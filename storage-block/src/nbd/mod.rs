//! A server of the network block device protocol on a Unix socket.
//!
//! It speaks the fixed newstyle handshake and simple replies, and offers one export, with the empty
//! name: reads, writes, flushes, trims and zeroes, force unit access, and several connections at once. Structured
//! replies, block status and encryption are left out. Whoever may open the socket may use the disk; it is
//! made for its owner alone.
//!
//! Clients are not trusted: nothing is reserved on their word beyond 32 MiB for each of four
//! requests of a connection, there are at most [`MAX_CONNECTIONS`], and whoever breaks the protocol is hung up on.

mod connection;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod proto;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::Shutdown;

use self::connection::Connection;
use crate::store::{lock, write};
use crate::{Disk, Error, ErrorKind, Result};

/// Connections served at the same time; further ones are closed at once.
///
/// ```
/// use storage_block::nbd::MAX_CONNECTIONS;
///
/// let memory = MAX_CONNECTIONS * 4 * (32 << 20);
/// assert_eq!(memory, 4 << 30, "the most that all clients of a server can have it reserve");
/// ```
pub const MAX_CONNECTIONS: usize = 32;

/// Serves a disk until it is dropped, which ends its threads, closes its connections and removes the
/// socket.
///
/// ```
/// use storage_block::{MemoryDisk, nbd};
///
/// # let dir = tempfile::tempdir()?;
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let server = nbd::Server::bind(dir.path().join("disk.sock"), disk)?;
/// // nbdinfo nbd+unix:///?socket=…/disk.sock
/// let socket = server.path().to_owned();
/// drop(server);
/// assert!(!socket.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// The device and inode of the socket: another of the same name is not ours to remove.
    socket: (u64, u64),
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    gate: RwLock<()>,
    stopping: AtomicBool,
    streams: Mutex<HashMap<u64, Arc<UnixStream>>>,
}

/// Holds requests off the disk; see [`Server::quiesce`], which shows it in use.
#[derive(Debug)]
#[must_use = "requests go on when it is dropped"]
pub struct Quiesced<'s> {
    _gate: RwLockWriteGuard<'s, ()>,
}

impl Server {
    /// Listens on a new socket at `path`, which may be longer than the 107 bytes that sockets are
    /// otherwise limited to; a client then has to get at it in a way of its own. A socket that nobody listens
    /// on is taken over.
    ///
    /// # Errors
    ///
    /// [`InUse`](ErrorKind::InUse) if somebody listens there, or something else is in the way.
    pub fn bind(path: impl AsRef<Path>, disk: Disk) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let failed = |e: io::Error| Error::io(e, format!("cannot listen on {}", path.display()));
        let listener = match listen(&path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                if !stale(&path) {
                    return Err(Error::new(ErrorKind::InUse, format!("{} is in use", path.display())));
                }
                std::fs::remove_file(&path).and_then(|()| listen(&path)).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
        let metadata = std::fs::symlink_metadata(&path).map_err(failed)?;
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            disk,
            gate: RwLock::default(),
            stopping: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let accept = {
            let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
            move || accept(&shared, &listener)
        };
        let accepting =
            std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(accept).map_err(failed)?;
        let socket = (metadata.dev(), metadata.ino());
        Ok(Self { path, socket, shared, listener, accepting: Some(accepting) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until no request is at the disk and keeps others from it until the guard is dropped: they
    /// are received and wait. It is how a hypervisor gets an instant at which the disk stands still. Replies to
    /// requests that have ended may still be on their way.
    ///
    /// ```
    /// # use storage_block::{MemoryDisk, nbd};
    /// # let dir = tempfile::tempdir()?;
    /// # let disk = MemoryDisk::new(1 << 20)?.into_disk();
    /// # let server = nbd::Server::bind(dir.path().join("disk.sock"), disk.clone())?;
    /// let still = server.quiesce();
    /// disk.flush()?; // no client's request comes between
    /// drop(still);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn quiesce(&self) -> Quiesced<'_> {
        Quiesced { _gate: write(&self.shared.gate) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Wakes the thread that accepts, which shuts the connections and waits for theirs.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            accepting.thread().unpark();
            let _ = accepting.join();
        }
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.socket);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    for number in 0.. {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            break;
        }
        threads.retain(|thread| !thread.is_finished());
        let stream = match accepted {
            Ok((stream, _)) => Arc::new(stream),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
            // Descriptors or memory are short on the host, and may be there again in a moment; the
            // connections that there are go on.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection over NBD");
                std::thread::park_timeout(Duration::from_millis(200));
                continue;
            }
        };
        if threads.len() >= MAX_CONNECTIONS {
            tracing::warn!("a connection over NBD is one too many");
            continue;
        }
        lock(&shared.streams).insert(number, Arc::clone(&stream));
        let serve = {
            let shared = Arc::clone(shared);
            move || {
                let _leave = Leave { shared: &shared, number };
                let client = Connection { disk: &shared.disk, stream: &stream, gate: &shared.gate };
                if let Err(error) = client.serve() {
                    tracing::debug!(%error, "a connection over NBD has ended early");
                }
                let _ = rustix::net::shutdown(&*stream, Shutdown::Both);
            }
        };
        match std::thread::Builder::new().name("nbd-connection".to_owned()).spawn(serve) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                tracing::warn!(%error, "cannot serve a connection over NBD");
                lock(&shared.streams).remove(&number);
            }
        }
    }
    for stream in lock(&shared.streams).values() {
        let _ = rustix::net::shutdown(&**stream, Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Takes a connection off the list, however its thread ends.
struct Leave<'s> {
    shared: &'s Shared,
    number: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if let Some(stream) = lock(&self.shared.streams).remove(&self.number) {
            let _ = rustix::net::shutdown(&*stream, Shutdown::Both);
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    with_short(path, |path| UnixListener::bind(path))
}

/// Whether it is a socket that nobody listens on, as a process that died leaves behind.
fn stale(path: &Path) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    socket && with_short(path, |path| UnixStream::connect(path)).is_err_and(refused)
}

/// Names a socket in a way that fits into its address, through its directory where the path is too
/// long.
fn with_short<T>(path: &Path, then: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    const LONGEST: usize = 107;
    if path.as_os_str().as_bytes().len() <= LONGEST {
        return then(path);
    }
    let dir = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    then(&PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}

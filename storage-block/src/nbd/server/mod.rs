//! The server: where it listens, what it offers, and its end.

mod accept;
mod answer;
pub(super) mod connection;
pub(super) mod exports;
mod input;
pub(super) mod negotiation;
mod replies;

use std::collections::HashMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use self::exports::Exports;
use super::Address;
use super::address::{stale, tune_tcp, tune_unix, with_short};
use crate::limit::Stop;
use crate::{Disk, Error, ErrorKind, Result};

/// Connections served at the same time, unless a server is [told another number](ServerBuilder::max_connections); further ones
/// are closed at once.
///
/// ```
/// use storage_block::nbd::MAX_CONNECTIONS;
///
/// let payload = MAX_CONNECTIONS * 4 * (32 << 20);
/// assert_eq!(payload, 4 << 30, "the most that all clients of a server can have it hold for them");
/// ```
pub const MAX_CONNECTIONS: usize = 32;

/// A client that is not through the handshake by then is cut off.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A client that takes nothing for so long of what it has asked for is cut off.
const SENDING: Duration = Duration::from_secs(60);

/// Serves disks until it is dropped, which ends its threads, closes its connections and removes its
/// socket.
///
/// ```
/// use storage_block::{MemoryDisk, nbd};
///
/// # let dir = tempfile::tempdir()?;
/// let socket = dir.path().join("disk.sock");
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let server = nbd::Server::bind(&socket, disk)?;
/// // nbdinfo "nbd+unix:///?socket=…/disk.sock"
/// drop(server);
/// assert!(!socket.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    address: Address,
    /// The device and inode of the socket: another of the same name is not ours to remove.
    socket: Option<(u64, u64)>,
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    exports: Exports,
    stopping: Arc<Stop>,
    /// The sockets of the connections.
    sockets: Mutex<HashMap<u64, Arc<OwnedFd>>>,
    handshake: Duration,
    max_connections: usize,
    #[cfg(feature = "tls")]
    tls: Option<super::TlsServer>,
}

/// A server in the making; see [`Server::builder`], which shows it in use.
#[derive(Debug)]
pub struct ServerBuilder {
    exports: Vec<(String, Disk)>,
    handshake: Duration,
    max_connections: usize,
    #[cfg(feature = "tls")]
    tls: Option<super::TlsServer>,
}

impl ServerBuilder {
    /// Offers a disk by a name. The empty name is what clients get that name none.
    pub fn export(mut self, name: impl Into<String>, disk: Disk) -> Self {
        self.exports.push((name.into(), disk));
        self
    }

    /// A client that has not chosen an export so long after it connected is cut off; ten seconds if not said.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake = timeout;
        self
    }

    /// Serves so many connections at the same time; [`MAX_CONNECTIONS`] if not said. A client that asks for nothing keeps its
    /// place for as long as its host is there; one that takes nothing for a minute of what it has asked for loses it, and so
    /// does, over TCP, within two minutes one whose host is gone.
    ///
    /// ```
    /// use storage_block::nbd;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let server = nbd::Server::builder().max_connections(256).bind(dir.path().join("disks.sock"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn max_connections(mut self, most: usize) -> Self {
        self.max_connections = most;
        self
    }

    /// Talks to clients encrypted, and to no others.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: super::TlsServer) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Listens at an address. A Unix socket is made, for its owner alone; one that nobody listens on is taken
    /// over. Port 0 is any that is free.
    ///
    /// # Errors
    ///
    /// [`InUse`](ErrorKind::InUse) if somebody listens there, or something else is in the way;
    /// [`Untrusted`](ErrorKind::Untrusted) if it is a port that other hosts could reach, without TLS;
    /// [`AlreadyExists`](ErrorKind::AlreadyExists) if two exports have the same name, and
    /// [`InvalidSize`](ErrorKind::InvalidSize) if one's is longer than 4096 bytes.
    pub fn bind(self, address: impl Into<Address>) -> Result<Server> {
        let address = address.into();
        let encrypted = self.encrypted();
        let exports = Exports::default();
        for (name, disk) in self.exports {
            exports.add(&name, disk)?;
        }
        let failed = |e: io::Error| Error::io(e, format!("cannot listen on {address}"));
        let (listener, bound, socket) = match &address {
            Address::Unix(path) => {
                let listener = Listener::Unix(listen_unix(path)?);
                let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
                (listener, address.clone(), Some((metadata.dev(), metadata.ino())))
            }
            Address::Tcp(port) if !port.ip().is_loopback() && !encrypted => {
                let what = format!("{port} can be reached by other hosts, and there is no TLS");
                return Err(Error::new(ErrorKind::Untrusted, what));
            }
            Address::Tcp(port) => {
                let listener = TcpListener::bind(port).map_err(|e| match e.kind() {
                    io::ErrorKind::AddrInUse => in_use(&address),
                    _ => failed(e),
                })?;
                let port = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), Address::Tcp(port), None)
            }
        };
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            exports,
            stopping: Arc::default(),
            sockets: Mutex::default(),
            handshake: self.handshake,
            max_connections: self.max_connections,
            #[cfg(feature = "tls")]
            tls: self.tls,
        });
        // From here on its end removes the socket.
        let mut server = Server { address: bound, socket, shared, listener, accepting: None };
        let accept = {
            let (shared, listener) = (Arc::clone(&server.shared), Arc::clone(&server.listener));
            move || accept::accept(&shared, &listener)
        };
        let spawned = std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(accept);
        server.accepting = Some(spawned.map_err(failed)?);
        Ok(server)
    }

    #[cfg(feature = "tls")]
    fn encrypted(&self) -> bool {
        self.tls.is_some()
    }

    #[cfg(not(feature = "tls"))]
    fn encrypted(&self) -> bool {
        false
    }
}

impl Server {
    /// Serves one disk, with the empty name, on a Unix socket.
    ///
    /// # Errors
    ///
    /// As [`ServerBuilder::bind`].
    pub fn bind(path: impl AsRef<Path>, disk: Disk) -> Result<Self> {
        Self::builder().export("", disk).bind(path.as_ref())
    }

    /// A server of several disks, or on a port.
    ///
    /// ```
    /// use std::net::SocketAddr;
    /// use std::time::Duration;
    /// use storage_block::{MemoryDisk, nbd};
    ///
    /// let disk = || Ok::<_, storage_block::Error>(MemoryDisk::new(1 << 20)?.into_disk());
    /// let server = nbd::Server::builder()
    ///     .export("vol-1", disk()?)
    ///     .export("snap-1", disk()?.clone())
    ///     .handshake_timeout(Duration::from_secs(2))
    ///     .bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    /// let uri = server.address().uri("vol-1"); // nbd://127.0.0.1:…/vol-1
    /// server.add("vol-2", disk()?)?;
    /// server.remove("vol-1");
    ///
    /// let everywhere = nbd::Server::builder().bind(SocketAddr::from(([0; 4], 0)));
    /// assert_eq!(everywhere.err().map(|e| e.kind()), Some(storage_block::ErrorKind::Untrusted));
    /// # Ok::<(), storage_block::Error>(())
    /// ```
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            exports: Vec::new(),
            handshake: HANDSHAKE,
            max_connections: MAX_CONNECTIONS,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Offers one more disk, to clients that ask from now on.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](ErrorKind::AlreadyExists) if there is an export of this name;
    /// [`InvalidSize`](ErrorKind::InvalidSize) if it is longer than 4096 bytes.
    pub fn add(&self, name: &str, disk: Disk) -> Result<()> {
        self.shared.exports.add(name, disk)
    }

    /// Offers a disk no longer, and gives it back if it was offered. Who has chosen it already keeps it.
    pub fn remove(&self, name: &str) -> Option<Disk> {
        self.shared.exports.remove(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.set();
        // Wakes the thread that accepts, which shuts the connections and waits for theirs.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            accepting.thread().unpark();
            let _ = accepting.join();
        }
        let (Address::Unix(path), Some(socket)) = (&self.address, self.socket) else { return };
        if std::fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == socket) {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(listener) => Ok(tune_unix(listener.accept()?.0.into())),
            Self::Tcp(listener) => tune_tcp(listener.accept()?.0),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn listen_unix(path: &PathBuf) -> Result<UnixListener> {
    let address = Address::Unix(path.clone());
    let failed = |e: io::Error| Error::io(e, format!("cannot listen on {address}"));
    let listen = || with_short(path, bind_unix);
    match listen() {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if !stale(path) {
                return Err(in_use(&address));
            }
            std::fs::remove_file(path).and_then(|()| listen()).map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// A listener at `path` that only its owner can connect to, from the moment its name is there: a socket hands its mode
/// on to its name.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let kind = SocketType::STREAM;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Connections that wait to be accepted, as many as the system lets wait.
const BACKLOG: i32 = 4096;

fn in_use(address: &Address) -> Error {
    Error::new(ErrorKind::InUse, format!("{address} is in use"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_socket_is_its_owners_from_its_first_moment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        // Nothing changes the mode of the name afterwards, so it is the one that it began with.
        let _listener = bind_unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

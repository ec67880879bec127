//! Where a server listens, and how one gets there.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Where a server listens: a socket in the file system, or a port.
///
/// ```
/// use std::path::Path;
/// use storage_block::nbd::Address;
///
/// let socket = Address::from(Path::new("/run/a disk.sock"));
/// assert_eq!(socket.uri("vol-1"), "nbd+unix:///vol-1?socket=/run/a%20disk.sock");
/// let port = Address::from(std::net::SocketAddr::from(([127, 0, 0, 1], 10809)));
/// assert_eq!(port.uri(""), "nbd://127.0.0.1:10809/");
/// assert_eq!((Address::from("/run/a disk.sock"), Address::from("127.0.0.1:10809")), (socket, port));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A Unix socket. Its path may be longer than the 107 bytes that sockets are otherwise limited to.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Address {
    /// An export of an unencrypted server at this address, as most NBD clients want it named.
    pub fn uri(&self, export: &str) -> String {
        let export = escape(export.as_bytes());
        match self {
            Self::Unix(path) => {
                format!("nbd+unix:///{export}?socket={}", escape(path.as_os_str().as_bytes()))
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    pub(super) fn connect(&self, timeout: Duration) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(path) => with_short(path, |path| connect_unix(path, timeout)),
            Self::Tcp(address) => tune_tcp(TcpStream::connect_timeout(address, timeout)?),
        }
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl From<&str> for Address {
    /// A port if it reads as one, such as `127.0.0.1:10809` or `[::1]:10809`, and else the path of a socket.
    fn from(address: &str) -> Self {
        address.parse().map_or_else(|_| Self::Unix(address.into()), Self::Tcp)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// With the time limit that the standard library has for TCP alone: a listener whose queue is full makes one
/// wait.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let stream =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&stream, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(tune_unix(stream))
}

/// A connected socket, made to take more at once: it says how often the two sides have to take turns over a large
/// piece.
pub(super) fn tune_unix(stream: OwnedFd) -> OwnedFd {
    // It is as right with less.
    let _ = sockopt::set_socket_send_buffer_size(&stream, 1 << 20);
    stream
}

/// A connected socket, made not to wait for more to send, and to notice within two minutes when the other side's host is
/// gone.
pub(super) fn tune_tcp(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    // The system's own would take hours.
    sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(&stream, 6)?;
    // It is not asked for a sign of life while it has still to take something.
    sockopt::set_tcp_user_timeout(&stream, 120_000)?;
    Ok(stream.into())
}

/// Whether nobody listens on it, though it is a socket, as a process that died leaves behind.
pub(super) fn stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    socket && with_short(path, |path| UnixStream::connect(path)).is_err_and(refused)
}

/// Names a socket in a way that fits into its address, through its directory where the path is too
/// long.
pub(super) fn with_short<T>(path: &Path, then: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    const LONGEST: usize = 107;
    if path.as_os_str().as_bytes().len() <= LONGEST {
        return then(path);
    }
    let dir = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    then(&PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}

fn escape(bytes: &[u8]) -> String {
    let mut escaped = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(byte) {
            escaped.push(char::from(*byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Who is gone without a word holds a place of the server's no longer than this.
    #[test]
    fn both_sides_notice_soon_that_the_other_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let client = address.connect(Duration::from_secs(10)).unwrap();
        let server = tune_tcp(listener.accept().unwrap().0).unwrap();
        for socket in [client, server] {
            assert!(sockopt::socket_keepalive(&socket).unwrap());
            let idle = sockopt::tcp_keepidle(&socket).unwrap();
            // Also where something is under way, when it is not asked.
            assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 120_000);
            let probes = sockopt::tcp_keepintvl(&socket).unwrap() * sockopt::tcp_keepcnt(&socket).unwrap();
            assert_eq!(idle + probes, Duration::from_secs(120));
        }
    }
}

//! The network block device protocol: a server that gives disks to other processes, and a client to which any
//! server's export is a disk.
//!
//! # What is served
//!
//! A [`Server`] offers any number of disks by name, on a Unix socket or on a TCP port, in the fixed newstyle handshake: list,
//! info with the block sizes, go, and the old way in by name alone. Clients read, write, flush, trim and zero, in
//! any order and over several connections at once. What one connection flushes or forces (FUA) is durable whichever wrote
//! it. Replies are structured where the client wants that: a hole of 32 KiB or more is then sent as one, and
//! `base:allocation` tells which parts are holes, as far as the disk knows. Zeroing makes holes, unless it is asked not to;
//! then zeroes are written, and a request that this be fast is refused. A read or write has 32 MiB at most; there are no
//! other limits on where requests begin and end.
//!
//! Not served: the oldstyle handshake, extended headers, resizing, caching hints, other metadata, and pre-shared keys. A
//! disk that grows while a client has it is as large as before to that client.
//!
//! # What a client does
//!
//! A [`Client`] is a backend like any other: what is said in [`BlockBackend`](crate::BlockBackend) holds, also on a server
//! that wants whole blocks, knows no structured replies or cannot zero. It asks for holes where the server tells of
//! them. A discard is a zeroing that may make holes, as a trim promises nothing of what is read
//! afterwards. It does not connect anew.
//!
//! # Trust
//!
//! Whoever may open a server's Unix socket may use its disks; it is made for its owner alone. A port can be used by
//! everybody on the host; one that others could reach is refused without TLS. With the crate's feature `tls` a server has a
//! certificate and then talks to nobody without TLS 1.3; with an authority for clients, to none without a certificate
//! from there. There are no weaker modes.
//!
//! Clients are not trusted with more than the disk: nothing is reserved on their word beyond 32 MiB for each of four
//! requests of a connection, there are at most [`MAX_CONNECTIONS`] or what the server is told, whoever is not through the handshake in ten seconds is
//! cut off, and so is whoever breaks the protocol. The errors they get are numbers alone. Servers are not trusted
//! either: one that sends what it was not asked for, or nothing, makes an error of every request, and never a panic
//! or a wait without end. That the bytes it sends are the right ones has to be believed.

mod address;
mod channel;
mod client;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "it is test code, outside of a test function")]
pub(crate) mod fuzzing;
mod proto;
mod server;
#[cfg(feature = "tls")]
mod tls;

pub use self::address::Address;
pub use self::client::{Client, ClientBuilder};
pub use self::server::{MAX_CONNECTIONS, Server, ServerBuilder};
#[cfg(feature = "tls")]
pub use self::tls::{TlsClient, TlsServer};

//! A server and a client of the network block device protocol.

mod address;
mod channel;
mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod proto;
mod server;
#[cfg(feature = "tls")]
mod tls;

pub use self::address::Address;
pub use self::client::{Client, ClientBuilder};
pub use self::server::{MAX_CONNECTIONS, Quiesced, Server, ServerBuilder};
#[cfg(feature = "tls")]
pub use self::tls::{TlsClient, TlsServer};

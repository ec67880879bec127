//! The protocol as a client speaks it, and the server without its socket, for the fuzz targets.

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

use super::proto::{self, REQUEST_LEN, Request};
use super::server::negotiation;
use super::server::{Connection, Exports};
use crate::Disk;

/// Serves a disk by the empty name and by `x`.
pub(crate) fn serve(disk: &Disk, stream: UnixStream) -> std::io::Result<()> {
    let exports = Exports::default();
    for name in ["", "x"] {
        exports.add(name, disk.clone()).unwrap();
    }
    Connection::new(&exports, Arc::new(stream.into()), &RwLock::default(), &AtomicBool::default()).serve()
}

/// A request as bytes.
pub(crate) fn encode(flags: u16, command: u16, handle: u64, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..4].copy_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&handle.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The shortest handshake: flags, and the empty export name.
pub(crate) fn export_name() -> Vec<u8> {
    let mut bytes = u32::from(proto::HANDSHAKE_FLAGS).to_be_bytes().to_vec();
    bytes.extend(proto::option(proto::OPT_EXPORT_NAME, &[]));
    bytes
}

/// What is read of a request is what stands in it; of an option's name, a part of the option.
pub(crate) fn request(bytes: &[u8]) {
    if let Some((name, asked)) = negotiation::asked_name(bytes) {
        assert_eq!(name.len() + 6 + 2 * asked.len(), bytes.len());
    }
    if let Some((name, queries)) = negotiation::queries(bytes) {
        let queries = queries.iter().map(|query| 4 + query.len()).sum::<usize>();
        assert_eq!(name.len() + 8 + queries, bytes.len());
    }
    let Some(head) = bytes.first_chunk::<REQUEST_LEN>() else { return };
    match Request::parse(head) {
        Some(request) => assert_eq!(request.encode(), *head),
        None => assert_ne!(head[..4], proto::REQUEST_MAGIC.to_be_bytes()),
    }
}

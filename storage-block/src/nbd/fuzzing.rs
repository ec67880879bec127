//! The protocol as a client speaks it, and the server without its socket, for the fuzz targets.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::RwLock;

use super::connection::Connection;
use super::proto::{self, REQUEST_LEN, Request};
use crate::Disk;

pub(crate) fn serve(disk: &Disk, stream: &UnixStream, gate: &RwLock<()>) -> io::Result<()> {
    Connection { disk, stream, gate }.serve()
}

/// A request as bytes.
pub(crate) fn encode(flags: u16, command: u16, handle: [u8; 8], offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&handle);
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The shortest handshake: flags, and the empty export name.
pub(crate) fn export_name() -> Vec<u8> {
    let mut bytes = u32::from(proto::HANDSHAKE_FLAGS).to_be_bytes().to_vec();
    bytes.extend(proto::OPTION_MAGIC.to_be_bytes());
    bytes.extend(proto::OPT_EXPORT_NAME.to_be_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// What is read of a request is what stands in it; of an option's name, a part of the option.
pub(crate) fn request(bytes: &[u8]) {
    if let Some(name) = proto::asked_name(bytes) {
        assert!(name.len() + 6 <= bytes.len());
    }
    let Some(head) = bytes.first_chunk::<REQUEST_LEN>() else { return };
    let magic = head[..4] == 0x2560_9513u32.to_be_bytes();
    let Some(request) = Request::parse(head) else {
        assert!(!magic);
        return;
    };
    let (flags, command) = ([head[4], head[5]].map(u16::from), [head[6], head[7]].map(u16::from));
    let (flags, command) = (flags[0] << 8 | flags[1], command[0] << 8 | command[1]);
    assert!(magic);
    assert_eq!(encode(flags, command, request.handle, request.offset, request.len), *head);
}

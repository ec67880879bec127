//! What passes between a guest and the host.

/// A packet of a stream between a guest's port and one of the host's (virtio 1.2, 5.10.6), without the addresses
/// of guest and host, which are the hypervisor's matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The port at the host.
    pub host_port: u32,
    /// The port at the guest.
    pub guest_port: u32,
    /// What it is for.
    pub op: Op,
    /// How many bytes its sender has room for.
    pub buf_alloc: u32,
    /// How many bytes its sender's reader has taken so far, modulo 2³².
    pub fwd_cnt: u32,
}

/// What a [`Packet`] is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// To connect.
    Request,
    /// The answer: connected.
    Response,
    /// The stream is no more, or never was.
    Reset,
    /// One side, or both, sends or receives no more.
    Shutdown {
        /// Its sender receives no more.
        receive: bool,
        /// Its sender sends no more.
        send: bool,
    },
    /// Bytes.
    Data(Vec<u8>),
    /// Only to tell the room.
    CreditUpdate,
    /// Asks to be told the room.
    CreditRequest,
}

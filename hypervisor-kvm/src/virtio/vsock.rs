//! The virtio socket device (virtio 1.2, 5.10): a queue of packets to the guest, one from it, one of events.
//!
//! Streams, their room and their bounds are the matter of the cable's other end; here are the headers, and who may
//! speak with whom.

use instance_core::vsock::{Op, Packet, VsockPort, VsockSpec};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::chain::{Chain, Malformed};
use super::device::Device;
use super::ring::Running;

/// The queue of packets to the guest.
pub(super) const RECEIVE: usize = 0;
/// The queue of packets from the guest.
pub(super) const TRANSMIT: usize = 1;
/// The queue of events to the guest.
pub(super) const EVENTS: usize = 2;

/// `struct virtio_vsock_hdr`, which stands before each packet.
const HEADER_LEN: usize = 44;
/// The most bytes of a guest's packet: more than any stream has room for.
const DATA_MAX: u32 = 1 << 20;
/// The only type there is: streams.
const STREAM: u16 = 1;
/// The event that all streams are no more.
const TRANSPORT_RESET: u32 = 0;
/// How many packets are moved before the driver and other queues have their turn.
const BATCH: usize = 64;

/// What packets are for.
mod op {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const RESPONSE: u16 = 2;
    pub(super) const RESET: u16 = 3;
    pub(super) const SHUTDOWN: u16 = 4;
    pub(super) const DATA: u16 = 5;
    pub(super) const CREDIT_UPDATE: u16 = 6;
    pub(super) const CREDIT_REQUEST: u16 = 7;
}

const SHUTDOWN_RECEIVE: u32 = 1 << 0;
const SHUTDOWN_SEND: u32 = 1 << 1;

/// A socket device.
#[derive(Debug)]
pub(crate) struct Vsock {
    /// None when the machine has ended.
    port: Option<VsockPort>,
    state: State,
}

/// What is the device's own to remember: plain, as that of others is, and yet not in saved machines. One that goes on has
/// another address and no streams, of which its guest is told, and so nothing of what was to be answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    cid: u32,
    /// The answer to a packet that no stream can have sent.
    refusal: Option<Header>,
    /// The guest is to be told that its streams are no more: it continues what was saved of another machine.
    transport_reset: bool,
    /// Of that it is told before any packet comes to it, if its driver has a buffer for it: what comes is of streams that
    /// are new.
    events_first: bool,
}

impl Vsock {
    /// A device that is plugged in as `spec` says.
    pub(crate) fn new(spec: &VsockSpec) -> Self {
        let state = State { cid: spec.cid, refusal: None, transport_reset: false, events_first: false };
        Self { port: Some(spec.port.clone()), state }
    }

    /// Has the guest told that its streams are no more.
    pub(crate) fn break_streams(&mut self) {
        (self.state.transport_reset, self.state.events_first) = (true, true);
    }

    /// Moves packets to the driver. False if there is nothing to do before the next packet or buffer.
    fn receive(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        if std::mem::take(&mut self.state.events_first) {
            // The next time, when the other queues have had their turn.
            return Ok(true);
        }
        let Some(port) = self.port.clone() else { return Ok(false) };
        for _ in 0..BATCH {
            if self.state.refusal.is_none() && !port.has_next() {
                return Ok(false);
            }
            let Some(chain) = ring.next()? else { return Ok(false) };
            if chain.readable.len() > 0 {
                return Err(Malformed("a buffer for packets is not for writing"));
            }
            let Some(room) = chain.writable.len().checked_sub(HEADER_LEN as u64) else {
                return Err(Malformed("a buffer for packets is shorter than their header"));
            };
            let next = match self.state.refusal.take() {
                Some(refusal) => Some((refusal, Vec::new())),
                None => port.next(usize::try_from(room).unwrap_or(usize::MAX)).map(|p| self.header_of(p)),
            };
            let Some((header, data)) = next else {
                ring.put_back(1);
                return Ok(false);
            };
            chain.writable.write(ring.memory(), 0, &header.to_bytes())?;
            chain.writable.write(ring.memory(), HEADER_LEN as u64, &data)?;
            ring.put_used(&chain, (HEADER_LEN + data.len()) as u32)?;
        }
        Ok(true)
    }

    /// Moves packets from the driver to their streams. False if there was none, or none can be taken before the driver has
    /// taken answers. After some, the queue to the driver has its turn: they are answered there, and nobody else says so.
    fn transmit(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        let Some(port) = self.port.clone() else { return Ok(false) };
        for taken in 0..BATCH {
            if self.state.refusal.is_some() || !port.has_room() {
                return Ok(taken > 0);
            }
            let Some(chain) = ring.next()? else { return Ok(taken > 0) };
            self.take_packet(&port, &chain, ring)?;
            ring.put_used(&chain, 0)?;
        }
        Ok(true)
    }

    fn take_packet(&mut self, port: &VsockPort, chain: &Chain, ring: &Running<'_>) -> Result<(), Malformed> {
        if chain.writable.len() > 0 {
            return Err(Malformed("a packet's buffers are not for reading"));
        }
        let mut header = [0; HEADER_LEN];
        let read = chain.readable.read(ring.memory(), 0, &mut header);
        read.map_err(|_| Malformed("a packet has no header"))?;
        let header = Header::parse(&header);
        if header.len > DATA_MAX {
            return Err(Malformed("a packet is longer than any stream has room for"));
        }
        let mut data = vec![0; header.len as usize];
        let read = chain.readable.read(ring.memory(), HEADER_LEN as u64, &mut data);
        read.map_err(|_| Malformed("a packet is shorter than it says"))?;
        // What is not of this guest, or not for the host, is for nobody (5.10.6.2).
        if header.src_cid != u64::from(self.state.cid) || header.dst_cid != u64::from(VsockSpec::HOST_CID) {
            return Ok(());
        }
        match header.op(data) {
            Some(op) if header.kind == STREAM => port.deliver(header.packet(op)),
            // There are no other streams, and nothing else can be done with them: whoever has one has it no more.
            _ => {
                if header.kind == STREAM {
                    port.deliver(header.packet(Op::Reset));
                }
                self.state.refusal = (header.op != op::RESET).then(|| header.refusal());
            }
        }
        Ok(())
    }

    fn tell_events(&mut self, ring: &mut Running<'_>) -> Result<bool, Malformed> {
        if !self.state.transport_reset {
            return Ok(false);
        }
        let Some(chain) = ring.next()? else { return Ok(false) };
        if chain.readable.len() > 0 {
            return Err(Malformed("a buffer for events is not for writing"));
        }
        let event = TRANSPORT_RESET.to_le_bytes();
        let written = chain.writable.write(ring.memory(), 0, &event);
        written.map_err(|_| Malformed("a buffer for events is too short"))?;
        ring.put_used(&chain, event.len() as u32)?;
        self.state.transport_reset = false;
        Ok(true)
    }

    fn header_of(&self, packet: Packet) -> (Header, Vec<u8>) {
        let (op, flags, data) = match packet.op {
            Op::Request => (op::REQUEST, 0, Vec::new()),
            Op::Response => (op::RESPONSE, 0, Vec::new()),
            Op::Reset => (op::RESET, 0, Vec::new()),
            Op::Shutdown { receive, send } => {
                let receive = if receive { SHUTDOWN_RECEIVE } else { 0 };
                let send = if send { SHUTDOWN_SEND } else { 0 };
                (op::SHUTDOWN, receive | send, Vec::new())
            }
            Op::Data(data) => (op::DATA, 0, data),
            Op::CreditUpdate => (op::CREDIT_UPDATE, 0, Vec::new()),
            Op::CreditRequest => (op::CREDIT_REQUEST, 0, Vec::new()),
        };
        let header = Header {
            src_cid: VsockSpec::HOST_CID.into(),
            dst_cid: self.state.cid.into(),
            src_port: packet.host_port,
            dst_port: packet.guest_port,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: packet.buf_alloc,
            fwd_cnt: packet.fwd_cnt,
        };
        (header, data)
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    /// Streams are what there is without any.
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        3
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.state.cid).to_le_bytes();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, _features: u64) -> Result<bool, Malformed> {
        match queue {
            RECEIVE => self.receive(ring),
            TRANSMIT => self.transmit(ring),
            EVENTS => self.tell_events(ring),
            _ => Ok(false),
        }
    }

    /// A driver that begins has no streams.
    fn reset(&mut self) {
        self.state = State { refusal: None, transport_reset: false, events_first: false, ..self.state };
        if let Some(port) = &self.port {
            port.reset();
        }
    }

    fn end(&mut self) {
        if let Some(port) = self.port.take() {
            port.set_waker(None);
            port.reset();
        }
    }
}

/// `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |all: u64, byte| all << 8 | u64::from(*byte))
        };
        Self {
            src_cid: number(0, 8),
            dst_cid: number(8, 8),
            src_port: number(16, 4) as u32,
            dst_port: number(20, 4) as u32,
            len: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buf_alloc: number(36, 4) as u32,
            fwd_cnt: number(40, 4) as u32,
        }
    }

    fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// What a guest's packet with this data is for. Data of what has none is ignored.
    fn op(&self, data: Vec<u8>) -> Option<Op> {
        Some(match self.op {
            op::REQUEST => Op::Request,
            op::RESPONSE => Op::Response,
            op::RESET => Op::Reset,
            op::SHUTDOWN => Op::Shutdown {
                receive: self.flags & SHUTDOWN_RECEIVE != 0,
                send: self.flags & SHUTDOWN_SEND != 0,
            },
            op::DATA => Op::Data(data),
            op::CREDIT_UPDATE => Op::CreditUpdate,
            op::CREDIT_REQUEST => Op::CreditRequest,
            _ => return None,
        })
    }

    /// A guest's packet.
    fn packet(&self, op: Op) -> Packet {
        let (host_port, guest_port) = (self.dst_port, self.src_port);
        Packet { host_port, guest_port, op, buf_alloc: self.buf_alloc, fwd_cnt: self.fwd_cnt }
    }

    /// The answer to a guest's packet that it can have sent for no stream.
    fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: op::RESET,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

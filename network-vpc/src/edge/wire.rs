//! What is between the stack and the guest: packets that wait, and what has to be done to them so that each side takes
//! the other's.
//!
//! The stack makes segments of any length, so that nobody cuts them where the guest takes them whole.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant as StackInstant;

use crate::packet::ETHERNET_LEN;

/// Packets, and their bytes, that are made while the machine takes none. What the stack answers then to segments that belong to
/// no conversation, or not to its state, is lost, as on any link that is full.
const OUTBOX: usize = 128;
const OUTBOX_BYTES: usize = 1 << 20;

/// The longest packet there is, and the payload of a segment that is one.
const LONGEST: usize = 65_535;
const LONGEST_SEGMENT: u16 = (LONGEST - 40) as u16;

/// Options of TCP (RFC 9293, 3.2).
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const SEGMENT_SIZE: u8 = 2;

/// Who speaks with whom: the guest's address and port, and the other's.
pub(super) type Key = ((Ipv4Addr, u16), (Ipv4Addr, u16));

/// See the [module](self).
#[derive(Default)]
pub(super) struct Wire {
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
    /// The bytes of the outbox.
    bytes: usize,
    /// The longest segments that the guest takes in a conversation, where it has said so.
    sizes: HashMap<Key, u16>,
}

impl Wire {
    /// A conversation is over.
    pub(super) fn forget(&mut self, key: &Key) {
        self.sizes.remove(key);
    }

    /// The longest segments that the guest takes, if it has said so.
    pub(super) fn segment_size(&self, key: &Key) -> Option<u16> {
        self.sizes.get(key).copied()
    }

    /// A frame of the guest's, by which it may begin or accept a conversation that is there.
    pub(super) fn take_syn(&mut self, key: Key, mut frame: Vec<u8>) {
        if let Some(size) = lift_segment_size(&mut frame) {
            self.sizes.insert(key, size);
        }
        self.take(frame);
    }

    /// A frame of the guest's.
    pub(super) fn take(&mut self, frame: Vec<u8>) {
        self.inbox.push_back(frame);
    }

    pub(super) fn is_full(&self) -> bool {
        self.outbox.len() >= OUTBOX || self.bytes >= OUTBOX_BYTES
    }

    /// The next packet to the guest, behind room for its Ethernet header.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let frame = self.outbox.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

/// Has the stack take a guest that begins or accepts a conversation by `frame` for one that takes segments of any length.
/// Gives the length that it takes, if it says so.
fn lift_segment_size(frame: &mut [u8]) -> Option<u16> {
    let options = options(frame)?;
    let mut at = 0;
    loop {
        at += match options.get_mut(at..)? {
            [NO_OPERATION, ..] => 1,
            [SEGMENT_SIZE, 4, size @ ..] => {
                let size = size.first_chunk_mut()?;
                return Some(u16::from_be_bytes(std::mem::replace(size, LONGEST_SEGMENT.to_be_bytes())));
            }
            [kind, len, ..] if *kind != END_OF_OPTIONS && *len > 1 => usize::from(*len),
            _ => return None,
        };
    }
}

/// The options of a frame's segment.
fn options(frame: &mut [u8]) -> Option<&mut [u8]> {
    const SHORTEST: usize = 20;
    let ip_len = usize::from(frame.get(ETHERNET_LEN)? & 0xf) * 4;
    let segment = frame.get_mut(ETHERNET_LEN + ip_len..)?;
    let header_len = usize::from(segment.get(12)? >> 4) * 4;
    segment.get_mut(SHORTEST..header_len)
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Outbox<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Outbox<'_>)> {
        Some((Received(self.inbox.pop_front()?), Outbox(self)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Outbox<'_>> {
        (!self.is_full()).then_some(Outbox(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = LONGEST;
        // What the guest sends came through memory, and may have a checksum that is still to be computed; so may what
        // it gets.
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

pub(super) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.get(ETHERNET_LEN..).unwrap_or_default())
    }
}

pub(super) struct Outbox<'a>(&'a mut Wire);

impl TxToken for Outbox<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; ETHERNET_LEN + len];
        let result = f(&mut frame[ETHERNET_LEN..]);
        if self.0.is_full() {
            return result;
        }
        self.0.bytes += frame.len();
        self.0.outbox.push_back(frame);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segments_that_a_guest_takes_are_found_and_lifted() {
        let frame = |header_words: u8, options: &[u8]| {
            let mut frame = vec![0; ETHERNET_LEN + 40];
            frame[ETHERNET_LEN] = 0x45;
            frame[ETHERNET_LEN + 32] = header_words << 4;
            frame.extend(options);
            frame
        };
        let check = |header_words, options: &[u8], expect: Option<u16>, lifted: &[u8]| {
            let mut there = frame(header_words, options);
            assert_eq!(lift_segment_size(&mut there), expect, "{options:?}");
            assert_eq!(there, frame(header_words, lifted), "{options:?}");
        };
        check(6, &[2, 4, 5, 180], Some(1460), &[2, 4, 0xff, 0xd7]);
        check(7, &[1, 3, 3, 7, 2, 4, 5, 180], Some(1460), &[1, 3, 3, 7, 2, 4, 0xff, 0xd7]);
        for lie in [
            &[0, 0, 2, 4, 5, 180, 0, 0][..],
            &[2, 5, 5, 180],
            &[8, 0, 2, 4],
            &[8, 1, 2, 4],
            &[8, 9, 2, 4],
            &[],
        ] {
            check(7, lie, None, lie);
        }
        check(5, &[2, 4, 5, 180], None, &[2, 4, 5, 180]);
        check(6, &[1, 2, 4, 5], None, &[1, 2, 4, 5]);
        check(3, &[], None, &[]);
    }
}

//! A frame's way into the driver's buffers.

use instance_core::net::Frame;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::header::{HEADER_LEN, Header};
use crate::memory::PAGE;
use crate::virtio::chain::Malformed;
use crate::virtio::ring::{Running, Taken};

/// How many descriptors are read for a frame. What so many have no room for is too long: a driver's buffers are pages, or close to it.
const DESCRIPTORS: usize = 1024;

/// What became of a frame for the guest.
pub(super) enum Delivery {
    /// It is the driver's, or does not fit into what the driver offers and is lost.
    Done(Frame),
    /// The driver has not offered enough yet.
    NoRoom(Frame),
}

/// Writes a frame into the driver's next buffers: into one or, if it takes them so, into several.
pub(super) fn deliver(frame: Frame, ring: &mut Running<'_>, features: u64) -> Result<Delivery, Malformed> {
    let merge = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
    let needed = (HEADER_LEN + frame.data.len()) as u64;
    // Mostly, a buffer is a page.
    let mut chains = Vec::with_capacity(needed as usize / PAGE + 1);
    let (mut room, mut read) = (0, 0);
    // What a queue full of buffers has no room for never has any.
    let most = if merge { ring.size() } else { 1 };
    loop {
        ring.take(most - chains.len(), |chain| {
            if chain.readable.len() > 0 {
                return Err(Malformed("a buffer for frames is not for writing"));
            }
            if chains.is_empty() && chain.writable.len() < HEADER_LEN as u64 {
                return Err(Malformed("a buffer for frames is shorter than their header"));
            }
            room += chain.writable.len();
            read += chain.descriptors();
            chains.push(chain);
            Ok(if room < needed && read < DESCRIPTORS { Taken::Go } else { Taken::Last })
        })?;
        if room >= needed {
            break;
        }
        let is_too_long = chains.len() == most || read >= DESCRIPTORS;
        if is_too_long || !ring.ask()? {
            ring.put_back(chains.len() as u16);
            return Ok(if is_too_long { Delivery::Done(frame) } else { Delivery::NoRoom(frame) });
        }
    }
    let header = Header::of(&frame, features, chains.len() as u16).to_bytes();
    let mut rest = &frame.data[..];
    let mut used = Vec::with_capacity(chains.len());
    for (n, chain) in chains.iter().enumerate() {
        let start = if n == 0 { HEADER_LEN as u64 } else { 0 };
        if n == 0 {
            chain.writable.write(ring.memory(), 0, &header)?;
        }
        let (piece, after) = rest.split_at(rest.len().min((chain.writable.len() - start) as usize));
        chain.writable.write(ring.memory(), start, piece)?;
        rest = after;
        used.push((chain.head, (start + piece.len() as u64) as u32));
    }
    ring.put_all_used(used)?;
    Ok(Delivery::Done(frame))
}

//! Commands of the driver (virtio 1.2, 5.1.6.5): how many pairs of queues it uses, and no others.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::Net;
use crate::virtio::chain::{Chain, Malformed};
use crate::virtio::ring::Running;

/// `struct virtio_net_ctrl`: class, command, what belongs to it; and, for the device to write, the answer.
const HEADER_LEN: usize = 2;
/// `struct virtio_net_ctrl_mq`.
const MQ_LEN: usize = 2;

impl Net {
    /// Obeys a command. False if there is none.
    pub(super) fn obey(&mut self, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        let (header, mq) = read(&chain, ring)?;
        let [class, command] = header.map(u32::from);
        let done = match (class, command, mq) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, Some(pairs)) => {
                let pairs = u16::from_le_bytes(pairs);
                let are_ready = 2 * usize::from(pairs) <= ring.ready();
                features & 1 << VIRTIO_NET_F_MQ != 0 && are_ready && self.use_pairs(pairs)
            }
            _ => false,
        };
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.write(ring.memory(), 0, &[answer as u8])?;
        ring.put_used(&chain, 1)?;
        Ok(true)
    }
}

/// A command's header and, where it is just so long, what a command about pairs has behind it.
fn read(chain: &Chain, ring: &Running<'_>) -> Result<([u8; HEADER_LEN], Option<[u8; MQ_LEN]>), Malformed> {
    if chain.writable.len() == 0 {
        return Err(Malformed("a command has no room for its answer"));
    }
    let mut header = [0; HEADER_LEN];
    chain.readable.read(ring.memory(), 0, &mut header).map_err(|_| Malformed("a command has no header"))?;
    if chain.readable.len() != (HEADER_LEN + MQ_LEN) as u64 {
        return Ok((header, None));
    }
    let mut mq = [0; MQ_LEN];
    chain.readable.read(ring.memory(), HEADER_LEN as u64, &mut mq)?;
    Ok((header, Some(mq)))
}

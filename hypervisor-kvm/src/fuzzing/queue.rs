//! The body for a queue by itself: no device, a driver that does what it likes.

use std::num::NonZeroU32;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Input;
use crate::memory::{self, Memory};
use crate::virtio::{Ring, RingState, Taken};

/// Where the driver of this fuzzer has all it has.
const WRITTEN: usize = 64 << 10;
/// Events instead of flags, and tables of chains' own.
const FEATURES: [u64; 4] = [0, 1 << 29, 1 << 28, 1 << 29 | 1 << 28];

/// A driver that writes what it likes to its memory and describes a queue as it likes, and a device that takes chains, leaves
/// some, and gives some back. Chains are in the memory; none is passed over, and none comes twice unless it is put back;
/// nothing is written but the used ring; and a queue goes on where it was saved.
pub fn virtio_queue(bytes: &[u8]) {
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    let (mut ring, mut features, mut held) = (Ring::new(), 0, Vec::new());
    let mut input = Input(bytes);
    while let Some([action, at, low, high]) = input.take() {
        let word = u16::from_le_bytes([low, high]);
        match action % 8 {
            0 => {
                let value = input.take::<16>().unwrap_or_default();
                let address = GuestAddress(u64::from(word & 0xffef));
                assert!(memory.write_slice(&value[..usize::from(at % 17)], address).is_ok());
            }
            1 => {
                // Most queues are in the memory.
                let far = if at & 0xf0 == 0xf0 { u64::MAX << 16 } else { 0 };
                let place = far | u64::from(word);
                let was_ready = ring.ready();
                let described = ring.describe(|it| match at % 4 {
                    0 => it.size = word.into(),
                    1 => it.descriptors = place,
                    2 => it.available = place,
                    _ => it.used = place,
                });
                assert_eq!(described.is_err(), was_ready, "a queue in use was changed");
            }
            2 => {
                if !ring.ready() {
                    (features, held) = (FEATURES[usize::from(at % 4)], Vec::new());
                }
                let _ = ring.make_ready(&memory, features);
            }
            3 => {
                ring.stop();
                held.clear();
                assert!(!ring.ready());
            }
            4 => {
                let state = ring.save();
                let restored = Ring::restore(&state, &memory, features);
                assert!(restored.is_ok(), "a queue that was taken over is not taken over again");
                ring = restored.unwrap_or_else(|_| Ring::new());
                assert_eq!(ring.save(), state);
            }
            _ if !ring.ready() => {}
            5 => take(&memory, &mut ring, at, word, &mut held),
            6 => give_back(&memory, &mut ring, usize::from(at % 5), word.into(), &mut held),
            _ => ask(&memory, &mut ring),
        }
    }
}

fn at(state: &RingState) -> (u16, u16) {
    state.at.unwrap_or_default()
}

fn size(ring: &Ring) -> u16 {
    ring.described().size as u16
}

/// Takes `most` chains, and the last of them only if it likes.
fn take(memory: &Memory, ring: &mut Ring, most: u8, choice: u16, held: &mut Vec<u16>) {
    let (before, unchanged, size) = (at(&ring.save()), contents(memory), size(ring));
    let available = ring.described().available;
    let head_of = |n: u16| memory.read_obj::<u16>(GuestAddress(available + 4 + 2 * u64::from(n % size))).ok();
    let mut running = ring.run(memory);
    let mut taken = 0_u16;
    let count = running.take(usize::from(most), |chain| {
        assert_eq!(head_of(before.0.wrapping_add(taken)), Some(chain.head), "a chain is passed over");
        let segments = || chain.readable.segments().chain(chain.writable.segments());
        let inside =
            |(start, len): (u64, u32)| len == 0 || memory.check_range(GuestAddress(start), len as usize);
        assert!(segments().all(inside), "a chain is not in the memory");
        let total: u64 = segments().map(|(_, len)| u64::from(len)).sum();
        assert!(total == chain.readable.len() + chain.writable.len() && total <= u32::MAX.into());
        if choice == taken {
            return Ok(Taken::Not);
        }
        held.push(chain.head);
        taken += 1;
        Ok(if choice >> 8 == taken { Taken::Last } else { Taken::Go })
    });
    if let Ok(count) = count {
        assert!(count == usize::from(taken) && taken <= size && count <= usize::from(most));
    }
    // Those before a broken one are taken.
    assert_eq!(running.next_available(), before.0.wrapping_add(taken));
    if count.is_ok() && choice & 0x80 != 0 && taken > 0 {
        running.put_back(1);
        held.pop();
        assert_eq!(running.next_available(), before.0.wrapping_add(taken - 1));
    }
    assert!(contents(memory) == unchanged, "memory was written to");
}

/// Gives some chains back. The driver finds them, and nothing else is different.
fn give_back(memory: &Memory, ring: &mut Ring, count: usize, written: u32, held: &mut Vec<u16>) {
    let (before, unchanged, size) = (at(&ring.save()), contents(memory), size(ring));
    let used = ring.described().used;
    let given: Vec<(u16, u32)> = held.drain(..count.min(held.len())).map(|head| (head, written)).collect();
    let mut running = ring.run(memory);
    let put = running.put_all_used(given.iter().copied());
    assert!(put.is_ok(), "a queue that was taken over is not in the memory");
    let _ = running.wants_interrupt();
    let after = contents(memory);
    let mut expect = unchanged;
    let mut put = |address: u64, bytes: &[u8]| {
        if let Some(part) = expect.get_mut(address as usize..).and_then(|rest| rest.get_mut(..bytes.len())) {
            part.copy_from_slice(bytes);
        }
    };
    for ((head, written), n) in given.iter().zip(0..) {
        let element = used + 4 + 8 * u64::from(before.1.wrapping_add(n) % size);
        put(element, &[u32::from(*head).to_le_bytes(), written.to_le_bytes()].concat());
    }
    let next = before.1.wrapping_add(given.len() as u16);
    put(used + 2, &next.to_le_bytes());
    assert!(after == expect, "something else than the used ring was written");
    assert_eq!(at(&ring.save()), (before.0, next));
}

/// Asks to be notified, which changes what the driver is told and nothing else.
fn ask(memory: &Memory, ring: &mut Ring) {
    let (before, mut unchanged, size) = (ring.save(), contents(memory), size(ring));
    let used = ring.described().used as usize;
    let mut running = ring.run(memory);
    let _ = (running.ask(), running.is_awaited(), running.place());
    assert_eq!(ring.save(), before);
    let after = contents(memory);
    for at in [used, used + 4 + 8 * usize::from(size)] {
        for byte in at..at + 2 {
            if let (Some(old), Some(new)) = (unchanged.get_mut(byte), after.get(byte)) {
                *old = *new;
            }
        }
    }
    assert!(after == unchanged, "something else was written than what the driver is told of notifications");
}

fn contents(memory: &Memory) -> Vec<u8> {
    // A queue that begins here may end behind it.
    let mut bytes = vec![0; 2 * WRITTEN];
    assert!(memory.read_slice(&mut bytes, GuestAddress(0)).is_ok());
    bytes
}

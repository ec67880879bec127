//! Queues on which somebody else works.

use std::num::NonZeroU32;

use vm_memory::{Bytes, GuestAddress};

use super::chain::Malformed;
use super::ring::{QUEUE_SIZE, Ring, Taken};
use crate::memory::{self, Memory};

const END: u64 = 2 << 20;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const AVAIL_EVENT: u64 = USED + 4 + 8 * QUEUE_SIZE as u64;
const EVENT_IDX: u64 = 1 << 29;
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * QUEUE_SIZE as u64;

fn memory() -> Memory {
    memory::allocate(NonZeroU32::new(2).unwrap()).unwrap()
}

fn ring(memory: &Memory, descriptors: u64, features: u64) -> Ring {
    let mut ring = Ring::new();
    ring.describe(|it| (it.descriptors, it.available, it.used) = (descriptors, AVAILABLE, USED)).unwrap();
    ring.make_ready(memory, features).unwrap();
    ring
}

fn put(memory: &Memory, address: u64, value: u16) {
    memory.write_obj(value, GuestAddress(address)).unwrap();
}

#[test]
fn a_queue_may_end_where_the_memory_does_and_no_further() {
    let memory = memory();
    let table = 16 * u64::from(QUEUE_SIZE);
    let mut last = ring(&memory, END - table, 0);
    let place = last.run(&memory).place().unwrap();
    assert_eq!((place.descriptors, place.available, place.used), (END - table, AVAILABLE, USED));
    // What made it ready looked too; whoever gives a queue away looks for himself, at the memory that there is.
    let mut small = ring(&memory, END - table, 0);
    let other = memory::allocate(NonZeroU32::new(1).unwrap()).unwrap();
    assert!(small.run(&other).place().is_err());
}

#[test]
fn who_works_on_a_queue_is_told_when_it_has_asked() {
    let memory = memory();
    let mut by_flags = ring(&memory, 0, 0);
    assert!(by_flags.run(&memory).is_awaited().unwrap());
    put(&memory, USED, 1);
    assert!(!by_flags.run(&memory).is_awaited().unwrap());

    let mut by_events = ring(&memory, 0, EVENT_IDX);
    // The available index; and up to where whoever works there has seen it, and asked.
    for (available, event, awaited) in [(0, 0, false), (5, 3, true), (5, 5, false), (2, 0xffff, true)] {
        put(&memory, AVAILABLE + 2, available);
        put(&memory, AVAIL_EVENT, event);
        let said = by_events.run(&memory).is_awaited().unwrap();
        assert_eq!(said, awaited, "{available} of which {event} are known");
    }
}

#[test]
fn interrupts_that_were_decided_elsewhere_are_raised() {
    let memory = memory();
    let mut ring = ring(&memory, 0, EVENT_IDX);
    assert!(!ring.run(&memory).wants_interrupt().unwrap());
    // The driver has moved on meanwhile, or as many have been used as there are numbers.
    put(&memory, USED_EVENT, 0x8000);
    let mut running = ring.run(&memory);
    running.interrupt();
    assert!(running.wants_interrupt().unwrap());
    assert!(!ring.run(&memory).wants_interrupt().unwrap(), "once");
}

#[test]
fn a_queue_goes_on_where_it_was_left() {
    let memory = memory();
    let mut ring = ring(&memory, 0, 0);
    put(&memory, USED + 2, 7);
    ring.run(&memory).go_on_from(9).unwrap();
    assert_eq!(ring.run(&memory).next_available(), 9);
    put(&memory, AVAILABLE, 1); // the driver polls
    let mut running = ring.run(&memory);
    running.put_all_used([(3, 0)]).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 8);
}

/// Which is what keeps the bytes that are written within what the used ring can say.
#[test]
fn a_chain_has_fewer_bytes_than_can_be_counted() {
    const PIECE: u32 = 17 << 20;
    let memory = memory::allocate(NonZeroU32::new(18).unwrap()).unwrap();
    put(&memory, AVAILABLE + 2, 1);
    for (pieces, is_good) in [(u32::MAX / PIECE, true), (u32::MAX / PIECE + 1, false)] {
        let mut ring = ring(&memory, 0x8000, 0);
        for n in 0..pieces {
            let last = n + 1 == pieces;
            // The device writes to it, which comes before the number of the next one.
            let rest = u64::from(PIECE) | if last { 2 << 32 } else { 3 << 32 | u64::from(n + 1) << 48 };
            memory.write_obj([1u64 << 20, rest], GuestAddress(0x8000 + 16 * u64::from(n))).unwrap();
        }
        let chain = ring.run(&memory).next();
        match chain {
            Ok(Some(chain)) => assert!(is_good && chain.writable.len() == u64::from(pieces * PIECE)),
            refused => {
                let why = Malformed("a descriptor chain has more bytes than one may have");
                assert!(!is_good && refused.unwrap_err() == why);
            }
        }
    }
}

#[test]
fn one_bit_says_whether_the_driver_is_to_be_interrupted() {
    let memory = memory();
    for (flags, features, wanted) in [(0xfffe, 0, true), (0xffff, 0, false), (0xffff, EVENT_IDX, true)] {
        put(&memory, AVAILABLE, flags);
        let mut ring = ring(&memory, 0, features);
        let mut running = ring.run(&memory);
        running.put_all_used([(0, 0)]).unwrap();
        assert_eq!(running.wants_interrupt().unwrap(), wanted, "{flags:#x} with {features:#x}");
    }
}

#[test]
fn a_chain_that_is_not_taken_stays_the_next_one() {
    let memory = memory();
    put(&memory, AVAILABLE + 2, 4);
    let mut ring = ring(&memory, 0, 0);
    for (answer, taken, next) in
        [(Taken::Not, 0, 0), (Taken::Last, 1, 1), (Taken::Go, 3, 4), (Taken::Go, 0, 4)]
    {
        assert_eq!(ring.run(&memory).take(8, |_| Ok(answer)).unwrap(), taken, "{answer:?}");
        assert_eq!(ring.run(&memory).next_available(), next, "{answer:?}");
    }
}

//! Queues on which somebody else works.

use std::num::NonZeroU32;

use vm_memory::{Bytes, GuestAddress};

use super::ring::{QUEUE_SIZE, Ring};
use crate::memory::{self, Memory};

const END: u64 = 2 << 20;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const AVAIL_EVENT: u64 = USED + 4 + 8 * QUEUE_SIZE as u64;
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * QUEUE_SIZE as u64;

fn memory() -> Memory {
    memory::allocate(NonZeroU32::new(2).unwrap()).unwrap()
}

fn ring(memory: &Memory, descriptors: u64, event_idx: bool) -> Ring {
    let mut ring = Ring::new();
    ring.describe(|it| (it.descriptors, it.available, it.used) = (descriptors, AVAILABLE, USED)).unwrap();
    ring.make_ready(memory, event_idx).unwrap();
    ring
}

fn put(memory: &Memory, address: u64, value: u16) {
    memory.write_obj(value, GuestAddress(address)).unwrap();
}

#[test]
fn a_queue_may_end_where_the_memory_does_and_no_further() {
    let memory = memory();
    let table = 16 * u64::from(QUEUE_SIZE);
    let mut last = ring(&memory, END - table, false);
    let place = last.run(&memory).place().unwrap();
    assert_eq!((place.descriptors, place.available, place.used), (END - table, AVAILABLE, USED));
    // What made it ready looked too; whoever gives a queue away looks for himself, at the memory that there is.
    let mut small = ring(&memory, END - table, false);
    let other = memory::allocate(NonZeroU32::new(1).unwrap()).unwrap();
    assert!(small.run(&other).place().is_err());
}

#[test]
fn who_works_on_a_queue_is_told_when_it_has_asked() {
    let memory = memory();
    let mut by_flags = ring(&memory, 0, false);
    assert!(by_flags.run(&memory).is_awaited().unwrap());
    put(&memory, USED, 1);
    assert!(!by_flags.run(&memory).is_awaited().unwrap());

    let mut by_events = ring(&memory, 0, true);
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
    let mut ring = ring(&memory, 0, true);
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
    let mut ring = ring(&memory, 0, false);
    put(&memory, USED + 2, 7);
    ring.run(&memory).go_on_from(9).unwrap();
    assert_eq!(ring.run(&memory).next_available(), 9);
    put(&memory, AVAILABLE, 1); // the driver polls
    let mut running = ring.run(&memory);
    running.put_all_used([(3, 0)]).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 8);
}

//! Drivers that break the rules of virtio 1.2, whatever the device.
//!
//! What a driver must or must not do by that document, where the device sees it broken, and the tests that break it. Beside
//! them the fuzzers break whatever they come upon.
//!
//! - Order of initialisation, bits of the status (2.1.1, 3.1.1): [`nothing_is_served_before_the_driver_is_ready`],
//!   [`no_bit_of_the_status_is_taken_back`].
//! - Only features that were offered, and no feature without another that it requires (2.2.1, 5.1.3.1):
//!   [`features_that_were_not_offered_are_not_accepted`]; `tests::features`; `net::tests`:
//!   `a_driver_that_breaks_the_rules_is_stopped`.
//! - What of a configuration is written (2.5, 5.1.4.1, 5.5.6): `tests::configuration`.
//! - Size, place and alignment of a queue; not changed while in use (2.7.1, 4.2.2.2, 4.1.4.3.2):
//!   [`a_queue_that_cannot_be_is_refused`], [`a_queue_in_use_is_not_moved`]; `pci_tests`:
//!   `a_queue_is_described_before_it_is_enabled`.
//! - Chains and their tables (2.7.5.1, 2.7.5.3.1): [`BAD_DRIVERS`], [`a_chain_is_as_long_as_a_queue_and_no_longer`],
//!   [`tables_that_were_not_agreed_on_are_none`]; `ring_tests`: `a_chain_has_fewer_bytes_than_can_be_counted`.
//! - The available ring's index, the used ring is the device's (2.7.6.1, 2.7.8): [`BAD_DRIVERS`],
//!   [`what_a_driver_writes_into_the_used_ring_is_not_looked_at`].
//! - Bits of the ring that have no meaning (2.7.7.1, 2.7.10): `ring_tests`:
//!   `one_bit_says_whether_the_driver_is_to_be_interrupted`.
//! - What is exposed is not changed; a reset at any time (3.3.1): `block_tests::ended_early`:
//!   `nothing_is_written_to_a_driver_that_has_taken_its_memory_back`; `console_tests`, `balloon_tests`: what becomes
//!   shorter, what is half done; `net::tests_of_pairs`, `vsock_tests`: what a reset gives up.
//! - Widths, what can only be read, the window (4.1.3.1, 4.1.4.3.2, 4.1.4.9.2): `pci_tests`:
//!   `every_register_takes_every_width`, `what_can_only_be_read_is_not_written`, `the_window_reaches_the_registers`.
//! - Widths, what can only be read, places that are none (4.2.2.2): [`every_register_takes_every_width`],
//!   [`what_can_only_be_read_is_not_written`].
//! - Bits of the interrupt status that are not pending or have no meaning (4.2.2.2): `wired_tests`:
//!   `an_interrupt_is_acknowledged_by_its_own_bit`.
//! - Headers of frames, buffers for them (5.1.6.2.1, 5.1.6.3.1): `net::tests`:
//!   `a_driver_that_breaks_the_rules_is_stopped`, `frames_that_are_none_are_dropped`,
//!   `what_has_no_meaning_in_a_header_is_ignored`.
//! - Commands, and pairs of queues that are not there or not ready (5.1.6.5): `net::tests_of_pairs`:
//!   `commands_are_obeyed_if_they_are_whole_and_possible`, `pairs_whose_queues_are_not_ready_are_not_used`.
//! - Frames sent by pairs that are not in use (5.1.6.5.6.1) are passed on, as Linux's driver sends some when it is to use fewer:
//!   `net::tests_of_pairs`: `what_is_sent_by_pairs_that_are_not_used_is_passed_on`.
//! - Requests: lengths, places, flags, queues that were not negotiated (5.2.6.1): `tests`:
//!   `a_request_that_cannot_be_done_is_an_error_and_no_more`, `what_a_flush_does_not_need_is_ignored`; `block_tests`:
//!   `a_queue_that_was_not_negotiated_is_not_served`.
//! - Which buffers are written and which read (5.3.6.2, 5.4.6.1): `console_tests`:
//!   `drivers_that_break_the_rules_stop_their_console_alone`; `tests`:
//!   `random_bytes_are_as_many_as_asked_for_and_never_the_same`.
//! - Pages of the memory, reports where agreed on (5.5.6): `balloon_tests`:
//!   `a_bad_driver_stops_its_balloon_and_nothing_else_is_touched`.
//! - Headers of packets, buffers for them and for events, room (5.10.6): `vsock_tests`:
//!   `a_bad_driver_stops_its_device_until_it_resets_it`; `instance_core::vsock`:
//!   `a_guest_that_breaks_the_rules_has_its_stream_broken_off`.

use super::*;

/// What a bad driver does, and what the device says of it.
type BadDriver = (&'static str, fn(&mut Driver));

/// Violations that leave nothing to answer to: virtio 1.2, 2.7 and 5.2.6.
const BAD_DRIVERS: &[BadDriver] = &[
    ("a descriptor chain does not end", |driver| {
        // A loop.
        driver.put_descriptor(DESCRIPTORS, 0, (HEADER, 16, NEXT, 1));
        driver.put_descriptor(DESCRIPTORS, 1, (DATA, 16, NEXT, 0));
        driver.offer(0);
    }),
    ("a descriptor lies outside its table", |driver| {
        // A link out of the table.
        driver.put_descriptor(DESCRIPTORS, 0, (HEADER, 16, NEXT, QUEUE_SIZE));
        driver.offer(0);
    }),
    ("a descriptor lies outside its table", |driver| driver.offer(QUEUE_SIZE)),
    ("a table of descriptors is not one that may be", |driver| {
        // A table in a table.
        driver.put_descriptor(INDIRECT, 0, (INDIRECT + 16, 16, TABLE, 0));
        driver.put_descriptor(INDIRECT, 1, (HEADER, 16, 0, 0));
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 16, TABLE, 0));
        driver.offer(0);
    }),
    ("a table of descriptors is not one that may be", |driver| {
        // A table of one and a half.
        driver.put_descriptor(INDIRECT, 0, (HEADER, 16, 0, 0));
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 24, TABLE, 0));
        driver.offer(0);
    }),
    ("a descriptor lies outside its table", |driver| {
        // A link out of a table that is not the queue's.
        driver.put_descriptor(INDIRECT, 0, (HEADER, 16, NEXT, 1));
        driver.put_descriptor(INDIRECT, 1, (STATUS, 1, WRITE, 0));
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 16, TABLE, 0));
        driver.offer(0);
    }),
    ("a table of descriptors is not one that may be", |driver| {
        // A table outside the memory.
        driver.put_descriptor(DESCRIPTORS, 0, (u64::MAX - 15, 16, TABLE, 0));
        driver.offer(0);
    }),
    ("a table of descriptors is not one that may be", |driver| {
        // A table with a descriptor behind it.
        driver.put_header(FLUSH, 0);
        driver.put_descriptor(INDIRECT, 0, (HEADER, 16, NEXT, 1));
        driver.put_descriptor(INDIRECT, 1, (STATUS, 1, WRITE, 0));
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 32, TABLE | NEXT, 1));
        driver.put_descriptor(DESCRIPTORS, 1, (DATA, 16, WRITE, 0));
        driver.offer(0);
    }),
    ("a descriptor lies outside its table", |driver| {
        // A table of none.
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 0, TABLE, 0));
        driver.offer(0);
    }),
    ("a descriptor points outside the memory", |driver| {
        driver.put_descriptor(DESCRIPTORS, 0, (MIB - 8, 16, 0, 0));
        driver.offer(0);
    }),
    ("a descriptor points outside the memory", |driver| {
        driver.put_descriptor(DESCRIPTORS, 0, (u64::MAX, 16, 0, 0));
        driver.offer(0);
    }),
    ("a readable descriptor follows a writable one", |driver| {
        driver.put_descriptor(DESCRIPTORS, 0, (DATA, 16, WRITE | NEXT, 1));
        driver.put_descriptor(DESCRIPTORS, 1, (HEADER, 16, 0, 0));
        driver.offer(0);
    }),
    ("a request without a header", |driver| {
        driver.put_descriptor(DESCRIPTORS, 0, (HEADER, 15, NEXT, 1));
        driver.put_descriptor(DESCRIPTORS, 1, (STATUS, 1, WRITE, 0));
        driver.offer(0);
    }),
    ("a request without room for its status", |driver| {
        driver.put_header(OUT, 0);
        driver.put_descriptor(DESCRIPTORS, 0, (HEADER, 16, 0, 0));
        driver.offer(0);
    }),
    ("the available ring's index is impossible", |driver| {
        let ahead = driver.sent.wrapping_add(QUEUE_SIZE + 1);
        driver.memory.write_obj(ahead, GuestAddress(AVAILABLE + 2)).unwrap();
    }),
    ("the available ring's index is impossible", |driver| {
        // What was made available is taken back.
        let back = driver.sent.wrapping_sub(1);
        driver.memory.write_obj(back, GuestAddress(AVAILABLE + 2)).unwrap();
    }),
];

#[test]
fn a_bad_driver_stops_its_device_until_it_resets_it() {
    for (expect, misbehave) in BAD_DRIVERS {
        let mut driver = Driver::ready();
        driver.disk.write_at(&[5; 512], 0).unwrap();
        assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
        misbehave(&mut driver);
        let broken = driver.step();
        let Step::Broken(Malformed(why)) = broken else { panic!("{expect}: {broken:?}") };
        assert_eq!(why, *expect);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{expect}");
        // Good requests are not heard any more.
        driver.put_header(FLUSH, 0);
        assert_eq!(driver.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), Step::Idle, "{expect}");

        driver.sent = 0;
        driver.memory.write_obj(0u32, GuestAddress(AVAILABLE)).unwrap();
        driver.memory.write_obj(0u32, GuestAddress(USED)).unwrap();
        driver.negotiate(VERSION_1);
        driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]);
        driver.set(reg::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(driver.status(), 15, "{expect}");
        assert_eq!(driver.request(IN, 0, 512, WRITE), (OK, 513), "{expect}");
        assert_eq!(driver.data(512), [5; 512], "{expect}");
    }
}

#[test]
fn a_queue_that_cannot_be_is_refused() {
    let good = [DESCRIPTORS, AVAILABLE, USED];
    let table: [(u16, [u64; 3]); 9] = [
        (0, good),
        (3, good),
        (QUEUE_SIZE * 2, good),
        (QUEUE_SIZE, [DESCRIPTORS + 8, AVAILABLE, USED]),
        (QUEUE_SIZE, [DESCRIPTORS, AVAILABLE + 1, USED]),
        (QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED + 2]),
        (QUEUE_SIZE, [MIB - 16, AVAILABLE, USED]),
        (QUEUE_SIZE, [DESCRIPTORS, u64::MAX - 1, USED]),
        (QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, 1 << 40]),
    ];
    for (size, addresses) in table {
        let mut driver = Driver::new(MemoryDisk::new(MIB).unwrap().into_disk());
        driver.negotiate(VERSION_1);
        let effect = driver.set_queue(size, addresses);
        assert!(matches!(effect, Effect::Broken(_)), "{size} {addresses:x?}: {effect:?}");
        assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_READY), 0);
        driver.set(reg::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(driver.step(), Step::Idle);
    }
}

#[test]
fn a_queue_in_use_is_not_moved() {
    for register in [
        reg::VIRTIO_MMIO_QUEUE_NUM,
        reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
        reg::VIRTIO_MMIO_QUEUE_DESC_HIGH,
        reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        reg::VIRTIO_MMIO_QUEUE_USED_LOW,
        reg::VIRTIO_MMIO_QUEUE_USED_HIGH,
    ] {
        let mut driver = Driver::ready();
        assert!(matches!(driver.set(register, 0), Effect::Broken(_)), "{register:#x}");
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{register:#x}");
    }
    // A queue that does not exist is nobody's.
    let mut driver = Driver::ready();
    driver.set(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(driver.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0), Effect::None);
    assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut driver = Driver::new(MemoryDisk::new(MIB).unwrap().into_disk());
    let offered = driver.offered();
    for (features, accepted) in
        [(VERSION_1, true), (offered, true), (offered & !VERSION_1, false), (0, false)]
            .into_iter()
            .chain((0..64).filter(|bit| offered & 1 << bit == 0).map(|bit| (VERSION_1 | 1 << bit, false)))
    {
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK != 0, accepted, "{features:#x}");
    }
    // Once they are settled they stay, and there are no more than 64.
    driver.negotiate(VERSION_1);
    for select in [0, 2, u32::MAX] {
        driver.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        driver.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, !0);
    }
    driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]);
    driver.set(reg::VIRTIO_MMIO_STATUS, 15);
    driver.put_data(&Driver::range(0, 1, 0));
    assert_eq!(driver.request(DISCARD, 0, 16, 0), (UNSUPP, 1));
}

#[test]
fn nothing_is_served_before_the_driver_is_ready() {
    let unready = ACKNOWLEDGE | DRIVER;
    for status in [0, ACKNOWLEDGE, unready, unready | DRIVER_OK, unready | FEATURES_OK] {
        let mut driver = Driver::new(MemoryDisk::new(MIB).unwrap().into_disk());
        if status & FEATURES_OK != 0 {
            driver.negotiate(VERSION_1);
        }
        driver.set(reg::VIRTIO_MMIO_STATUS, status);
        assert_eq!(driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]), Effect::None);
        driver.put_header(FLUSH, 0);
        assert_eq!(driver.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), Step::Idle, "{status}");
    }
}

#[test]
fn no_bit_of_the_status_is_taken_back() {
    let mut driver = Driver::ready();
    for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 11, NEEDS_RESET, 0xffff_ff00 & !128] {
        assert_eq!(driver.set(reg::VIRTIO_MMIO_STATUS, status), Effect::None);
        assert_eq!(driver.status(), 15, "{status:#x}: nor does a driver say that the device needs a reset");
    }
    assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
    // A device that needs a reset gets it by nothing less.
    driver.offer(QUEUE_SIZE);
    assert!(matches!(driver.step(), Step::Broken(_)));
    for status in [15, 11, 15] {
        driver.set(reg::VIRTIO_MMIO_STATUS, status);
        driver.set(reg::VIRTIO_MMIO_QUEUE_READY, u32::from(status == 15));
        assert_eq!((driver.status(), driver.step()), (15 | NEEDS_RESET, Step::Idle));
    }
}

#[test]
fn a_chain_is_as_long_as_a_queue_and_no_longer() {
    // Of a table that lies behind all else, and of the queue's, of which a table's own descriptor is one.
    const LONG: u64 = 0x1_0000;
    for (descriptors, is_good) in [(QUEUE_SIZE, true), (QUEUE_SIZE + 1, false)] {
        let mut driver = Driver::ready();
        driver.put_header(FLUSH, 0);
        for n in 0..descriptors {
            let (address, len, flags) = match n {
                0 => (HEADER, 16, NEXT),
                _ if n + 1 == descriptors => (STATUS, 1, WRITE),
                _ => (DATA, 0, NEXT),
            };
            driver.put_descriptor(LONG, n, (address, len, flags, n + 1));
        }
        // What is said of a table beside that it is one is not looked at.
        driver.put_descriptor(DESCRIPTORS, 0, (LONG, 16 * u32::from(descriptors), TABLE | WRITE, 7));
        driver.offer(0);
        let endless = Step::Broken(Malformed("a descriptor chain does not end"));
        assert_eq!(driver.step(), if is_good { Step::Served { interrupt: true } } else { endless });
    }
}

#[test]
fn tables_that_were_not_agreed_on_are_none() {
    const INDIRECT_DESC: u64 = 1 << 28;
    for (features, is_good) in [(VERSION_1 | INDIRECT_DESC, true), (VERSION_1, false)] {
        let mut driver = Driver::ready_with(MemoryDisk::new(MIB).unwrap().into_disk(), features);
        driver.put_header(FLUSH, 0);
        driver.put_descriptor(INDIRECT, 0, (HEADER, 16, NEXT, 1));
        driver.put_descriptor(INDIRECT, 1, (STATUS, 1, WRITE, 0));
        driver.put_descriptor(DESCRIPTORS, 0, (INDIRECT, 32, TABLE, 0));
        driver.offer(0);
        let refused = Step::Broken(Malformed("a table of descriptors is not one that may be"));
        assert_eq!(driver.step(), if is_good { Step::Served { interrupt: true } } else { refused });
    }
}

#[test]
fn a_descriptor_of_a_smaller_queue_is_not_behind_its_table() {
    const SMALL: u16 = 16;
    let mut driver = Driver::new(MemoryDisk::new(MIB).unwrap().into_disk());
    driver.negotiate(VERSION_1);
    driver.set_queue(SMALL, [DESCRIPTORS, AVAILABLE, USED]);
    driver.set(reg::VIRTIO_MMIO_STATUS, 15);
    driver.put_header(FLUSH, 0);
    driver.put_descriptor(DESCRIPTORS, SMALL - 1, (HEADER, 16, NEXT, SMALL));
    driver.put_descriptor(DESCRIPTORS, SMALL, (STATUS, 1, WRITE, 0));
    driver.offer(SMALL - 1);
    assert_eq!(driver.step(), Step::Broken(Malformed("a descriptor lies outside its table")));
}

#[test]
fn what_a_driver_writes_into_the_used_ring_is_not_looked_at() {
    let mut driver = Driver::ready();
    for scribble in [0u64, u64::MAX, 0x1234_0000] {
        driver.memory.write_obj(scribble, GuestAddress(USED)).unwrap();
        driver.memory.write_obj(scribble, GuestAddress(USED + 8)).unwrap();
        // The next one has its place where it would have had it, and the index goes on from the last.
        assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
    }
}

#[test]
fn every_register_takes_every_width() {
    let mut driver = Driver::ready();
    let mut capacity = [0; 8];
    driver.device.read(reg::VIRTIO_MMIO_CONFIG.into(), &mut capacity, 0);
    assert_eq!(u64::from_le_bytes(capacity), MIB / 512);
    for offset in 0..0x1000 {
        for len in [1, 2, 4, 8] {
            driver.device.read(offset, &mut [0xee; 8][..len], 0);
            // Only whole words, where they lie, are registers.
            if len != 4 || offset % 4 != 0 {
                for value in [0, 0xff] {
                    let effect = driver.device.write(&driver.memory, offset, &[value; 8][..len]);
                    assert_eq!(effect, Effect::None, "{len} bytes at {offset:#x}");
                }
            }
        }
    }
    assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1), "no odd width has reset or moved anything");
}

#[test]
fn what_can_only_be_read_is_not_written() {
    let mut driver = Driver::ready();
    // Also the places between registers, and those of version 1: page size, alignment and page of a queue.
    let only_read = [0, 4, 8, 0xc, 0x10, 0x34, 0x60, 0xb0, 0xb4, 0xb8, 0xbc, 0xfc];
    let none = [0x18, 0x1c, 0x28, 0x2c, 0x3c, 0x40, 0x48, 0x54, 0x68, 0x74, 0xc0];
    for register in only_read.into_iter().chain(none) {
        let before = driver.get(register);
        for value in [0, 1, u32::MAX] {
            assert_eq!(driver.set(register, value), Effect::None, "{register:#x}");
            assert_eq!(driver.get(register), before, "{register:#x}");
        }
    }
    assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
}

//! Drivers, good and bad, against the balloon's logic.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use virtio_bindings::virtio_mmio as reg;

use super::balloon::{Balloon, DEFLATE, INFLATE, QUEUES, REPORT_BATCH, Wish};
use super::chain::Malformed;
use super::core::Step;
use super::driver::{BUFFERS as LIST, Driver, WRITE};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const REPORTING: u64 = 1 << 5;

struct Guest {
    driver: Driver,
    wish: Arc<Wish>,
}

impl Deref for Guest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

impl Guest {
    /// A guest with 4 MiB, whose every byte beyond the first is 7.
    fn without(features: u64) -> Self {
        let wish = Arc::new(Wish::new(4));
        let driver = Driver::new(Balloon::new(wish.clone()), QUEUES, features);
        driver.put(MIB, &vec![7; 3 << 20]);
        Self { driver, wish }
    }

    /// Offers a list of pages, by their numbers.
    fn offer_pages(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.put(LIST, &bytes);
        self.offer(queue, 0, &[(LIST, bytes.len() as u32, 0)]);
    }

    /// The pages beyond the first MiB that are all zeroes, as page numbers; no page is partly so.
    fn given_back(&self) -> Vec<u32> {
        let zeroed = |page: &u32| {
            let bytes = self.bytes(u64::from(*page) * PAGE, PAGE as usize);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is partly given back");
            bytes[0] == 0
        };
        (256..1024).filter(zeroed).collect()
    }

    fn config(&self) -> [u32; 2] {
        [0, 4].map(|at| self.get(reg::VIRTIO_MMIO_CONFIG + at))
    }
}

const SERVED: Step = Step::Served { interrupt: true };

#[test]
fn pages_in_the_balloon_are_given_back_and_no_others() {
    let mut guest = Guest::without(0);
    // In any order, one of them twice.
    guest.offer_pages(INFLATE, &[300, 302, 301, 1023, 256, 301]);
    assert_eq!(guest.step(INFLATE), SERVED);
    assert_eq!(guest.given_back(), [256, 300, 301, 302, 1023]);
    assert_eq!(guest.step(INFLATE), Step::Idle);
    guest.offer_pages(DEFLATE, &[300, 301]);
    assert_eq!(guest.step(DEFLATE), SERVED);
    assert_eq!((guest.used(INFLATE), guest.used(DEFLATE)), (1, 1));
    // And used again as memory.
    guest.put(300 * PAGE, &[7; PAGE as usize]);
    assert_eq!(guest.given_back(), [256, 301, 302, 1023]);
}

#[test]
fn a_long_list_is_done_in_pieces() {
    let mut guest = Guest::without(0);
    // Many times the same but for the last one, in two descriptors that are cut within a number.
    let mut pages = vec![400; 2500];
    pages[2499] = 500;
    let bytes: Vec<u8> = pages.iter().flat_map(|page: &u32| page.to_le_bytes()).collect();
    guest.put(LIST, &bytes);
    guest.offer(INFLATE, 0, &[(LIST, 4098, 0), (LIST + 4098, bytes.len() as u32 - 4098, 0)]);
    let unfinished = Step::Served { interrupt: false };
    assert_eq!((guest.step(INFLATE), guest.used(INFLATE)), (unfinished, 0));
    assert_eq!(guest.step(INFLATE), unfinished);
    assert_eq!(guest.given_back(), [400]);
    assert_eq!((guest.step(INFLATE), guest.used(INFLATE)), (SERVED, 1));
    assert_eq!(guest.given_back(), [400, 500]);
    // The next one begins at its beginning.
    guest.offer_pages(INFLATE, &[600]);
    assert_eq!(guest.step(INFLATE), SERVED);
    assert_eq!(guest.given_back(), [400, 500, 600]);
}

#[test]
fn free_pages_that_are_reported_are_given_back() {
    // Whichever queue the driver takes for it.
    for queue in 2..QUEUES {
        let mut guest = Guest::without(0);
        // Only the whole pages of what is not aligned.
        let piece = (400 * PAGE + 1, 3 * PAGE as u32, WRITE);
        guest.offer(queue, 0, &[(260 * PAGE, 8 * PAGE as u32, WRITE), piece, (500 * PAGE, 4095, WRITE)]);
        assert_eq!(guest.step(queue), SERVED);
        assert_eq!(guest.given_back(), [260, 261, 262, 263, 264, 265, 266, 267, 401, 402]);
    }
}

#[test]
fn a_bad_driver_stops_its_balloon_and_nothing_else_is_touched() {
    type Bad = fn(&mut Guest);
    let bad: &[(&str, usize, u64, Bad)] = &[
        // A run that ends outside: no page of it is touched.
        ("a page is not of the memory", INFLATE, 0, |d| d.offer_pages(INFLATE, &[1023, 1024])),
        ("a page is not of the memory", INFLATE, 0, |d| d.offer_pages(INFLATE, &[300, 1024])),
        ("a page is not of the memory", INFLATE, 0, |d| d.offer_pages(INFLATE, &[u32::MAX])),
        ("a page is not of the memory", INFLATE, 0, |d| d.offer_pages(INFLATE, &[0xc_0000])),
        ("a list of pages is none", INFLATE, 0, |d| d.offer(INFLATE, 0, &[(LIST, 7, 0)])),
        ("a list of pages is none", INFLATE, 0, |d| d.offer(INFLATE, 0, &[(LIST, 4, 0), (LIST, 4, WRITE)])),
        ("a list of pages is none", DEFLATE, 0, |d| d.offer(DEFLATE, 0, &[(LIST, 6, 0)])),
        ("a list of pages is none", DEFLATE, 0, |d| d.offer(DEFLATE, 0, &[(LIST, 4, WRITE)])),
        ("pages are reported that are not for writing", 4, 0, |d| {
            d.offer(4, 0, &[(400 * PAGE, PAGE as u32, 0), (400 * PAGE, PAGE as u32, WRITE)]);
        }),
        ("a descriptor points outside the memory", 4, 0, |d| {
            d.offer(4, 0, &[(1023 * PAGE, 2 * PAGE as u32, WRITE)]);
        }),
        ("a descriptor points outside the memory", 4, 0, |d| d.offer(4, 0, &[(u64::MAX - 1, 4096, WRITE)])),
        ("a queue is used that was not agreed on", 4, REPORTING, |d| {
            d.offer(4, 0, &[(300 * PAGE, PAGE as u32, WRITE)]);
        }),
    ];
    for (expect, queue, without, misbehave) in bad {
        let mut guest = Guest::without(*without);
        misbehave(&mut guest);
        let broken = guest.step(*queue);
        let Step::Broken(Malformed(why)) = broken else { panic!("{expect}: {broken:?}") };
        assert_eq!(why, *expect);
        assert!(guest.needs_reset(), "{expect}");
        // What it named before may be given back: it is the guest's own.
        assert!(guest.given_back().iter().all(|page| *page == 300), "{expect}");
        guest.begin(0);
        guest.offer_pages(INFLATE, &[700]);
        assert_eq!(guest.step(INFLATE), SERVED, "{expect}");
    }
}

/// More than there is memory, which may be named as often as a chain has room for.
#[test]
fn a_long_report_is_done_in_pieces() {
    let mut guest = Guest::without(0);
    let unfinished = Step::Served { interrupt: false };
    let mut chain = vec![(400 * PAGE + 1, (PAGE * 400) as u32, WRITE); 60];
    // One without bytes is in no memory.
    chain.insert(0, (u64::MAX, 0, WRITE));
    chain.push((900 * PAGE, PAGE as u32, WRITE));
    let pieces = (60 * 400 + 1) * PAGE / REPORT_BATCH;
    guest.offer(4, 0, &chain);
    for _ in 0..pieces {
        assert_eq!((guest.step(4), guest.used(4)), (unfinished, 0));
        assert_eq!(guest.given_back(), (401..800).collect::<Vec<_>>());
    }
    assert_eq!((guest.step(4), guest.used(4)), (SERVED, 1));
    assert_eq!(guest.given_back().last(), Some(&900));
    // The next one begins at its beginning, also where the queue was taken back in the middle.
    for stops in [false, true] {
        let mut guest = Guest::without(0);
        guest.offer(3, 0, &chain);
        guest.step(3);
        if stops {
            guest.set(reg::VIRTIO_MMIO_QUEUE_SEL, 3);
            (0..2).for_each(|ready| _ = guest.set(reg::VIRTIO_MMIO_QUEUE_READY, ready));
        } else {
            guest.step(3);
        }
        guest.offer(3, 62, &[(260 * PAGE, PAGE as u32, WRITE)]);
        (0..2).for_each(|_| _ = guest.step(3));
        assert_eq!(guest.given_back().contains(&260), !stops, "a queue that is taken back is looked at anew");
    }
}

#[test]
fn a_list_that_becomes_shorter_while_it_is_done_does_no_harm() {
    let mut guest = Guest::without(0);
    guest.offer_pages(INFLATE, &vec![400; 1500]);
    assert_eq!(guest.step(INFLATE), Step::Served { interrupt: false });
    // The same place in the table, before it is looked at again.
    guest.describe(INFLATE, 0, (LIST, 4, 0));
    assert_eq!((guest.step(INFLATE), guest.used(INFLATE)), (SERVED, 1));
    guest.offer_pages(INFLATE, &[500]);
    assert_eq!(guest.step(INFLATE), SERVED);
    assert_eq!(guest.given_back(), [400, 500]);
}

#[test]
fn a_reset_forgets_a_list_that_was_begun() {
    let mut guest = Guest::without(0);
    guest.offer_pages(INFLATE, &vec![400; 1500]);
    assert_eq!(guest.step(INFLATE), Step::Served { interrupt: false });
    guest.begin(0);
    guest.offer_pages(INFLATE, &[500]);
    assert_eq!(guest.step(INFLATE), SERVED);
    assert_eq!(guest.given_back(), [400, 500]);
}

#[test]
fn host_and_driver_tell_each_other_sizes() {
    let mut guest = Guest::without(0);
    guest.wish.set_mib(3).unwrap();
    assert_eq!(guest.config(), [0, 0], "a configuration changes when the driver is told");
    let generation = guest.get(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    assert!(guest.device.refresh());
    assert_eq!(guest.config(), [3 * 256, 0]);
    assert_ne!(guest.get(reg::VIRTIO_MMIO_CONFIG_GENERATION), generation);
    guest.set(reg::VIRTIO_MMIO_CONFIG, 1);
    guest.set(reg::VIRTIO_MMIO_CONFIG + 4, 2 * 256 + 255);
    assert_eq!(guest.config(), [3 * 256, 2 * 256 + 255], "the target is not the driver's to write");
    assert_eq!(guest.wish.actual_mib(), 2);
    for too_much in [4, u32::MAX] {
        guest.wish.set_mib(too_much).unwrap_err();
    }
    guest.device.refresh();
    assert_eq!(guest.config()[0], 3 * 256, "it cannot leave all it has");
    guest.set(reg::VIRTIO_MMIO_CONFIG + 4, u32::MAX);
    assert_eq!(guest.wish.actual_mib(), 4, "nor can it have left more");
    guest.begin(0);
    assert_eq!((guest.config()[1], guest.wish.actual_mib()), (0, 0), "after a reset it is empty");
}

//! Requests that are under way when the driver takes its memory back, all is to stand still, or the disk goes.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use storage_block::{Rate, RawFile};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::*;

const GET_ID: u32 = 8;

const ONE_A_MINUTE: IoLimits = IoLimits { ops: Some(Rate { per_second: 1, burst: 1 }), bytes: None };

/// What takes the memory back from a device.
type TakeBack = (&'static str, fn(&mut Guest));

const TAKE_BACK: [TakeBack; 4] = [
    ("a reset", |guest| assert_eq!(guest.0.set(reg::VIRTIO_MMIO_STATUS, 0), Effect::Reset)),
    ("a driver that has given up", |guest| _ = guest.0.set(reg::VIRTIO_MMIO_STATUS, 128 | 15)),
    ("a queue that is taken back", |guest| assert_eq!(guest.stop_queue(0), Effect::Notify)),
    ("a driver that breaks the rules", |guest| {
        guest.0.set(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        assert!(matches!(guest.0.set(reg::VIRTIO_MMIO_QUEUE_NUM, 8), Effect::Broken(_)));
    }),
];

#[test]
fn nothing_is_written_to_a_driver_that_has_taken_its_memory_back() {
    for (what, take_back) in TAKE_BACK {
        let (disk, did, go_on) = gated(2);
        let mut guest = Guest::new(&disk, 1, 0);
        guest.offer(0, 0, IN, 0);
        guest.offer(0, 1, IN, 1);
        assert_ne!(guest.0.step(0), Step::Idle);
        // Both are under way, and go on from here.
        let mut begun = [did.recv().unwrap(), did.recv().unwrap()];
        begun.sort_by_key(|did| *did == Did::Begin(1));
        assert_eq!(begun, [Did::Begin(0), Did::Begin(1)], "{what}");
        drop(go_on);
        take_back(&mut guest);
        let mut ended = told(&did);
        ended.sort_by_key(|did| *did == Did::Read(1));
        assert_eq!(ended, [Did::Read(0), Did::Read(1)], "{what} waits for both");
        assert!(guest.is_at_rest(), "{what}");
        assert_eq!(guest.0.step(0), Step::Idle, "{what}");
        assert_eq!((guest.used(0), guest.status(0, 0), guest.status(0, 1)), (vec![], NONE, NONE), "{what}");
        // It can begin anew.
        guest.0.begin(0);
        guest.offer(0, 0, IN, 9);
        guest.serve(0, 1);
        assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK), "{what}");
    }
}

#[test]
fn what_has_not_begun_never_does_when_the_memory_is_taken_back() {
    for (what, take_back) in TAKE_BACK {
        let (disk, _limiter) = limited(ONE_A_MINUTE);
        let mut guest = Guest::new(&disk, 1, 0);
        (0..20).for_each(|n| guest.offer(0, n, IN, 0));
        guest.0.step(0);
        let begun = Instant::now();
        take_back(&mut guest);
        assert!(begun.elapsed().as_secs() < 10, "{what} waits for the disk's limits");
        assert!(guest.is_at_rest(), "{what}");
    }
}

#[test]
fn other_queues_go_on_when_one_is_taken_back() {
    let (disk, did, go_on) = gated(2);
    let mut guest = Guest::new(&disk, 2, 0);
    guest.offer(0, 0, IN, 0);
    guest.offer(1, 0, IN, 1);
    assert_ne!((guest.0.step(0), guest.0.step(1)), (Step::Idle, Step::Idle));
    let _begun = [did.recv().unwrap(), did.recv().unwrap()];
    drop(go_on);
    assert_eq!(guest.stop_queue(1), Effect::Notify, "its thread has to look");
    assert_eq!((guest.used(0), guest.used(1)), (vec![], vec![]));
    assert_eq!(guest.serve_all(0), Step::Served { interrupt: true });
    assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK));
    assert_eq!((guest.0.step(1), guest.used(1), guest.status(1, 0)), (Step::Idle, vec![], NONE));
}

#[test]
fn a_machine_that_is_to_stand_still_finishes_what_it_has_begun() {
    let (disk, did, go_on) = gated(2);
    let mut guest = Guest::new(&disk, 2, 0);
    guest.offer(0, 0, IN, 0);
    guest.offer(1, 0, IN, 1);
    guest.0.step(0);
    guest.0.step(1);
    let _begun = [did.recv().unwrap(), did.recv().unwrap()];
    // This one comes too late.
    guest.offer(0, 1, IN, 2);
    drop(go_on);
    for queue in 0..2 {
        assert_eq!(guest.settle(queue), Step::Served { interrupt: true });
        assert_eq!((guest.used(queue), guest.status(queue, 0)), (vec![0], OK));
        assert_eq!(guest.settle(queue), Step::Idle);
    }
    assert!(guest.is_at_rest());
    guest.serve(0, 2);
    assert_eq!(guest.status(0, 1), OK);
}

/// A machine that is saved does not wait for the limits of its disks, and nothing is lost or done twice. One of the requests
/// needs no disk, and must not be answered before those that were taken before it.
#[test]
fn what_the_limits_have_not_let_begin_goes_back_to_the_queue() {
    let at_once: [Offer; 4] = [
        |guest, n| guest.offer(0, n, GET_ID, 0),
        |guest, n| guest.offer_range(0, n, WRITE_ZEROES, 0, 0),
        |guest, n| guest.offer_range(0, n, DISCARD, 0, 0),
        |guest, n| guest.offer_empty(0, n, OUT),
    ];
    at_once.iter().for_each(goes_back_to_the_queue);
}

/// How a request is offered.
type Offer = fn(&mut Guest, u16);

fn goes_back_to_the_queue(at_once: &Offer) {
    const REQUESTS: u16 = 20;
    const AT_ONCE: u16 = 12;
    let limiter = Limiter::new(IoLimits { ops: Some(Rate { per_second: 1, burst: 5 }), bytes: None });
    // Of a disk in memory nobody discards anything.
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[ON_DISK; 1 << 20], 0).unwrap();
    let disk = RawFile::from_file(file, false).unwrap().into_disk().limited(&limiter);
    let mut guest = Guest::new(&disk, 2, 0);
    for n in 0..REQUESTS {
        if n == AT_ONCE { at_once(&mut guest, n) } else { guest.offer(0, n, IN, 0) }
    }
    guest.offer(1, 0, IN, 0);
    (0..4).for_each(|_| _ = guest.0.step(0));
    guest.0.step(1);
    guest.settle(0);
    let done = guest.used(0);
    assert!((1..=10).contains(&done.len()), "{done:?}");
    assert_eq!(guest.settle(1), Step::Idle);
    assert!(guest.is_at_rest());
    // Saved, and restored as another.
    let saved = guest.0.device.save();
    limiter.set(IoLimits::NONE);
    let other = MemoryDisk::from_vec(vec![ON_DISK; 1 << 20]).unwrap().into_disk();
    let mut restored = Mmio::new(Block::new(other, "vol-1", 2));
    restored.restore(&guest.0.memory, &saved).unwrap();
    guest.0.device = restored;
    guest.serve_all(0);
    guest.serve_all(1);
    let mut used = guest.used(0);
    assert!(used.starts_with(&done));
    used.sort_unstable();
    assert_eq!((used, guest.used(1)), ((0..REQUESTS).collect(), vec![0]));
    assert!((0..REQUESTS).all(|n| guest.status(0, n) == OK));
    assert!((0..REQUESTS).filter(|n| *n != AT_ONCE).all(|n| guest.data(0, n) == [ON_DISK; SECTOR]));
}

#[test]
fn a_write_that_is_not_durable_yet_becomes_so_before_all_stands_still() {
    // The write passes at once, and its flush a tenth of a second later.
    let (disk, did, _go_on) = gated(0);
    let limiter = Limiter::new(IoLimits { ops: Some(Rate { per_second: 10, burst: 1 }), bytes: None });
    let mut guest = Guest::new(&disk.limited(&limiter), 1, CAN_FLUSH);
    guest.offer(0, 0, OUT, 0);
    guest.0.step(0);
    assert_eq!(guest.settle(0), Step::Served { interrupt: true });
    assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK));
    assert_eq!(told(&did), [Did::Write(0), Did::Flush]);
}

/// So that it is not the limits, of which the flushes would be ten more operations, that a pause waits for.
#[test]
fn many_writes_become_durable_by_one_flush_before_all_stands_still() {
    const WRITES: u16 = 10;
    let (disk, did, _go_on) = gated(0);
    let once = Rate { per_second: 10, burst: WRITES.into() };
    let limiter = Limiter::new(IoLimits { ops: Some(once), bytes: None });
    let mut guest = Guest::new(&disk.limited(&limiter), 1, CAN_FLUSH);
    (0..WRITES).for_each(|n| guest.offer(0, n, OUT, n.into()));
    guest.0.step(0);
    assert_eq!(guest.settle(0), Step::Served { interrupt: true });
    assert!(guest.is_at_rest());
    assert!((0..WRITES).all(|n| guest.status(0, n) == OK));
    let did = told(&did);
    assert_eq!(did.iter().filter(|did| **did == Did::Flush).count(), 1);
    assert_eq!(did.last(), Some(&Did::Flush));
}

#[test]
fn requests_of_a_disk_that_was_taken_by_force_fail() {
    let (disk, _limiter) = limited(ONE_A_MINUTE);
    let mut guest = Guest::new(&disk, 1, CAN_FLUSH);
    (0..8).for_each(|n| guest.offer(0, n, OUT, 0));
    guest.0.step(0);
    let begun = Instant::now();
    guest.0.device.end();
    guest.serve(0, 8);
    assert!(begun.elapsed().as_secs() < 10, "it waits for the disk's limits");
    assert!(guest.is_at_rest());
    assert!((0..8).all(|n| guest.status(0, n) == IOERR));
}

/// However long a guest's requests are, whoever ends its machine waits for few of them.
#[test]
fn long_requests_are_not_under_way_together() {
    let (disk, _did, go_on) = gated(3);
    let mut guest = Guest::new(&disk, 1, 0);
    for (n, mib) in [(0, 12), (1, 4), (2, 4), (3, 64)] {
        guest.offer_zeroes(0, n, n.into(), mib);
    }
    guest.0.step(0);
    assert_eq!(taken(&guest, 0), 2, "16 MiB are");
    guest.0.step(0);
    assert_eq!(taken(&guest, 0), 2);
    go_on.send(()).unwrap();
    while guest.0.used(0) == 0 {
        poll(&mut [PollFd::new(&guest.0.device.ended().unwrap(), PollFlags::IN)], None).unwrap();
        guest.0.step(0);
    }
    assert!((2..=3).contains(&taken(&guest, 0)), "{}", taken(&guest, 0));
    drop(go_on);
    guest.serve(0, 4);
    assert!((0..4).all(|n| guest.status(0, n) == OK), "one that is longer by itself is served, too");
}

/// The first queue could begin a request whenever one of its own ends, and leave no room for another's for ever.
#[test]
fn long_requests_do_not_wait_for_those_of_other_queues() {
    let (disk, _did, _go_on) = gated(4);
    let mut guest = Guest::new(&disk, 2, 0);
    (0..2).for_each(|n| guest.offer_zeroes(0, n, n.into(), 8));
    guest.offer_zeroes(1, 0, 2, 64);
    guest.offer_zeroes(1, 1, 3, 1);
    guest.0.step(0);
    guest.0.step(1);
    assert_eq!([0, 1].map(|queue| taken(&guest, queue)), [1, 1], "8 MiB of each, or one request");
    drop(_go_on);
    guest.serve(0, 2);
    guest.serve(1, 2);
}

/// How many requests of a queue were taken up.
fn taken(guest: &Guest, queue: usize) -> u16 {
    guest.0.device.save().core.rings[queue].at.unwrap().0
}

/// The guest's memory stays for as long as a request uses it, whoever has let go of it.
#[test]
fn the_memory_outlives_the_requests() {
    let (disk, did, go_on) = gated(1);
    let mut guest = Guest::new(&disk, 1, 0);
    guest.offer(0, 0, IN, 0);
    guest.0.step(0);
    assert_eq!(did.recv().unwrap(), Did::Begin(0));
    let Guest(Driver { memory, device, .. }) = guest;
    let data = memory.get_host_address(GuestAddress(request_at(0, 0) + 512)).unwrap() as usize;
    drop(memory);
    let dropped = std::thread::spawn(move || drop(device));
    assert!(is_mapped(data), "the disk is going to write there");
    go_on.send(()).unwrap();
    dropped.join().unwrap();
    assert_eq!(did.recv().unwrap(), Did::Read(0));
}

fn is_mapped(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
        (start..end).contains(&address)
    })
}

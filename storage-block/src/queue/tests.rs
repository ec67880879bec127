use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::testing::Random;
use crate::testing::queue::queue_of;
use crate::{BlockBackend, ErrorKind, IoLimits, MemoryDisk, Rate, RawFile};

fn raw(bytes: &[u8]) -> Disk {
    use std::os::unix::fs::FileExt;

    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    RawFile::from_file(file, false).unwrap().into_disk()
}

/// The engines that there are here, with a queue of each.
fn queues(disk: &Disk, depth: u32) -> Vec<Queue> {
    [Engine::Threads, Engine::IoUring]
        .into_iter()
        .filter_map(|engine| queue_of(disk, depth, engine))
        .collect()
}

#[test]
fn a_queue_can_go_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Queue>();
    is_send::<Completion>();
}

/// Every shape of buffers, aligned or not, on a file whose bytes all differ from their neighbours.
#[test]
fn buffers_of_any_shape() {
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let disk = raw(&bytes);
    for mut queue in queues(&disk, 8) {
        let mut random = Random(5);
        for _ in 0..200 {
            let lens: Vec<_> = (0..random.below(9)).map(|_| random.below(10_000) as usize).collect();
            let len = lens.iter().sum::<usize>();
            let offset = random.below((bytes.len() - len) as u64);
            let mut memory: Vec<_> = lens.iter().map(|len| vec![0; *len]).collect();
            let mut bufs: Vec<_> = memory.iter_mut().map(|part| IoBufMut::new(part)).collect();
            // SAFETY: the memory is not touched before the completion.
            unsafe { queue.read_raw(1, offset, &mut bufs) };
            queue.wait().unwrap().result.unwrap();
            assert!(memory.concat() == bytes[offset as usize..][..len], "{lens:?} at {offset}");
        }
    }
}

/// More buffers than the kernel takes at once.
#[test]
fn many_small_buffers() {
    let disk = raw(&[0; 8192]);
    for mut queue in queues(&disk, 1) {
        let bytes: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        let bufs: Vec<_> = bytes.chunks(2).map(IoBuf::new).collect();
        // SAFETY: the memory outlives the completion.
        unsafe { queue.write_raw(1, 77, &bufs) };
        queue.wait().unwrap().result.unwrap();
        queue.read(2, 77, vec![0; 5000]);
        assert_eq!(queue.wait().unwrap().buffer.unwrap(), bytes);
    }
}

/// What a disk refuses is reported, and what follows is not kept from being served.
#[test]
fn refused_requests() {
    let disk = raw(&[7; 4096]);
    let file = tempfile::tempfile().unwrap();
    let read_only = RawFile::from_file(file, true).unwrap().into_disk();
    for mut queue in queues(&disk, 2) {
        queue.read(1, 4096, vec![0; 1]);
        queue.write(2, u64::MAX, vec![0; 1]);
        queue.discard(3, 1, u64::MAX);
        queue.write_zeroes(4, 4095, 2);
        queue.read(5, 4096, Vec::new());
        queue.read(6, 4095, vec![0; 1]);
        // Two buffers of more bytes than can be counted, neither of which is ever looked at.
        let start = std::ptr::NonNull::<u8>::dangling().as_ptr();
        // SAFETY: so many bytes are on no disk, so that the request is refused.
        unsafe {
            queue.write_raw(7, 0, &[IoBuf::from_raw(start, usize::MAX), IoBuf::from_raw(start, usize::MAX)]);
        }
        let mut kinds: Vec<_> = std::iter::from_fn(|| queue.wait())
            .map(|done| (done.token, done.result.err().map(|error| error.kind())))
            .collect();
        kinds.sort_by_key(|(token, _)| *token);
        let out = Some(ErrorKind::OutOfBounds);
        assert_eq!(kinds, [(1, out), (2, out), (3, out), (4, out), (5, None), (6, None), (7, out)]);
    }
    for mut queue in queues(&read_only, 2) {
        queue.write(1, 0, Vec::new());
        assert_eq!(queue.wait().unwrap().result.unwrap_err().kind(), ErrorKind::ReadOnly);
        queue.flush(2);
        queue.wait().unwrap().result.unwrap();
        assert!(queue.wait().is_none());
    }
}

/// A file that was cut short behind its disk's back: an error with the backend's own words.
#[test]
fn a_file_that_ends_early() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for engine in 0..2 {
        std::fs::write(&path, [1; 8192]).unwrap();
        let disk = RawFile::open(&path, true).unwrap().into_disk();
        let mut queues = queues(&disk, 4);
        let Some(queue) = queues.get_mut(engine) else { continue };
        std::fs::write(&path, [1; 5000]).unwrap();
        queue.read(1, 0, vec![0; 8192]);
        queue.read(2, 4500, vec![0; 500]);
        let mut results: Vec<_> = std::iter::from_fn(|| queue.wait()).map(|d| (d.token, d.result)).collect();
        results.sort_by_key(|(token, _)| *token);
        assert!(results[1].1.is_ok());
        let error = results.remove(0).1.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.to_string(), format!("cannot read 3192 bytes at 5000 of {}", path.display()));
    }
}

/// The descriptor is readable when there is something to collect, and not when all was collected.
#[test]
fn the_descriptor_tells_the_truth() {
    for limited in [false, true] {
        let mut disk = raw(&[7; 1 << 16]);
        if limited {
            disk = disk.limited(&Limiter::new(IoLimits::NONE));
        }
        for mut queue in queues(&disk, 4) {
            queue.read(0, 0, vec![0; 512]);
            queue.submit();
            for round in 0..20 {
                // The first request was submitted before anybody asked for the descriptor.
                let mut left = 1;
                if round > 0 {
                    for token in 0..6 {
                        queue.read(token, token * 4096, vec![0; 4096]);
                    }
                    queue.read(6, u64::MAX, vec![0; 1]);
                    queue.write(7, 512, vec![1; 512]);
                    queue.submit();
                    left = 8;
                }
                while left > 0 {
                    poll(&mut [PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN)], None).unwrap();
                    left -= std::iter::from_fn(|| queue.completed()).count();
                }
                assert!(queue.completed().is_none());
                // A signal may come after what it tells of was taken; it is then the last.
                let unread = (0..100).find(|_| !readable(&mut queue) || queue.completed().is_some());
                assert!(unread.is_some(), "{:?}, round {round}: it is always readable", queue.engine());
                assert_eq!(queue.in_flight(), 0);
            }
        }
    }
}

/// The descriptor that is asked for again tells of what has ended meanwhile, and of nothing else.
#[test]
fn the_descriptor_is_watched_again() {
    for mut queue in queues(&raw(&[7; 1 << 16]), 4) {
        for round in 0..20 {
            assert!(!readable(&mut queue), "{:?}, round {round}", queue.engine());
            queue.unwatch();
            (0..4).for_each(|token| queue.read(token, token * 4096, vec![0; 4096]));
            queue.submit();
            let mut left = 4;
            if round % 2 == 0 {
                // All have ended before somebody watches.
                left -= [0; 4].into_iter().filter_map(|_| queue.wait()).count();
            }
            while left > 0 {
                poll(&mut [PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN)], None).unwrap();
                left -= std::iter::from_fn(|| queue.completed()).count();
            }
            // The last signal may come after what it tells of was taken.
            let unread = (0..100).find(|_| !readable(&mut queue) || queue.completed().is_some());
            assert!(unread.is_some(), "{:?}, round {round}: it is always readable", queue.engine());
        }
    }
}

/// What ends without an engine is signalled too.
#[test]
fn what_is_refused_is_signalled() {
    for mut queue in queues(&raw(&[7; 4096]), 4) {
        assert!(!readable(&mut queue));
        queue.read(1, 4096, vec![0; 1]);
        queue.submit();
        assert!(readable(&mut queue), "{:?}", queue.engine());
        assert!(queue.completed().is_some_and(|done| done.result.is_err()));
    }
}

fn readable(queue: &mut Queue) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN)], Some(&now)).unwrap() > 0
}

/// A disk that says when a request begins, and ends it when it is told to.
#[derive(Debug)]
struct Gated {
    began: Mutex<Sender<u64>>,
    go_on: Mutex<Receiver<()>>,
}

impl BlockBackend for Gated {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_at(&self, _: &mut [u8], offset: u64) -> Result<()> {
        self.began.lock().unwrap_or_else(PoisonError::into_inner).send(offset).unwrap();
        // Who is gone lets everybody go on.
        let _ = self.go_on.lock().unwrap_or_else(PoisonError::into_inner).recv();
        assert_ne!(offset, 4096, "a backend that panics");
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

fn gated(depth: u32) -> (Queue, Receiver<u64>, Sender<()>) {
    let (began, has_begun) = channel();
    let (let_go, go_on) = channel();
    let disk = Disk::new(Gated { began: Mutex::new(began), go_on: Mutex::new(go_on) }).unwrap();
    (disk.queue(depth).unwrap(), has_begun, let_go)
}

#[test]
fn no_more_at_once_than_the_depth() {
    let (mut queue, began, go_on) = gated(3);
    for token in 0..7 {
        queue.read(token, token * 8192, vec![0; 512]);
    }
    queue.submit();
    let mut first: Vec<_> = (0..3).map(|_| began.recv().unwrap()).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 8192, 2 * 8192]);
    assert!(queue.completed().is_none());
    assert_eq!((began.try_recv().ok(), queue.in_flight()), (None, 7));
    for _ in 0..7 {
        go_on.send(()).unwrap();
    }
    assert_eq!(std::iter::from_fn(|| queue.wait()).count(), 7);
}

#[test]
fn a_panic_is_an_error() {
    let (mut queue, _began, go_on) = gated(1);
    queue.read(1, 4096, vec![0; 512]);
    queue.read(2, 0, vec![0; 512]);
    drop(go_on);
    assert_eq!(queue.wait().unwrap().result.unwrap_err().kind(), ErrorKind::Io);
    queue.wait().unwrap().result.unwrap();
}

/// A request that waits for one limit has taken of another, and gives that back if it is not made.
#[test]
fn what_is_not_made_takes_nothing_of_a_limit() {
    let bytes =
        |burst| Limiter::new(IoLimits { bytes: Some(Rate { per_second: 1, burst }), ..IoLimits::NONE });
    for end in [|mut queue: Queue| queue.cancel(), |queue: Queue| drop(queue)] {
        // After the first request one byte is left of the wide one, and the narrow one keeps the second for an hour.
        let (wide, narrow) = (bytes(4097), bytes(1));
        let disk = MemoryDisk::new(1 << 20).unwrap().into_disk().limited(&wide).limited(&narrow);
        let mut queue = disk.queue(8).unwrap();
        (0..3).for_each(|token| queue.read(token, 0, vec![0; 4096]));
        queue.submit();
        let waits = wide.delay().expect("the second has passed it");
        assert!(waits > Duration::from_secs(3600), "{waits:?}");
        end(queue);
        assert_eq!(wide.delay(), None);
        assert!(narrow.delay().is_some(), "the first was made");
    }
}

/// What has begun ends as ever, and what has not is reported and never begins.
#[test]
fn cancelling() {
    let (mut queue, began, go_on) = gated(1);
    for token in 0..4 {
        queue.read(token, token * 8192, vec![token as u8; 512]);
    }
    queue.submit();
    assert_eq!(began.recv(), Ok(0));
    assert!(queue.completed().is_none());
    queue.cancel();
    for token in 1..4 {
        let done = queue.completed().unwrap();
        assert_eq!((done.token, done.buffer), (token, Some(vec![token as u8; 512])));
        assert_eq!(done.result.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert!(queue.completed().is_none());
    queue.read(4, 4 * 8192, vec![0; 512]);
    drop(go_on);
    assert_eq!(
        [0, 4].map(|_| queue.wait().map(|done| (done.token, done.result.is_ok()))),
        [0, 4].map(|n| Some((n, true)))
    );
    assert_eq!((began.try_iter().collect::<Vec<_>>(), queue.in_flight()), (vec![4 * 8192], 0));
}

/// As cancelling, and of what was submitted that for which there is no thread yet.
#[test]
fn abandoning() {
    let (began, has_begun) = channel();
    let (let_go, go_on) = channel();
    let disk = Disk::new(Gated { began: Mutex::new(began), go_on: Mutex::new(go_on) }).unwrap();
    let mut queue = disk.queue_with(&QueueOptions::new(4).threads(1)).unwrap();
    (0..6).for_each(|token| queue.read(token, token * 8192, vec![0; 512]));
    queue.submit();
    assert_eq!(has_begun.recv(), Ok(0));
    queue.abandon();
    let mut abandoned: Vec<_> = std::iter::from_fn(|| queue.completed())
        .map(|done| (done.token, done.result.unwrap_err().kind()))
        .collect();
    abandoned.sort_by_key(|(token, _)| *token);
    assert_eq!(abandoned, [1, 2, 3, 4, 5].map(|token| (token, ErrorKind::Cancelled)));
    drop(let_go);
    assert_eq!(queue.wait().map(|done| (done.token, done.result.is_ok())), Some((0, true)));
    assert_eq!((queue.in_flight(), has_begun.try_iter().count()), (0, 0));
    // It goes on.
    queue.read(6, 0, vec![0; 512]);
    assert!(queue.wait().unwrap().result.is_ok());
}

/// Dropping a queue waits for what has begun and for nothing else.
#[test]
fn dropping_waits() {
    let (mut queue, began, go_on) = gated(1);
    queue.read(0, 0, vec![0; 512]);
    queue.read(1, 8192, vec![0; 512]);
    queue.submit();
    assert_eq!(began.recv(), Ok(0));
    let dropped = std::thread::spawn(move || drop(queue));
    assert!(!dropped.is_finished());
    go_on.send(()).unwrap();
    dropped.join().unwrap();
    assert_eq!(began.try_iter().count(), 0, "the second never began");
}

/// Limits hold back what goes beyond them, not whoever submits it.
#[test]
fn limits_delay_and_do_not_block() {
    let rate = Rate { per_second: 100, burst: 5 };
    for memory in [false, true] {
        let disk = if memory { MemoryDisk::new(1 << 20).unwrap().into_disk() } else { raw(&[0; 1 << 20]) };
        let limiter = Limiter::new(IoLimits { ops: Some(rate), ..IoLimits::NONE });
        let mut queue = disk.limited(&limiter).queue(64).unwrap();
        let start = Instant::now();
        for token in 0..20 {
            queue.read(token, token * 4096, vec![0; 4096]);
        }
        queue.submit();
        assert!(queue.running() + queue.ready.len() < 20, "all of them began at once");
        assert_eq!(std::iter::from_fn(|| queue.wait()).count(), 20);
        assert!(start.elapsed() >= Duration::from_millis(140), "fifteen at a hundred in a second");
        // Hours to go, until the limits are lifted.
        limiter.wait(crate::limit::Cost { ops: 1, bytes: 0 }, None).unwrap();
        limiter.set(IoLimits { ops: Some(Rate { per_second: 1, burst: 1 }), ..IoLimits::NONE });
        for token in 0..10_000 {
            queue.read(token, 0, vec![0; 512]);
        }
        queue.submit();
        assert!(queue.in_flight() >= 9_998);
        limiter.set(IoLimits::NONE);
        while queue.in_flight() > 0 {
            poll(&mut [PollFd::from_borrowed_fd(queue.fd().as_fd(), PollFlags::IN)], None).unwrap();
            while let Some(done) = queue.completed() {
                done.result.unwrap();
            }
        }
    }
}

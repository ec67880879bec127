//! Requests in flight.

use super::{Random, compare};
use crate::{Disk, Engine, Queue, QueueOptions};

/// Zones that have one request in flight at most, so that it is known what each finds.
const ZONES: u64 = 24;

/// A queue that is served by this engine, if it is to be had here: a kernel may not let this process have a ring, which is
/// said aloud. Where it lets it have one and we do not get one, nothing may be left out under CI.
pub(crate) fn queue_of(disk: &Disk, depth: u32, engine: Engine) -> Option<Queue> {
    let error = match disk.queue_with(&QueueOptions::new(depth).engine(engine)) {
        Ok(queue) => return Some(queue),
        Err(error) => error,
    };
    assert!(engine == Engine::IoUring, "there is no queue: {error}");
    let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
    let kernel_has_rings = io_uring::IoUring::new(2).is_ok();
    let must = std::env::var_os("CI").is_some() && kernel_has_rings;
    assert!(!must, "the kernel lets this process have a ring, and CI needs the engine that uses one: {why}");
    eprintln!("SKIPPED: io_uring is not to be had here and not tested: {why}");
    None
}

enum Expect {
    Bytes(Vec<u8>),
    Done,
}

/// Random requests, several at once, by every engine that there is.
pub(crate) fn random_requests(disk: &Disk, count: usize) {
    let mut oracle = vec![0; disk.size() as usize];
    let zone_len = disk.size() / ZONES;
    for engine in [Engine::Threads, Engine::IoUring] {
        let Some(mut queue) = queue_of(disk, 16, engine) else { continue };
        let mut random = Random(engine as u64);
        let mut expected: Vec<Option<Expect>> = (0..=ZONES).map(|_| None).collect();
        let (mut pushed, mut reported) = (0, 0);
        while reported < count {
            while pushed < count && pushed - reported < 20 {
                pushed += 1;
                let zone = random.below(ZONES + 1);
                let slot = &mut expected[zone as usize];
                if slot.is_some() {
                    pushed -= 1;
                    break;
                }
                *slot = Some(Expect::Done);
                if zone == ZONES {
                    queue.flush(zone);
                    continue;
                }
                let align = [1, 512, 4096][random.below(3) as usize];
                let within = random.below(zone_len / align) * align;
                let limit = (zone_len - within).min([512, 4096, 80_000][random.below(3) as usize]);
                let len = random.below(limit) + 1;
                let offset = zone * zone_len + within;
                let range = offset as usize..(offset + len) as usize;
                match random.below(6) {
                    0..=1 => {
                        *slot = Some(Expect::Bytes(oracle[range].to_vec()));
                        queue.read(zone, offset, vec![0xee; len as usize]);
                    }
                    2..=3 => {
                        let bytes: Vec<_> = (0..len).map(|_| random.below(255) as u8 + 1).collect();
                        oracle[range].copy_from_slice(&bytes);
                        queue.write(zone, offset, bytes);
                    }
                    4 => {
                        oracle[range].fill(0);
                        queue.discard(zone, offset, len);
                    }
                    _ => {
                        oracle[range].fill(0);
                        queue.write_zeroes(zone, offset, len);
                    }
                }
            }
            queue.submit();
            let done = queue.wait().expect("a request in flight");
            reported += 1;
            done.result.unwrap_or_else(|error| panic!("{engine:?}: a request failed: {error}"));
            let expected = expected.get_mut(done.token as usize).and_then(Option::take);
            match expected.unwrap_or_else(|| panic!("{engine:?}: token {} is reported again", done.token)) {
                Expect::Bytes(bytes) => {
                    assert!(done.buffer.as_deref() == Some(&*bytes), "{engine:?}: a read finds other bytes");
                }
                Expect::Done => {}
            }
        }
        assert!(queue.wait().is_none() && queue.in_flight() == 0, "{engine:?}: too many reports");
        drop(queue);
        compare(disk, &oracle, "after requests in a queue");
    }
}

//! What requests cost where disks have limits.

use crate::{Capabilities, IoLimits, Limiter, Rate, testing};

/// Whether a request uses up what is let pass: a read after it, in a queue, has to wait then.
fn is_charged(cheap_zeroes: bool, discard_frees: bool, queued: bool, discard: bool) -> bool {
    let capabilities = Capabilities { cheap_zeroes, discard_frees, ..Capabilities::default() };
    let disk = testing::claiming(1 << 20, capabilities).unwrap();
    // It takes a day to make good for a mebibyte.
    let limiter =
        Limiter::new(IoLimits { bytes: Some(Rate { per_second: 12, burst: 4096 }), ..IoLimits::NONE });
    let disk = disk.limited(&limiter);
    let mut queue = disk.queue(4).unwrap();
    match (queued, discard) {
        (false, true) => disk.discard(0, 1 << 20).unwrap(),
        (false, false) => disk.write_zeroes(0, 1 << 20).unwrap(),
        (true, true) => queue.discard(0, 0, 1 << 20),
        (true, false) => queue.write_zeroes(0, 0, 1 << 20),
    }
    if queued {
        queue.wait().unwrap().result.unwrap();
    }
    let cost = disk.cost(crate::disk::Op::Read, 1);
    limiter.try_take(cost).is_err()
}

/// Zeroing that is writing counts the bytes that it writes.
#[test]
fn zeroes_that_are_written_are_charged() {
    for (cheap_zeroes, discard_frees) in [(false, false), (false, true), (true, false), (true, true)] {
        for queued in [false, true] {
            let charged = |discard| is_charged(cheap_zeroes, discard_frees, queued, discard);
            let what = format!("zeroes cheap {cheap_zeroes}, discards free {discard_frees}, queued {queued}");
            assert_eq!(charged(false), !cheap_zeroes, "zeroing: {what}");
            assert_eq!(charged(true), !cheap_zeroes && !discard_frees, "a discard: {what}");
        }
    }
}

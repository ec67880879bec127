//! A volume used by a queue while it is also stored.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{image, memory};
use crate::testing::queue::random_requests;
use crate::{Store, Volume};

/// Requests in flight find what they should while snapshots are taken and packs are swept.
#[test]
fn snapshots_under_a_queue() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (base, _) = store.import(&memory(&image(48, 0, 1)), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), 3 << 20).unwrap();
    volume.disk().discard(0, 3 << 20).unwrap();
    let stop = AtomicBool::new(false);
    let snapshots = std::thread::scope(|scope| {
        let storing = scope.spawn(|| {
            let mut taken = 0;
            while !stop.load(Ordering::Relaxed) {
                let (snapshot, _) = volume.snapshot(&store).unwrap();
                snapshot.verify().unwrap();
                store.sweep().remove_unreferenced(&HashSet::from([base.digest()])).unwrap();
                taken += 1;
            }
            taken
        });
        {
            // A failure ends the other thread too.
            let _stop = Stop(&stop);
            for _ in 0..3 {
                random_requests(&volume.disk(), 400);
                volume.disk().discard(0, 3 << 20).unwrap();
            }
        }
        storing.join().unwrap()
    });
    assert!(snapshots > 0);
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

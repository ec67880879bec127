//! What one writer flushes is durable whatever another is about.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, TryLockError};

use super::{Inner, Volume};
use crate::Store;
use crate::store::lock;
use crate::testing::Random;
use crate::tests::replay::{Cut, Disk, Keep, Names, Replay};
use crate::tests::scratch;
use crate::tests::tape::Tape;

type Act = Box<dyn FnOnce(&Inner) + Send>;

/// What a test does when a writer has put blocks into a new state, once.
#[derive(Default)]
pub(super) struct Between(Mutex<Option<Act>>);

impl Between {
    fn set(&self, act: impl FnOnce(&Inner) + Send + 'static) {
        *lock(&self.0) = Some(Box::new(act));
    }

    pub(super) fn pass(&self, inner: &Inner) {
        let act = lock(&self.0).take();
        if let Some(act) = act {
            act(inner);
        }
    }
}

impl fmt::Debug for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Between")
    }
}

/// Two write the same block, which nobody has written before. As soon as the first has it on the map the second finds it
/// there and has nothing to note itself; it flushes, and the power goes. Its flush has to wait until the first has noted it.
#[test]
fn a_flush_covers_a_block_that_another_has_begun_with() {
    const AT: u64 = 5 * 4096;
    let dir = scratch();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let tape = Tape::record(&root);
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&root.join("volume"), None, 1 << 20).unwrap();
    let disk = volume.disk();
    // There is a log already, and something in it.
    disk.write_at(&[9; 8192], 0).unwrap();
    disk.flush().unwrap();

    let (on_the_map, told) = channel();
    let flushed = Arc::new(AtomicBool::new(false));
    let is_flushed = Arc::clone(&flushed);
    volume.0.between.set(move |inner| {
        on_the_map.send(()).unwrap();
        // For as long as the list could be taken without what is to come onto it.
        let could_be = || !matches!(inner.pending.try_lock(), Err(TryLockError::WouldBlock));
        while could_be() && !is_flushed.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    });
    let steps = std::thread::scope(|scope| {
        let (disk, tape, flushed) = (&disk, &tape, &flushed);
        let second = scope.spawn(move || {
            told.recv().unwrap();
            disk.write_at(&[2; 512], AT + 512).unwrap();
            disk.flush().unwrap();
            let steps = tape.steps();
            flushed.store(true, Ordering::Release);
            steps
        });
        disk.write_at(&[1; 4096], AT).unwrap();
        second.join().unwrap()
    });

    let mut replay = Replay::from(Disk::default());
    steps.iter().for_each(|step| replay.step(step));
    let cut = Cut { names: Names::Ordered, keep_names: Keep::Nothing, keep_content: Keep::Nothing };
    let left = dir.path().join("left");
    replay.cut(cut, &mut Random(1)).put(&left);
    let after = Volume::open(&left.join("volume"), &store).unwrap();
    for (at, byte) in [(4096, 9), (AT + 512, 2)] {
        let mut found = [0; 512];
        after.disk().read_at(&mut found, at).unwrap();
        assert!(found == [byte; 512], "what was flushed at {at} is gone");
    }
}

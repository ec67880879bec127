//! A queue that is gone has left no thread and no descriptor. It is alone in its process, so that whatever is
//! left is its own.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::time::Instant;

use storage_block::{
    Disk, Engine, IoLimits, Limiter, MemoryDisk, Queue, QueueOptions, Rate, RawFile, Store, Volume,
};

/// Threads and descriptors of this process.
fn held() -> (usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// A queue that is served by this engine, if it is to be had here.
fn queue_of(disk: &Disk, engine: Engine) -> Option<Queue> {
    disk.queue_with(&QueueOptions::new(8).engine(engine))
        .inspect_err(|error| {
            let must = std::env::var_os("CI").is_some() && io_uring::IoUring::new(2).is_ok();
            assert!(
                engine == Engine::IoUring && !must,
                "CI needs every engine that the kernel allows: {error}"
            );
            eprintln!("SKIPPED: io_uring is not to be had here and not tested: {error}");
        })
        .ok()
}

#[test]
fn queues_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let image = MemoryDisk::from_vec(vec![7; 1 << 20]).unwrap().into_disk();
    let (base, _) = store.import(&image, &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), 1 << 20).unwrap();
    let raw = RawFile::create(dir.path().join("raw"), 1 << 20).unwrap().into_disk();
    let limiter = Limiter::new(IoLimits { ops: Some(Rate { per_second: 1, burst: 20 }), ..IoLimits::NONE });
    let disks = [image, raw.clone(), volume.disk(), raw.limited(&limiter)];
    // What is opened at the first read stays open with the store.
    volume.disk().read_at(&mut [0; 1 << 16], 0).unwrap();

    let before = held();
    for round in 0..4 {
        for disk in &disks {
            for engine in [Engine::Threads, Engine::IoUring] {
                let Some(mut queue) = queue_of(disk, engine) else { continue };
                assert!(held().1 > before.1, "a queue has a descriptor");
                for n in 0..40 {
                    queue.write(n, n * 4096, vec![1; 4096]);
                    queue.read(n, n * 4096 + 200_000, vec![0; 4096]);
                }
                queue.flush(100);
                queue.submit();
                // It goes with requests in flight, waiting, or ended and not reported.
                for _ in 0..(round * 6) {
                    queue.wait().unwrap().result.unwrap();
                }
                drop(queue);
                // A thread that has been joined may be listed for a moment more.
                let dropped = Instant::now();
                while held().0 > before.0 {
                    assert!(dropped.elapsed().as_secs() < 60, "{engine:?}: threads are left");
                    std::thread::yield_now();
                }
            }
        }
        limiter.set(IoLimits::NONE);
    }
    drop(disks);
    assert_eq!(held().1, before.1, "descriptors are left");
}

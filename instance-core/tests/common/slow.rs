//! A disk that waits.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::{Mutex, mpsc};

use storage_block::{BlockBackend, Disk};

/// A disk whose reads wait for somebody to let them on, or to go.
pub(crate) fn slow(disk: Disk) -> (Disk, mpsc::Sender<()>) {
    #[derive(Debug)]
    struct Slow(Disk, Mutex<mpsc::Receiver<()>>);
    impl BlockBackend for Slow {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_only(&self) -> bool {
            true
        }
        fn write_zeroes(&self, _: u64, _: u64) -> storage_block::Result<()> {
            unreachable!("nobody writes")
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
            let _ = self.1.lock().unwrap().recv();
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, _: &[u8], _: u64) -> storage_block::Result<()> {
            unreachable!("nobody writes")
        }
        fn flush(&self) -> storage_block::Result<()> {
            Ok(())
        }
    }
    let (go, let_on) = mpsc::channel();
    (Disk::new(Slow(disk, Mutex::new(let_on))).unwrap(), go)
}

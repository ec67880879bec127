//! Packs that are made durable while more is appended to them.

use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;

use crate::pack::Pack;
use crate::{Error, Result};

/// Bytes that are appended before they are sent to the disk: enough that what a synchronisation costs beside them
/// is little.
const STEP: u64 = 8 << 20;

/// Sends what a session appends to the disk, so that the disk works while the processors do, and little is left to
/// wait for at the end.
///
/// It promises nothing: what is to be durable is synchronised by whoever needs it, when all of it is written. What
/// that one would not be told any more is an error that was met here, and so [`finish`](Self::finish) tells it.
#[derive(Debug, Default)]
pub(crate) struct Writeback {
    /// Bytes that were appended since the disk was last told to go to work.
    waiting: u64,
    thread: Option<Thread>,
}

/// It is given packs, and ends when no more can come or one could not be synchronised.
type Thread = (SyncSender<Arc<Pack>>, JoinHandle<Result<()>>);

impl Writeback {
    /// So many bytes were written to a pack.
    pub(crate) fn wrote(&mut self, pack: &Arc<Pack>, len: u64) {
        self.waiting += len;
        if self.waiting < STEP {
            return;
        }
        if self.thread.is_none() {
            let (sender, packs) = mpsc::sync_channel::<Arc<Pack>>(0);
            let thread = std::thread::Builder::new().name("storage-sync".to_owned());
            let synced = move || packs.into_iter().try_for_each(|pack| sync(&pack));
            // Without a thread all is done at the end.
            self.thread = thread.spawn(synced).ok().map(|thread| (sender, thread));
        }
        let Some((sender, _)) = &self.thread else { return };
        // While it is busy with what it was given, more gathers.
        if !matches!(sender.try_send(Arc::clone(pack)), Err(TrySendError::Full(_))) {
            self.waiting = 0;
        }
    }

    /// Waits until nothing is under way, and says what went wrong.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some((sender, thread)) = self.thread.take() else { return Ok(()) };
        drop(sender);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Writeback {
    /// What is undone after this is not being written any more.
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

/// Makes what has been written to a pack durable.
pub(crate) fn sync(pack: &Pack) -> Result<()> {
    let synced = pack.file()?.sync_data();
    synced.map_err(|e| Error::io(e, format!("cannot write {}", pack.path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::fs::File;

    /// Tells it of so many bytes until it has taken them.
    fn insist(writeback: &mut Writeback, pack: &Arc<Pack>) {
        writeback.wrote(pack, STEP);
        while writeback.waiting > 0 {
            std::thread::yield_now();
            writeback.wrote(pack, 0);
        }
    }

    #[test]
    fn an_error_is_told_at_the_end_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let lost = Arc::new(Pack::new(1, path.clone(), 2));
        let file = File::create_new(&path).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let good = Arc::new(Pack::with_file(1, path.clone(), file));
        std::fs::remove_file(&path).unwrap();

        let mut writeback = Writeback::default();
        writeback.wrote(&lost, STEP - 1);
        assert!(writeback.thread.is_none(), "it is not enough to begin with");
        writeback.finish().unwrap();

        let mut writeback = Writeback::default();
        insist(&mut writeback, &good);
        insist(&mut writeback, &lost);
        // Nobody takes it any more, and nobody waits for that.
        insist(&mut writeback, &good);
        assert!(writeback.finish().is_err());
        writeback.finish().unwrap();
    }
}

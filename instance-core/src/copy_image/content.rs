//! Content of other regions that is brought here: whole, encrypted anew, or as what differs from what is here.

use ami_core::{Digest, VolumeId};
use storage_block::keys::EncryptionKey;
use storage_block::{Progress, Snapshot, Volume};

use crate::record::{ImageRecord, SnapshotRecord};
use crate::region::Inner;
use crate::{Error, ErrorKind, Result};

/// How much is copied at once: what a chunk of a snapshot holds.
const BLOCK: u64 = 64 << 10;
/// With how many contents of its own a region compares one that is to come, before all of it is copied.
const COMPARED: usize = 32;

impl Inner {
    /// Brings the content of another region here under a key, and gives its name here. Whoever calls keeps it from being
    /// collected.
    pub(super) fn encrypt_content(
        &self,
        wanted: &Snapshot,
        key: &EncryptionKey,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Digest> {
        let failed = |e| Error::storage(e, format!("cannot copy the content {}", wanted.digest()));
        let (made, _) = self.blocks.import_encrypted(&wanted.disk(), key, progress).map_err(failed)?;
        Ok(made.digest())
    }

    /// Brings the content of another region here as it is. Whoever calls keeps it from being collected.
    pub(super) fn copy_content(&self, wanted: &Snapshot, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let digest = wanted.digest();
        if self.blocks.snapshot(&digest).is_ok() {
            return Ok(());
        }
        let failed = |e| Error::storage(e, format!("cannot copy the content {digest}"));
        let made = match self.most_alike(wanted)? {
            Some(base) => self.copy_changed(&base, wanted, progress)?,
            None => self.blocks.import(&wanted.disk(), progress).map_err(failed)?.0,
        };
        match made.digest() == digest {
            true => Ok(()),
            false => {
                let what = format!("the content {digest} has become {}", made.digest());
                Err(Error::new(ErrorKind::Corrupt, what))
            }
        }
    }

    /// The content of this region from which the fewest blocks of `wanted` differ, if any is worth it.
    fn most_alike(&self, wanted: &Snapshot) -> Result<Option<Snapshot>> {
        let failed = |e| Error::storage(e, "cannot compare contents");
        let images = self.store.all::<ImageRecord>()?;
        let of_images =
            images.iter().flat_map(|record| record.image.ami().manifest().block_device_mappings());
        let of_images = of_images.filter_map(|mapping| mapping.content().copied());
        let of_users = self.store.all::<SnapshotRecord>()?.into_iter().map(|record| record.digest);
        let mut contents: Vec<Digest> = of_images.chain(of_users).collect();
        contents.sort_unstable();
        contents.dedup();
        let mut best = None;
        let mut fewest = wanted.blocks(BLOCK).map_err(failed)?.count();
        for digest in contents.iter().take(COMPARED) {
            // One that cannot be opened, or is larger than what a smaller volume could become, is no help.
            let Ok(base) = self.blocks.snapshot(digest) else { continue };
            if base.encrypted() || base.size() > wanted.size() {
                continue;
            }
            // No further than it can be the best.
            let differ = wanted.changed_blocks(&base, BLOCK).map_err(failed)?.take(fewest).count();
            if differ < fewest {
                (best, fewest) = (Some(base), differ);
            }
        }
        Ok(best)
    }

    /// Makes `wanted` of what is here: on a volume that no record names, so that nothing is left of it after a crash.
    fn copy_changed(
        &self,
        base: &Snapshot,
        wanted: &Snapshot,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Snapshot> {
        let failed = |e| Error::storage(e, format!("cannot copy the content {}", wanted.digest()));
        let id = VolumeId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let dir = self.paths.volume(id);
        let mut copy = || {
            let volume = Volume::create_unsynced(&dir, Some(base), wanted.size())?;
            let (from, to) = (wanted.disk(), volume.disk());
            let mut bytes = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
            for block in wanted.changed_blocks(base, BLOCK)? {
                let block = block?;
                let at = block.index * BLOCK;
                let len = BLOCK.min(wanted.size() - at);
                match block.after {
                    true => {
                        let part = &mut bytes[..usize::try_from(len).unwrap_or_default()];
                        from.read_at(part, at)?;
                        to.write_at(part, at)?;
                    }
                    false => to.discard(at, len)?,
                }
            }
            volume.snapshot_with(&self.blocks, progress).map(|(snapshot, _)| snapshot)
        };
        let made = copy().map_err(failed);
        // What stays is removed when the region is opened again.
        if let Err(e) = Volume::remove(&dir) {
            tracing::warn!(error = crate::error::chain(&e), "cannot remove what a copy was made on");
        }
        made
    }
}

//! Snapshots that are being made, in threads of their own.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use ami_core::{AccountId, SnapshotId, StateReason};
use storage_block::{Progress, Snapshot};

use super::take::Wanted;
use super::unfinished::UnfinishedSnapshotRecord;
use super::{SnapshotDescription, SnapshotState};
use crate::error::chain;
use crate::record::SnapshotRecord;
use crate::region::Inner;
use crate::tasks::{Failure, percent, reason_of};
use crate::watch::{Publisher, Watch};
use crate::{Error, ErrorKind, Result};

/// The most snapshots of an account that are pending at once (Amazon EBS User Guide, "Quotas").
const MOST: usize = 100;

/// A snapshot that is being made, by [`Region::begin_create_snapshot`](crate::Region::begin_create_snapshot). Cheap to clone;
/// all clones are the same snapshot, which comes to be without them.
///
/// It ends with its region, which cuts it off when it is closed and waits for that, or with its process: then it is one that
/// could not be made ([`Error`](SnapshotState::Error)).
///
/// ```
/// # use instance_core::{Region, testing::FakeHypervisor};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use std::time::{Duration, Instant};
/// use instance_core::{SnapshotState, VolumeSpec};
///
/// let volume = region.create_volume(VolumeSpec::new(1))?;
/// let backup = region.begin_create_snapshot(volume.id, "before the upgrade")?;
/// backup.watch().subscribe(|now| println!("{} is {}, {} %", now.id, now.state.as_str(), now.progress));
/// let made = backup.wait(Instant::now() + Duration::from_secs(60))?;
/// assert_eq!((made.id, made.state, made.progress), (backup.id(), SnapshotState::Completed, 100));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct PendingSnapshot(Arc<State>);

struct State {
    told: Publisher<SnapshotDescription>,
    /// Its user does not want it any more.
    given_up: AtomicBool,
    /// Nor does its region, which is being closed.
    cut_off: AtomicBool,
    failure: Mutex<Option<Failure>>,
}

impl PendingSnapshot {
    fn new(record: UnfinishedSnapshotRecord) -> Self {
        let (given_up, cut_off, failure) = Default::default();
        Self(Arc::new(State { told: Publisher::new(record.describe(0)), given_up, cut_off, failure }))
    }

    /// Its id.
    pub fn id(&self) -> SnapshotId {
        self.describe().id
    }

    /// What is known of it; its tags as they were when it began, until it is completed.
    pub fn describe(&self) -> SnapshotDescription {
        self.0.told.get()
    }

    /// What is known of it, to wait for: by blocking with a deadline or as a future. One that was given up is at last one that
    /// could not be made.
    pub fn watch(&self) -> Watch<SnapshotDescription> {
        self.0.told.watch()
    }

    /// Gives it up. It leaves nothing once it has [ended](Self::wait); if its process ends before, it is one that could not be
    /// made when the region is opened again. One that is [deleted](crate::Region::delete_snapshot) is gone for good at once. Does
    /// nothing to one that was given up.
    ///
    /// # Errors
    ///
    /// [`IncorrectState`](ErrorKind::IncorrectState) if it is completed, or could not be made: that is deleted. Whoever cancels
    /// when it is all but done may find it completed in the end.
    pub fn cancel(&self) -> Result<()> {
        let ended = match self.describe().state {
            SnapshotState::Pending => None,
            SnapshotState::Completed => Some("is completed"),
            // One that was given up ends so, too.
            SnapshotState::Error if self.is_given_up() => None,
            SnapshotState::Error => Some("could not be made"),
        };
        if let Some(ended) = ended {
            let what = format!("the snapshot {} {ended}", self.id());
            return Err(Error::new(ErrorKind::IncorrectState, what));
        }
        self.give_up();
        Ok(())
    }

    /// Blocks until it is completed, and gives what is known of it then.
    ///
    /// # Errors
    ///
    /// Why it could not be made, of which [`Cancelled`](ErrorKind::Cancelled) is one;
    /// [`IncorrectState`](ErrorKind::IncorrectState) if it is pending at the deadline.
    pub fn wait(&self, deadline: Instant) -> Result<SnapshotDescription> {
        match self.watch().wait(deadline, |now| now.state != SnapshotState::Pending) {
            Ok(now) if now.state == SnapshotState::Completed => Ok(now),
            Ok(now) => Err(match &*self.failure() {
                Some(failure) => failure.error(),
                None => Error::new(ErrorKind::Internal, format!("the snapshot {} could not be made", now.id)),
            }),
            Err(now) => {
                let what = format!("the snapshot {} is pending at the deadline", now.id);
                Err(Error::new(ErrorKind::IncorrectState, what))
            }
        }
    }

    pub(super) fn give_up(&self) {
        self.0.given_up.store(true, Ordering::Release);
    }

    fn is_given_up(&self) -> bool {
        self.0.given_up.load(Ordering::Acquire)
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells how far it is, where that is news.
    fn reach(&self, percent: u8) {
        self.0.told.update(|now| {
            let news = percent > now.progress;
            now.progress = now.progress.max(percent);
            news
        });
    }

    fn complete(&self, record: SnapshotRecord) {
        self.0.told.set(record.into());
    }

    fn fail(&self, why: &Error) {
        // Before it is told: whoever is told finds it.
        *self.failure() = Some(Failure::of(why));
        self.0.told.update(|now| {
            now.state = SnapshotState::Error;
            now.state_reason = Some(reason_of(why));
            true
        });
    }
}

impl fmt::Debug for PendingSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PendingSnapshot").field(&self.0.told).finish()
    }
}

/// What has become of one.
type End = (PendingSnapshot, Result<SnapshotRecord>);

/// The snapshots of a region that are being made.
#[derive(Debug, Default)]
pub(crate) struct PendingSnapshots(Mutex<BTreeMap<SnapshotId, PendingSnapshot>>);

impl PendingSnapshots {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, PendingSnapshot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: SnapshotId) -> Option<PendingSnapshot> {
        self.lock().get(&id).cloned()
    }

    fn add(&self, new: &[UnfinishedSnapshotRecord]) -> Result<Vec<PendingSnapshot>> {
        let mut all = self.lock();
        let owner = new.first().map(|record| record.owner);
        let theirs = all.values().filter(|pending| Some(pending.describe().owner) == owner).count();
        if theirs + new.len() > MOST {
            let what = format!("{MOST} snapshots of the account may be pending; wait for one, or delete one");
            return Err(Error::new(ErrorKind::PendingSnapshotLimitExceeded, what));
        }
        let new: Vec<_> = new.iter().map(|record| PendingSnapshot::new(record.clone())).collect();
        all.extend(new.iter().map(|pending| (pending.id(), pending.clone())));
        Ok(new)
    }

    fn remove(&self, these: &[PendingSnapshot]) {
        let mut all = self.lock();
        these.iter().for_each(|pending| drop(all.remove(&pending.id())));
    }

    /// Ends them all, since the region is being closed.
    pub(crate) fn cut_off(&self) {
        self.lock().values().for_each(|pending| pending.0.cut_off.store(true, Ordering::Release));
    }
}

impl Inner {
    /// Begins to make snapshots, and gives them when the volumes are taken.
    pub(super) fn begin_snapshots(
        self: &Arc<Self>,
        owner: AccountId,
        wanted: Wanted,
    ) -> Result<Vec<PendingSnapshot>> {
        wanted.check()?;
        let (tell, told) = mpsc::channel();
        let region = self.clone();
        // What is taken is stored by the thread that has taken it.
        self.spawn_task("snapshot", move || {
            let mut ends = Vec::new();
            let begun = |begun| drop(tell.send(Ok(begun)));
            let made = region.making(|| region.make_snapshots(owner, &wanted, begun, &mut ends));
            // When nothing is left of those that have failed.
            ends.into_iter().for_each(|(snapshot, end): End| match end {
                Ok(record) => snapshot.complete(record),
                Err(e) => snapshot.fail(&e),
            });
            if let Err(e) = made {
                // Where they have begun, they have said it themselves, and nobody listens here.
                let _ = tell.send(Err(e));
            }
        })?;
        let gone = |_| Err(Error::new(ErrorKind::Internal, "the thread of a snapshot has panicked"));
        told.recv().unwrap_or_else(gone)
    }

    fn make_snapshots(
        &self,
        owner: AccountId,
        wanted: &Wanted,
        begun: impl FnOnce(Vec<PendingSnapshot>),
        ends: &mut Vec<End>,
    ) -> Result<()> {
        let (records, instant) = self.take_wanted(owner, wanted)?;
        // Found by whoever finds their records.
        let pending = self.pending_snapshots.add(&records)?;
        let written = self.store.commit(|c| records.iter().try_for_each(|record| c.put(record)));
        if let Err(e) = written {
            self.pending_snapshots.remove(&pending);
            // The commit may have got as far as to be there.
            self.remove_unfinished(&records);
            return Err(e);
        }
        begun(pending.clone());
        let mut progress = |at: Progress| {
            let percent = percent(at.done, at.total);
            pending.iter().for_each(|snapshot| snapshot.reach(percent));
            let is_wanted = |snapshot: &PendingSnapshot| !snapshot.is_given_up();
            let cut_off = pending.iter().any(|snapshot| snapshot.0.cut_off.load(Ordering::Acquire));
            if cut_off || !pending.iter().any(is_wanted) {
                at.cancel();
            }
        };
        let stored = catch_unwind(AssertUnwindSafe(|| instant.store(&mut progress)));
        let panicked = |_| Err(Error::new(ErrorKind::Internal, "the storing of a snapshot has panicked"));
        let stored = stored.unwrap_or_else(panicked);
        let contents = stored.map(|all| all.into_iter().map(|(content, _)| content).collect::<Vec<_>>());
        let all = self.end_snapshots(&pending, contents);
        self.pending_snapshots.remove(&pending);
        // What none of them names is collected.
        let failed = all.iter().find_map(|end| end.as_ref().err()).map(|e| Failure::of(e).error());
        ends.extend(pending.into_iter().zip(all));
        failed.map_or(Ok(()), Err)
    }

    /// Writes down what has become of snapshots, and gives it.
    fn end_snapshots(
        &self,
        pending: &[PendingSnapshot],
        contents: Result<Vec<Snapshot>>,
    ) -> Vec<Result<SnapshotRecord>> {
        // Deleting and tagging wait.
        let _resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let is_cut_off = |snapshot: &PendingSnapshot, e: &Error| {
            e.kind() == ErrorKind::Cancelled && snapshot.0.cut_off.load(Ordering::Acquire)
        };
        let given_up = || Error::new(ErrorKind::Cancelled, "the snapshot was deleted while it was pending");
        let mut ends: Vec<Result<SnapshotRecord>> = Vec::new();
        for (nth, snapshot) in pending.iter().enumerate() {
            let record = self.store.get::<UnfinishedSnapshotRecord>(&snapshot.id().to_string());
            ends.push(match (record, &contents) {
                // One that was deleted has no record any more.
                (Ok(None), _) => Err(given_up()),
                (Ok(Some(_)), _) if snapshot.is_given_up() => Err(given_up()),
                (Ok(Some(record)), Ok(contents)) => match contents.get(nth) {
                    Some(content) => Ok(record.with(content)),
                    None => Err(Error::new(ErrorKind::Internal, "a volume was not stored")),
                },
                (Ok(Some(_)), Err(e)) if is_cut_off(snapshot, e) => {
                    let what = "the region was closed while the snapshot was pending";
                    Err(Error::new(ErrorKind::Internal, what))
                }
                (Ok(Some(_)), Err(e)) => Err(Failure::of(e).error()),
                (Err(e), _) => Err(e),
            });
        }
        let written = self.write_ends(pending, &ends);
        if let Err(e) = &written {
            let failure = Failure::of(e);
            ends.iter_mut().for_each(|end| *end = Err(failure.error()));
            // What may be there of it all the same goes, so that nobody is told otherwise later.
            if let Err(left) = self.write_ends(pending, &ends) {
                tracing::error!(error = chain(&left), "cannot write down what has become of a snapshot");
            }
        }
        ends
    }

    fn write_ends(&self, pending: &[PendingSnapshot], ends: &[Result<SnapshotRecord>]) -> Result<()> {
        self.store.commit(|c| {
            for (snapshot, end) in pending.iter().zip(ends) {
                let id = snapshot.id();
                match end {
                    Ok(record) => {
                        c.remove::<UnfinishedSnapshotRecord>(id);
                        c.put(record)?;
                    }
                    Err(e) if e.kind() == ErrorKind::Cancelled => c.remove::<UnfinishedSnapshotRecord>(id),
                    Err(e) => {
                        c.remove::<SnapshotRecord>(id);
                        if let Some(record) = self.store.get::<UnfinishedSnapshotRecord>(&id.to_string())? {
                            let failed: Option<StateReason> = Some(reason_of(e));
                            c.put(&UnfinishedSnapshotRecord { failed, ..record })?;
                        }
                    }
                }
            }
            Ok(())
        })
    }

    fn remove_unfinished(&self, records: &[UnfinishedSnapshotRecord]) {
        let removed = self.store.commit(|c| {
            records.iter().for_each(|record| c.remove::<UnfinishedSnapshotRecord>(record.id));
            Ok(())
        });
        if let Err(e) = removed {
            tracing::error!(error = chain(&e), "a snapshot that did not begin may be said to have failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use ami_core::{Tags, Timestamp};

    use super::*;

    #[test]
    fn an_account_has_only_so_many_pending() {
        let record = |owner: &str| UnfinishedSnapshotRecord {
            id: SnapshotId::random().unwrap(),
            owner: owner.parse().unwrap(),
            volume_id: "vol-0123456789abcdef0".parse().unwrap(),
            size: 1,
            description: String::new(),
            created: Timestamp::now(),
            tags: Tags::new(),
            kms_key_id: None,
            product_codes: Default::default(),
            failed: None,
        };
        let (own, all) = (|| record("111111111111"), PendingSnapshots::default());
        let begun: Vec<_> = (0..MOST / 2).flat_map(|_| all.add(&[own(), own()]).unwrap()).collect();
        let refused = all.add(&[own()]).unwrap_err();
        let expected = (ErrorKind::PendingSnapshotLimitExceeded, "PendingSnapshotLimitExceeded");
        assert_eq!((refused.kind(), refused.code()), expected);
        all.add(&[record("222222222222")]).unwrap();
        all.remove(&begun[..1]);
        assert_eq!(all.add(&[own(), own()]).unwrap_err().kind(), ErrorKind::PendingSnapshotLimitExceeded);
        all.add(&[own()]).unwrap();
        assert_eq!(all.lock().len(), MOST + 1);
    }
}

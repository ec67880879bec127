//! Forgetting instances that were terminated: a while after, as in EC2, so that whoever asks what became
//! of one is told, and a region that is open for long does not fill up with them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ami_core::{InstanceId, Timestamp};

use crate::InstanceState;
use crate::error::chain;
use crate::record::InstanceRecord;
use crate::region::Inner;

/// How long they are remembered (EC2 User Guide, "Terminate Amazon EC2 instances": about an hour).
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// Those that were terminated and are remembered, in the order of their ends: whoever looks for what is to be forgotten
/// looks at no others.
#[derive(Debug, Default)]
pub(crate) struct Remembered(Mutex<VecDeque<(Instant, InstanceId)>>);

impl Remembered {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Instant, InstanceId)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in one that was terminated at that time, of which its record speaks.
    pub(crate) fn add(&self, id: InstanceId, ended: Timestamp) {
        let now = Instant::now();
        let at = now.checked_sub(age(ended)).unwrap_or(now);
        let mut remembered = self.lock();
        let place = remembered.partition_point(|(other, _)| *other <= at);
        remembered.insert(place, (at, id));
    }

    /// Takes out those that were terminated long before `now`.
    fn take_old(&self, now: Instant) -> Vec<(Instant, InstanceId)> {
        let mut remembered = self.lock();
        let old = |(at, _): &(Instant, InstanceId)| now.saturating_duration_since(*at) >= REMEMBERED;
        let count = remembered.iter().take_while(|one| old(one)).count();
        remembered.drain(..count).collect()
    }

    fn put_back(&self, old: Vec<(Instant, InstanceId)>) {
        let mut remembered = self.lock();
        old.into_iter().rev().for_each(|one| remembered.push_front(one));
    }
}

/// How long ago it was, by a clock that may have been set back.
fn age(ended: Timestamp) -> Duration {
    Duration::from_millis(Timestamp::now().as_unix_millis().saturating_sub(ended.as_unix_millis()))
}

impl InstanceRecord {
    /// Whether it was terminated so long ago, or by a version that did not note when, that nobody is told of it.
    pub(crate) fn is_forgotten(&self) -> bool {
        let terminated = self.description.state == InstanceState::Terminated;
        terminated && self.ended.is_none_or(|ended| age(ended) >= REMEMBERED)
    }
}

impl Inner {
    /// Forgets those that were terminated long before `now`. Handles of them stay good. Whoever asks for instances does it, and
    /// who launches or terminates some.
    pub(crate) fn forget_terminated(&self, now: Instant) {
        let old = self.terminated.take_old(now);
        if old.is_empty() {
            return;
        }
        // Not durable yet: what a crash brings back of them goes when the region is opened.
        let removed = self.store.stage(|c| {
            old.iter().for_each(|(_, id)| c.remove::<InstanceRecord>(id));
            Ok(())
        });
        match removed {
            Ok(()) => {
                for (_, id) in old {
                    self.cells().remove(&id);
                    self.directory.remove(id);
                    self.tokens.forget(id);
                }
            }
            Err(e) => {
                tracing::warn!(error = chain(&e), "cannot forget terminated instances yet");
                self.terminated.put_back(old);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeHypervisor, tiny_elf};
    use crate::{
        DescribeInstanceStatus, DescribeInstances, DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region,
    };
    use ami_core::{Ami, X86_64};

    fn register(region: &Region<FakeHypervisor>) -> Ami<X86_64> {
        let disk = storage_block::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        region.register_image(Ami::<X86_64>::builder("base"), source).unwrap()
    }

    fn spec() -> LaunchSpec {
        LaunchSpec::new("t2.nano".parse().unwrap())
    }

    #[test]
    fn terminated_instances_are_remembered_for_an_hour_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let ami = register(&region);
        let (gone, running) = (region.launch(&ami, spec()).unwrap(), region.launch(&ami, spec()).unwrap());
        let before = Instant::now();
        gone.terminate().unwrap();
        let after = Instant::now();

        region.inner.forget_terminated(before + REMEMBERED - Duration::from_millis(1));
        assert_eq!(region.instance(gone.id()).unwrap().state(), InstanceState::Terminated);
        region.inner.forget_terminated(after + REMEMBERED);
        assert_eq!(region.instance(gone.id()).unwrap_err().kind(), ErrorKind::InstanceNotFound);
        assert_eq!(region.inner.store.all::<InstanceRecord>().unwrap().len(), 1);
        let left: Vec<_> = region.instances().iter().map(|i| i.id()).collect();
        assert_eq!(left, [running.id()]);

        // Whoever has a handle can still look.
        assert_eq!(gone.state(), InstanceState::Terminated);
        gone.terminate().unwrap();
        assert_eq!(gone.start().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
    }

    #[test]
    fn the_hour_goes_on_while_the_region_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let ami = register(&region);
        let [old, new] = [(), ()].map(|()| {
            let instance = region.launch(&ami, spec()).unwrap();
            instance.terminate().unwrap();
            instance.id()
        });
        let mut record = region.inner.store.get::<InstanceRecord>(&old.to_string()).unwrap().unwrap();
        let hour = REMEMBERED.as_millis() as u64;
        record.ended = Timestamp::from_unix_millis(record.ended.unwrap().as_unix_millis() - hour);
        region.inner.store.commit(|c| c.put(&record)).unwrap();
        drop((ami, region));
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let known: Vec<_> = region.instances().iter().map(|i| (i.id(), i.state())).collect();
        assert_eq!(known, [(new, InstanceState::Terminated)]);
        region.inner.forget_terminated(Instant::now() + REMEMBERED);
        assert!(region.instances().is_empty());
        assert_eq!(region.inner.store.all::<InstanceRecord>().unwrap().len(), 0);
    }

    #[test]
    fn launching_terminating_and_asking_forget() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let ami = register(&region);
        let old = || {
            let gone = region.launch(&ami, spec()).unwrap();
            gone.terminate().unwrap();
            let long_ago = Instant::now().checked_sub(REMEMBERED).unwrap();
            let mut remembered = region.inner.terminated.lock();
            remembered.pop_back();
            remembered.push_front((long_ago, gone.id()));
            gone.id()
        };
        let id = old();
        let running = region.launch(&ami, spec()).unwrap();
        assert!(!region.inner.cells().contains_key(&id), "a launch forgets");
        let id = old();
        running.terminate().unwrap();
        assert!(!region.inner.cells().contains_key(&id), "a termination forgets");
        let with_token = || spec().client_token("deploy");
        let first = region.launch(&ami, with_token()).unwrap();
        first.terminate().unwrap();
        let again = || region.launch(&ami, with_token());
        assert_eq!(again().unwrap_err().kind(), ErrorKind::IdempotentInstanceTerminated);
        let long_ago = Instant::now().checked_sub(REMEMBERED).unwrap();
        region.inner.terminated.lock().iter_mut().for_each(|(at, _)| *at = long_ago);
        assert_ne!(again().unwrap().id(), first.id(), "a launch with the same token forgets");
        let id = old();
        assert_eq!(region.instance(id).unwrap_err().kind(), ErrorKind::InstanceNotFound);
        let id = old();
        assert!(region.instances().iter().all(|instance| instance.id() != id));
        let id = old();
        let all = region.describe_instances(&DescribeInstances::new()).unwrap().items;
        assert!(!all.is_empty() && all.iter().all(|instance| instance.id != id));
        let id = old();
        let all = DescribeInstanceStatus::new().include_all_instances(true);
        let all = region.describe_instance_status(&all).unwrap().items;
        assert!(!all.is_empty() && all.iter().all(|status| status.instance_id != id));
    }
}

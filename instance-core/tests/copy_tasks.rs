//! Tasks that copy images: what they tell, how they end, and what they leave.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use common::{PATIENCE, TestRegion, check, disk, everything, open, register, soon, told};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    CopyImage, CopyImageTask, DescribeCopyImageTasks, ErrorKind, RegionOptions, TaskDescription, TaskStatus,
};
use storage_block::keys::{DataKey, KeyContext, KeyProvider, LocalKey};

/// Keys that let nobody have one before they are told to, or their teller is gone, and tell who has asked.
struct Held(LocalKey, Mutex<mpsc::Receiver<()>>, mpsc::Sender<()>);

impl KeyProvider for Held {
    fn default_key_id(&self) -> &str {
        self.0.default_key_id()
    }

    fn wrap(&self, key_id: &str, key: &DataKey, context: &KeyContext) -> storage_block::Result<Vec<u8>> {
        let _ = self.2.send(());
        let _ = self.1.lock().unwrap().recv();
        self.0.wrap(key_id, key, context)
    }

    fn unwrap(
        &self,
        key_id: &str,
        wrapped: &[u8],
        context: Option<&KeyContext>,
    ) -> storage_block::Result<DataKey> {
        self.0.unwrap(key_id, wrapped, context)
    }
}

/// A region in which an encrypted copy has to wait for a word.
fn held(dir: &Path) -> (TestRegion, mpsc::Sender<()>) {
    let (region, go, _) = held_and_heard(dir);
    (region, go)
}

/// The same, and what tells that one waits.
fn held_and_heard(dir: &Path) -> (TestRegion, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let ((go, let_on), (ask, asked)) = (mpsc::channel(), mpsc::channel());
    let keys = Held(LocalKey::from_bytes([7; 32]), Mutex::new(let_on), ask);
    let region = RegionOptions::new().keys(Arc::new(keys)).open(dir, FakeHypervisor::new()).unwrap();
    (region, go, asked)
}

fn encrypted(name: &str) -> CopyImage {
    CopyImage::new(name).encrypted(true)
}

fn listed(region: &TestRegion) -> Vec<TaskDescription<ami_core::CopyImageTaskId>> {
    region.describe_copy_image_tasks(&DescribeCopyImageTasks::new()).unwrap().items
}

#[test]
fn a_copy_goes_on_without_its_source_and_tells_how_far_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let from = open(&dir.path().join("from"));
    let (to, go) = held(&dir.path().join("to"));
    let ami = register(&from, "base", &disk(8, 7)).unwrap();
    let task = to.begin_copy_image_from(&from, ami.id(), encrypted("copy")).unwrap();
    assert!(task.id().to_string().starts_with("copy-ami-"));
    let begun = task.describe();
    assert_eq!((begun.status, begun.progress, begun.image_id), (TaskStatus::Active, 0, None));
    assert!(to.images().unwrap().is_empty());
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = told.clone();
    task.watch().subscribe(move |t: &TaskDescription<_>| sink.lock().unwrap().push((t.progress, t.status)));
    // All of it is deregistered there, and swept, while it is read.
    from.deregister_image(ami.id()).unwrap();
    drop(from);
    drop(go);
    let ended = task.wait(soon()).unwrap();
    assert_eq!((ended.status, ended.progress), (TaskStatus::Completed, 100));
    let told = told.lock().unwrap().clone();
    assert!(told.is_sorted_by_key(|(percent, _)| *percent), "{told:?}");
    let early = told.iter().filter(|(_, status)| *status == TaskStatus::Active);
    assert!(early.clone().all(|(percent, _)| *percent < 100) && early.count() > 1, "{told:?}");

    let copy = ended.image_id.unwrap();
    assert_eq!(to.image(copy).unwrap().source_image().unwrap().id, ami.id());
    let (mut bytes, mut wanted) = (vec![0; 8 << 20], vec![0; 8 << 20]);
    to.image_disk(copy, "/dev/xvda").unwrap().read_at(&mut bytes, 0).unwrap();
    disk(8, 7).read_at(&mut wanted, 0).unwrap();
    assert!(bytes == wanted);
    check(&task.cancel().unwrap_err(), ErrorKind::IncorrectState, "IncorrectState", &[]);

    // It is the account's, and is remembered with the region.
    let completed = DescribeCopyImageTasks::new().filter("task-state", ["completed"]);
    assert_eq!(to.describe_copy_image_tasks(&completed).unwrap().items, std::slice::from_ref(&ended));
    let friend = to.as_account("222222222222".parse().unwrap());
    assert!(listed(&friend).is_empty());
    let theirs = friend.copy_image_task(task.id()).unwrap_err();
    check(&theirs, ErrorKind::TaskNotFound, "InvalidConversionTaskId", &[]);
    drop((to, friend));
    let to = open(&dir.path().join("to"));
    assert_eq!(to.copy_image_task(task.id()).unwrap().describe(), ended);
}

#[test]
fn a_copy_that_fails_waits_for_no_other_nor_does_anybody_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let from = open(&dir.path().join("from"));
    let path = dir.path().join("to");
    let (to, go, asked) = held_and_heard(&path);
    let ami = register(&from, "base", &disk(8, 7)).unwrap();
    let long = to.begin_copy_image_from(&from, ami.id(), encrypted("long")).unwrap();
    asked.recv_timeout(PATIENCE).unwrap();
    register(&to, "taken", &disk(1, 1)).unwrap();
    let refused = to.begin_copy_image_from(&from, ami.id(), CopyImage::new("taken")).unwrap();
    assert_eq!(refused.wait(soon()).unwrap_err().kind(), ErrorKind::ImageNameDuplicate);
    register(&to, "another", &disk(1, 2)).unwrap();
    assert_eq!(long.describe().status, TaskStatus::Active);
    drop(go);
    long.wait(soon()).unwrap();
}

#[test]
fn a_copy_that_is_cancelled_or_fails_leaves_nothing_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let from = open(&dir.path().join("from"));
    let path = dir.path().join("to");
    let (to, go) = held(&path);
    let ami = register(&from, "base", &disk(8, 7)).unwrap();
    register(&to, "taken", &disk(1, 1)).unwrap();
    let kept = || -> Vec<_> {
        let all = everything(&to, &path);
        // A pack that nothing is left in may be there.
        all.into_iter().filter(|(name, _)| !name.contains("/packs/")).collect()
    };
    let before = kept();
    let task = to.begin_copy_image_from(&from, ami.id(), encrypted("new")).unwrap();
    task.cancel().unwrap();
    assert_eq!(task.describe().status, TaskStatus::Deleting);
    go.send(()).unwrap();
    check(&task.wait(soon()).unwrap_err(), ErrorKind::Cancelled, "InternalError", &[]);
    assert_eq!((task.describe().status, task.describe().image_id), (TaskStatus::Deleted, None));
    let task = to.begin_copy_image_from(&from, ami.id(), CopyImage::new("taken")).unwrap();
    let refused = task.wait(soon()).unwrap_err();
    check(&refused, ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate", &[]);
    assert_eq!(task.describe().status_message, told(&refused));
    assert_eq!(kept(), before);
    assert_eq!(listed(&to).len(), 2);

    // What the source says no to is no task.
    let gone = to.begin_copy_image_from(&from, "ami-0123456789abcdef0".parse().unwrap(), encrypted("new"));
    check(&gone.unwrap_err(), ErrorKind::ImageNotFound, "InvalidAMIID.NotFound", &[]);
    let friend = to.as_account("222222222222".parse().unwrap());
    let denied = friend.begin_copy_image_from(&from, ami.id(), encrypted("new")).unwrap_err();
    check(&denied, ErrorKind::AuthFailure, "AuthFailure", &[]);
    from.disable_image(ami.id()).unwrap();
    let disabled = to.begin_copy_image_from(&from, ami.id(), encrypted("new")).unwrap_err();
    check(&disabled, ErrorKind::ImageUnavailable, "InvalidAMIID.Unavailable", &[]);
    from.enable_image(ami.id()).unwrap();
    assert_eq!((listed(&to).len(), listed(&friend).len()), (2, 0));

    // Twenty at once, and no more.
    let begin = || to.begin_copy_image_from(&from, ami.id(), encrypted("new"));
    let tasks: Vec<CopyImageTask> = (0..20).map(|_| begin().unwrap()).collect();
    check(&begin().unwrap_err(), ErrorKind::ResourceLimitExceeded, "ResourceLimitExceeded", &[]);
    tasks.iter().for_each(|task| task.cancel().unwrap());
    drop(go);
    tasks.iter().for_each(|task| drop(task.wait(soon()).unwrap_err()));
    assert_eq!(kept(), before);
}

#[test]
fn closing_a_region_ends_its_copies_which_are_told_of_when_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let from = open(&dir.path().join("from"));
    let (to, go) = held(&dir.path().join("to"));
    let ami = register(&from, "base", &disk(8, 7)).unwrap();
    let task = to.begin_copy_image_from(&from, ami.id(), encrypted("new")).unwrap();
    let watch = task.watch();
    let letting = thread::spawn(move || {
        // Closing cancels it first, and then waits for it.
        watch.wait(soon(), |task| task.status != TaskStatus::Active).unwrap();
        drop(go);
    });
    drop(to);
    letting.join().unwrap();
    let known = task.describe();
    assert!(known.status == TaskStatus::Deleted && !known.status_message.is_empty(), "{known:?}");
    let to = open(&dir.path().join("to"));
    assert_eq!(listed(&to), [known]);
    assert!(to.images().unwrap().is_empty());
}

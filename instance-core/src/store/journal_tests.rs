//! What crashes leave of a journal, and of the database behind it.

use std::collections::BTreeMap;
use std::path::Path;

use super::journal::{self, ALIGN, Journal, Replayed};
use super::journaled_store::JournaledStore;
use super::redb_store::{Fault, RedbStore};
use crate::state_store::{Change, Durability, StateStore};

const ID: [u8; 16] = *b"one of a journal";
const OTHER: [u8; 16] = *b"another journals";

fn put(key: &str, value: &[u8]) -> Change {
    Change { table: "t", key: key.to_owned(), value: Some(value.to_vec()) }
}

fn remove(key: &str) -> Change {
    Change { value: None, ..put(key, b"") }
}

fn replayed(changes: &[Change]) -> Vec<Replayed> {
    let replayed =
        |c: &Change| Replayed { table: c.table.into(), key: c.key.clone(), value: c.value.clone() };
    changes.iter().map(replayed).collect()
}

/// Entries of several lengths, numbered from `first`: what each says, where it ends, and all their bytes.
fn entries(first: u64, lens: &[usize]) -> (Vec<Vec<Change>>, Vec<usize>, Vec<u8>) {
    let (mut said, mut ends, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    for (number, len) in (first..).zip(lens) {
        let value: Vec<u8> = (0..*len).map(|at| (at as u64 * 31 + number) as u8).collect();
        let changes = vec![put(&number.to_string(), &value), remove("gone")];
        let entry = journal::encode(&ID, number, &changes.iter().collect::<Vec<_>>()).unwrap();
        let payload = u32::from_le_bytes(entry[32..36].try_into().unwrap()) as usize;
        ends.push(bytes.len() + 68 + payload);
        bytes.extend(entry);
        said.push(changes);
    }
    (said, ends, bytes)
}

const LENS: [usize; 7] = [0, 1, 700, 51, 52, 1500, 300];

/// As the document says.
#[test]
fn an_entry_is_what_it_will_be_for_ever() {
    let entry = journal::encode(&ID, 7, &[&put("key", b"value"), &remove("k")]).unwrap();
    let payload = [
        &[1, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0][..],
        b"tkeyvalue",
        &[1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255],
        b"tk",
    ]
    .concat();
    let said = [&b"AMIjrnl1"[..], &ID, &[7, 0, 0, 0, 0, 0, 0, 0], &[35, 0, 0, 0]].concat();
    let digest = ami_core::Digest::of(&[&said[..], &payload].concat());
    let mut whole = [&said[..], digest.as_bytes(), &payload].concat();
    whole.resize(128, 0);
    assert_eq!(entry, whole);
}

/// Cut at any byte, whatever stands behind the cut: what is whole counts, and nothing else.
#[test]
fn a_journal_that_was_cut_has_what_was_whole() {
    let (said, ends, bytes) = entries(8, &LENS);
    let stale = entries(1, &[40, 400, 4, 1000, 90, 900, 0]).2;
    for cut in 0..=bytes.len() {
        let whole = ends.iter().filter(|end| **end <= cut).count();
        let expected = replayed(&said[..whole].concat());
        let behind: [&dyn Fn(usize) -> u8; 4] =
            [&|_| 0, &|_| 0xff, &|at| stale.get(at).copied().unwrap_or(0), &|at| bytes[at] ^ 1];
        for (how, behind) in behind.iter().enumerate() {
            let left: Vec<u8> =
                (0..bytes.len()).map(|at| if at < cut { bytes[at] } else { behind(at) }).collect();
            let (next, end, changes) = journal::replay(&left, &ID, 7).unwrap();
            assert_eq!((next, &changes), (8 + whole as u64, &expected), "{cut} {how}");
            assert!(end <= cut.next_multiple_of(ALIGN), "{cut} {how}");
        }
        assert_eq!(journal::replay(&bytes[..cut], &ID, 7).unwrap().2, expected, "{cut}");
    }
}

/// The sectors of an append reach the disk in any order.
#[test]
fn an_entry_of_which_any_part_is_missing_is_none() {
    let (said, _, bytes) = entries(8, &[300, 3000]);
    let (_, _, before) = entries(1, &[200, 700, 2000, 1000]);
    let begins = entries(8, &[300]).2.len();
    let sectors: Vec<_> = (0..bytes.len().div_ceil(512)).filter(|n| (n + 1) * 512 > begins).collect();
    assert!((6..10).contains(&sectors.len()));
    for lost in 0..1_u32 << sectors.len() {
        let mut left = bytes.clone();
        for (_, sector) in sectors.iter().enumerate().filter(|(bit, _)| lost & 1 << bit != 0) {
            let (from, to) = ((sector * 512).max(begins), ((sector + 1) * 512).min(bytes.len()));
            left[from..to].fill(0);
            let stale = before.get(from..to.min(before.len())).unwrap_or_default();
            left[from..from + stale.len()].copy_from_slice(stale);
        }
        let whole = if lost == 0 { 2 } else { 1 };
        assert_eq!(journal::replay(&left, &ID, 7).unwrap().2, replayed(&said[..whole].concat()), "{lost:b}");
    }
}

/// What was acknowledged and is no more is not passed over.
#[test]
fn a_damaged_entry_before_a_whole_one_is_damage() {
    let (said, ends, bytes) = entries(8, &LENS);
    let last = ends[ends.len() - 2].next_multiple_of(ALIGN);
    let mut begins = 0;
    for end in ends {
        for at in begins..end {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            match journal::replay(&changed, &ID, 7) {
                Err(what) => assert!(begins < last && what.contains("and not entry"), "{at}: {what}"),
                Ok((_, _, changes)) => {
                    assert!(begins == last, "{at}");
                    assert_eq!(changes, replayed(&said[..said.len() - 1].concat()), "{at}");
                }
            }
        }
        begins = end.next_multiple_of(ALIGN);
    }
    // It is not this database's.
    assert!(journal::replay(&bytes, &ID, 6).unwrap_err().contains("has entry 8 and not entry 7"));
    assert!(journal::replay(&bytes, &ID, u64::MAX).is_err());
    // The database has all, or it is another's.
    assert_eq!(journal::replay(&bytes, &ID, 14).unwrap(), (15, 0, Vec::new()));
    assert_eq!(journal::replay(&bytes, &OTHER, 3).unwrap(), (4, 0, Vec::new()));
}

fn open(dir: &Path) -> JournaledStore {
    JournaledStore::open(&dir.join("db"), &dir.join("journal")).unwrap()
}

/// What a crash leaves of a store that is open.
fn crash(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in ["db", "journal"] {
        std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
    }
    copy
}

#[test]
fn keeps_the_contract() {
    // A journal that takes nothing costs time alone.
    for journal in [None, Some(Path::new("/dev/full"))] {
        let dir = tempfile::tempdir().unwrap();
        let mut number = 0;
        crate::testing::state_store_conformance(|| {
            number += 1;
            let (database, own) =
                (dir.path().join(format!("{number}.db")), dir.path().join(number.to_string()));
            JournaledStore::open(&database, journal.unwrap_or(&own)).unwrap()
        });
        let (database, own) = (dir.path().join("db"), dir.path().join("own"));
        crate::testing::durable_state_store_conformance(|| {
            JournaledStore::open(&database, journal.unwrap_or(&own)).unwrap()
        });
    }
}

#[test]
fn the_database_alone_has_all_once_the_store_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    for (n, durability) in
        [Durability::Immediate, Durability::Immediate, Durability::Eventual].iter().enumerate()
    {
        open(dir.path()).apply(&[put(&n.to_string(), b"v")], *durability).unwrap();
    }
    std::fs::remove_file(dir.path().join("journal")).unwrap();
    assert_eq!(RedbStore::open(&dir.path().join("db")).unwrap().scan("t").unwrap().len(), 3);
    assert_eq!(open(dir.path()).scan("t").unwrap().len(), 3);
}

/// A version without journals reads the database alone, and has to find there that it is not to.
#[test]
fn a_database_that_knows_no_journal_has_the_first_commit_itself() {
    let dir = tempfile::tempdir().unwrap();
    let in_database = || {
        let copy = crash(dir.path());
        RedbStore::open(&copy.path().join("db")).unwrap().scan("t").unwrap().len()
    };
    let store = open(dir.path());
    store.apply(&[put("first", b"")], Durability::Immediate).unwrap();
    assert_eq!(in_database(), 1);
    store.apply(&[put("second", b"")], Durability::Immediate).unwrap();
    assert_eq!(in_database(), 1, "the second is in the journal");
    assert_eq!(store.scan("t").unwrap().len(), 2);
}

/// Commits until the journal has begun anew twice; after each, what a crash leaves goes on from there.
#[test]
fn a_crash_after_any_commit_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (mut expected, mut anew, mut appended) = (BTreeMap::new(), 0, 0);
    for n in 0..64_u8 {
        let was = RedbStore::open(&crash(dir.path()).path().join("db")).unwrap().scan("t").unwrap();
        // The last two are put over earlier ones, and one of these goes.
        let (key, value) = ((n % 60).to_string(), vec![n; journal::MAX as usize / 51]);
        let changes = [put(&key, &value), put("last", &[n]), remove(&(n / 2).to_string())];
        store.apply(&changes, Durability::Immediate).unwrap();
        for change in changes {
            match change.value {
                Some(value) => drop(expected.insert(change.key, value)),
                None => drop(expected.remove(&change.key)),
            }
        }
        // Nobody was promised that it stays.
        store.apply(&[put("eventual", &[n])], Durability::Eventual).unwrap();
        assert_eq!(store.get("t", "eventual").unwrap().as_deref(), Some(&[n][..]));
        let all = |store: &JournaledStore| {
            let mut all: BTreeMap<_, _> = store.scan("t").unwrap().into_iter().collect();
            all.remove("eventual");
            all
        };
        let copy = crash(dir.path());
        let is = RedbStore::open(&copy.path().join("db")).unwrap().scan("t").unwrap();
        if is == was {
            appended += 1
        } else {
            anew += 1
        }
        let found = open(copy.path());
        assert_eq!(all(&found), expected, "{n}");
        // It goes on, and may crash again.
        found.apply(&[put("more", &[n])], Durability::Immediate).unwrap();
        let again = crash(copy.path());
        drop(found);
        for dir in [&again, &copy] {
            let found = open(dir.path());
            assert_eq!(found.get("t", "more").unwrap().as_deref(), Some(&[n][..]));
            let mut found = all(&found);
            found.remove("more");
            assert_eq!(found, expected, "{n} again");
        }
    }
    assert!(anew >= 2 && appended >= 50, "{anew} {appended}");
}

/// The database was committed, and the journal is as it was; or of the journal a part is lost that the database has.
#[test]
fn a_journal_that_the_database_has_is_not_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..4_u8 {
        store.apply(&[put("k", &[n])], Durability::Immediate).unwrap();
    }
    let before = crash(dir.path());
    drop(store);
    for journal in [before.path().join("journal"), dir.path().join("missing")] {
        let store = open(dir.path());
        store.apply(&[put("k", b"newest")], Durability::Immediate).unwrap();
        drop(store);
        let _ = std::fs::copy(&journal, dir.path().join("journal"));
        assert_eq!(open(dir.path()).get("t", "k").unwrap().as_deref(), Some(&b"newest"[..]));
        std::fs::remove_file(dir.path().join("journal")).unwrap();
        assert_eq!(open(dir.path()).get("t", "k").unwrap().as_deref(), Some(&b"newest"[..]));
    }
    // One of entries that came later than what the database has is not its own.
    for file in ["db", "journal"] {
        std::fs::copy(before.path().join(file), dir.path().join(file)).unwrap();
    }
    drop(open(dir.path()));
    let store = open(dir.path());
    for value in [b"late!", b"later"] {
        store.apply(&[put("k", value)], Durability::Immediate).unwrap();
    }
    let later = crash(dir.path());
    drop(store);
    std::fs::copy(before.path().join("db"), later.path().join("db")).unwrap();
    let refused = JournaledStore::open(&later.path().join("db"), &later.path().join("journal")).unwrap_err();
    assert!(refused.to_string().contains("put back a copy"), "{refused}");
}

/// From the first commit on, until the store is closed.
#[test]
fn a_journal_may_not_be_missing_while_its_store_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lost = |dir: &Path| {
        let copy = crash(dir);
        std::fs::remove_file(copy.path().join("journal")).unwrap();
        JournaledStore::open(&copy.path().join("db"), &copy.path().join("journal")).err()
    };
    assert!(lost(dir.path()).is_none(), "it is new");
    for n in 0..2_u8 {
        store.apply(&[put("k", &[n])], Durability::Immediate).unwrap();
        let refused = lost(dir.path()).unwrap().to_string();
        assert!(refused.contains("put back a copy of the region directory"), "{refused}");
    }
    drop(store);
    assert!(lost(dir.path()).is_none(), "it was closed");
    // One that is read alone stays closed.
    drop(open(dir.path()));
    assert!(lost(dir.path()).is_none());
}

/// A commit of the database's that fails is there all the same, or not: no older entry goes over it, and what is committed
/// next is not lost.
#[test]
fn a_commit_that_failed_is_there_whole_or_not_at_all() {
    let large = vec![1; 2 * journal::MAX as usize];
    for fault in [Fault::Before, Fault::After] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        for n in 0..3_u8 {
            store.apply(&[put("old", &[n])], Durability::Immediate).unwrap();
        }
        // No journal has room for it.
        *store.database().fault.lock().unwrap() = Some(fault);
        let both = [put("old", b"new"), put("large", &large)];
        store.apply(&both, Durability::Immediate).unwrap_err();
        let expected = match fault {
            Fault::Before => [Some(vec![2]), None],
            Fault::After => [Some(b"new".to_vec()), Some(large.clone())],
        };
        let found = |store: &JournaledStore| ["old", "large"].map(|key| store.get("t", key).unwrap());
        assert!(found(&store) == expected, "{fault:?}");
        // What comes then is acknowledged, and there after a crash with all before.
        for n in 0..3_u8 {
            store.apply(&[put("next", &[n])], Durability::Immediate).unwrap();
            let copy = crash(dir.path());
            let reopened = open(copy.path());
            assert!(found(&reopened) == expected, "{fault:?} {n}");
            assert_eq!(reopened.get("t", "next").unwrap().as_deref(), Some(&[n][..]), "{fault:?}");
        }
    }
}

/// An append that failed may be on the disk all the same.
#[test]
fn a_number_is_not_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let (mut journal, _) = Journal::open(&path, ID, 0, false).unwrap();
    journal.append(&[&put("a", b"")]).unwrap();
    assert_eq!(journal.last(), 1);
    let (mut full, _) = Journal::open(Path::new("/dev/full"), ID, 5, true).unwrap();
    full.append(&[&put("a", b"")]).unwrap_err();
    assert_eq!(full.last(), 6);
}

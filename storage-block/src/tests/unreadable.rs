//! What the disk does not give back is damaged: others are there all the same, and whoever has it mends it.

use std::collections::HashSet;

use rustix::io::Errno;

use super::fault::Bad;
use super::{image, memory};
use crate::session::Session;
use crate::testing::compare;
use crate::{ErrorKind, Store};

const CHUNK: u64 = 64 << 10;
const PACK: &str = "packs/00000000.pack";

/// What is on a bad sector is stored again by whoever comes with it, whether or not it had been read before.
#[test]
fn what_cannot_be_read_is_stored_again() {
    for errno in [Errno::IO, Errno::UCLEAN, Errno::BADMSG, Errno::REMOTEIO, Errno::NODATA] {
        for read_before in [false, true] {
            let what = format!("{errno:?}, read before: {read_before}");
            let dir = tempfile::tempdir().unwrap();
            let bytes = image(3, 0, 1);
            let store = Store::open(dir.path()).unwrap();
            let (snapshot, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
            let mut part = [0; 512];
            if read_before {
                compare(&snapshot.disk(), &bytes, &what);
            }
            // The second chunk.
            let at = 4096 + CHUNK;
            let _bad = Bad::new(&dir.path().join(PACK), at..at + 4096, errno);
            let error = snapshot.disk().read_at(&mut part, CHUNK).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
            let cause = std::error::Error::source(&error).expect("what the system said");
            assert_eq!(cause.to_string(), std::io::Error::from(errno).to_string(), "{what}");
            assert!(error.to_string().contains("00000000.pack"), "{what}: {error}");
            // The others are read, one by one and together.
            snapshot.disk().read_at(&mut part, 0).unwrap();
            if !read_before {
                let report = store.scrub(&mut |_| ()).unwrap();
                let found = (report.damages.len(), report.damaged_snapshots.len());
                assert_eq!(found, (1, 1), "{what}: {report:?}");
            }
            let (_, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
            assert_eq!(stats.stored_bytes, CHUNK, "{what}");
            snapshot.disk().read_at(&mut part, CHUNK).unwrap();
            assert!(part == bytes[1 << 16..][..512], "{what}");
            compare(&snapshot.disk(), &bytes, &what);
            snapshot.verify().unwrap();
        }
    }
}

/// A sector that goes bad behind who has a chunk's place by heart: it is read from the copy.
#[test]
fn what_cannot_be_read_is_read_from_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(2, 0, 1);
    let store = Store::open(dir.path()).unwrap();
    let (snapshot, _) = {
        // While one appends to the first pack, the other needs a second.
        let mut session = Session::begin(&store.0);
        let prepared = crate::session::prepare(&store.0, &bytes[..1 << 16], None, None);
        session.put(&prepared, &bytes[..1 << 16]).unwrap();
        let imported = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        session.finish(|_| Ok(())).unwrap();
        imported
    };
    compare(&snapshot.disk(), &bytes, "before");
    compare(&snapshot.disk(), &bytes, "from where it was found");
    let packs = ["00000000.pack", "00000001.pack"].map(|name| dir.path().join("packs").join(name));
    for pack in &packs {
        let _bad = Bad::new(pack, 4096..4096 + CHUNK, Errno::IO);
        let mut read = vec![0; bytes.len()];
        snapshot.disk().read_at(&mut read, 0).unwrap();
        assert!(read == bytes, "{}", pack.display());
    }
}

/// A pack half of which is dead, with a bad sector in what is alive or in its header: a sweep goes on, and what can be had of
/// other packs is.
#[test]
fn a_sweep_goes_on_where_a_sector_is_bad() {
    for (what, range) in [("a chunk", 4096 + 3 * CHUNK..4096 + 9 * CHUNK), ("the header", 0..512)] {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::with_pack_slots(dir.path().to_owned(), 12).unwrap();
        let digests = [1, 2, 3].map(|seed| {
            let chunks = if seed == 1 { 8 } else { 4 };
            open().import(&memory(&image(chunks, 0, seed)), &mut |_| ()).unwrap().0.digest()
        });
        let bad = Bad::new(&dir.path().join(PACK), range, Errno::IO);
        let store = open();
        let keep = HashSet::from([digests[1]]);
        for _ in 0..2 {
            let swept = store.sweep().remove_unreferenced(&keep);
            swept.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(dir.path().join(PACK).exists(), "{what} may be read again some time");
        }
        drop(bad);
        drop(store);
        open().snapshot(&digests[1]).unwrap().verify().unwrap();
    }
}

/// An index that cannot be read costs what is in its pack, and nothing else, for as long as it cannot.
#[test]
fn a_store_opens_where_an_index_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::with_pack_slots(dir.path().to_owned(), 4).unwrap();
    let images = [image(3, 0, 1), image(3, 0, 2)];
    let digests =
        [0, 1].map(|number| open().import(&memory(&images[number]), &mut |_| ()).unwrap().0.digest());
    let index = dir.path().join("packs/00000000.index");
    for at in [0, 64 + 84] {
        let _bad = Bad::new(&index, at..at + 1, Errno::IO);
        let store = open();
        assert_eq!(store.snapshot(&digests[0]).unwrap().verify().unwrap_err().kind(), ErrorKind::Corrupt);
        store.snapshot(&digests[1]).unwrap().verify().unwrap();
        let report = store.scrub(&mut |_| ()).unwrap();
        let texts: Vec<String> = report.damages.iter().map(ToString::to_string).collect();
        let says = |text: &String| text.contains("00000000.index") && text.contains("nput/output error");
        assert!(texts.iter().any(says), "{texts:?}");
        assert_eq!(report.damaged_snapshots, [digests[0]]);
        // What is missing is stored elsewhere, and the pack kept until then.
        store.sweep().remove_unreferenced(&HashSet::from(digests)).unwrap();
        assert!(index.exists());
    }
    let store = open();
    digests.iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
}

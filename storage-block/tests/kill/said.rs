//! What the killed ones have said, and what may be there by that.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use storage_block::{Digest, Disk, Snapshot, Volume};

use super::{BEGINNING, SECTOR, VOLUMES, open};

/// What a snapshot or a volume may hold: for each sector, numbers.
type May = Vec<Vec<u64>>;

/// What is known of a volume.
struct Known {
    /// The numbers of its sectors since the last flush, the first of which is the flushed one.
    may: May,
    /// The least number of sectors that it has; there may be as many as in `may`.
    least: usize,
    /// The sectors of a write that has not returned: the first, and how many.
    writing: Option<(u64, u64)>,
}

impl Known {
    fn new() -> Self {
        let may = vec![vec![0]; BEGINNING as usize];
        Self { least: may.len(), may, writing: None }
    }
}

/// What the killed ones have said so far.
pub(crate) struct Said {
    volumes: Vec<Known>,
    snapshots: BTreeMap<Digest, May>,
    /// What snapshots under way may hold, and of which volumes they are.
    making: Vec<(usize, May)>,
    /// What may be gone or not.
    collecting: BTreeMap<Digest, May>,
    clone: Option<Digest>,
}

impl Said {
    pub(crate) fn new() -> Self {
        Self {
            volumes: VOLUMES.map(|_| Known::new()).into(),
            snapshots: BTreeMap::new(),
            making: Vec::new(),
            collecting: BTreeMap::new(),
            clone: None,
        }
    }

    pub(crate) fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().unwrap();
        match words[..] {
            ["opened"] => {}
            ["write", volume, first, sectors, tag] => {
                let (at, first, sectors) = (number(volume) as usize, number(first), number(sectors));
                let making = self.making.iter_mut().filter(|(volume, _)| *volume == at).map(|(_, may)| may);
                for may in making.chain([&mut self.volumes[at].may]) {
                    // A volume that has grown since has more sectors than its snapshot under way.
                    let end = may.len().min((first + sectors) as usize);
                    let within = may.get_mut(first as usize..end).into_iter().flatten();
                    within.for_each(|tags| tags.push(number(tag)));
                }
                self.volumes[at].writing = Some((first, sectors));
            }
            ["written", volume] => self.volume(volume).writing = None,
            ["flushed", volume] => {
                self.volume(volume).may.iter_mut().for_each(|tags| *tags = tags[tags.len() - 1..].to_vec());
            }
            ["grow", volume, sectors] => self.volume(volume).may.resize(number(sectors) as usize, vec![0]),
            ["grown", volume] => {
                let known = self.volume(volume);
                known.least = known.may.len();
            }
            ["snapshot", ref volumes @ ..] => {
                let volumes = volumes.iter().map(|volume| number(volume) as usize);
                self.making = volumes.map(|at| (at, self.frozen(at))).collect();
            }
            ["made", ref digests @ ..] => {
                for ((_, may), digest) in std::mem::take(&mut self.making).into_iter().zip(digests) {
                    let digest = digest.parse().unwrap();
                    self.collecting.remove(&digest);
                    self.snapshots.insert(digest, may);
                }
            }
            ["clone", "none"] => self.clone = None,
            ["clone", digest] => self.clone = Some(digest.parse().unwrap()),
            ["collect", ref keep @ ..] => {
                let keep: HashSet<&str> = keep.iter().copied().collect();
                let snapshots = std::mem::take(&mut self.snapshots).into_iter();
                let (kept, going) =
                    snapshots.partition(|(digest, _)| keep.contains(digest.to_string().as_str()));
                (self.snapshots, self.collecting) = (kept, going);
            }
            ["collected"] => self.collecting.clear(),
            _ => panic!("what is {line:?}?"),
        }
    }

    fn volume(&mut self, number: &str) -> &mut Known {
        &mut self.volumes[number.parse::<usize>().unwrap()]
    }

    /// What a snapshot of a volume that begins now may hold, before anything more is written.
    fn frozen(&self, at: usize) -> May {
        let known = &self.volumes[at];
        let (first, sectors) = known.writing.unwrap_or((0, 0));
        let now = known.may.iter().zip(0..).map(|(tags, sector)| {
            // The sectors of a write that has not returned are what they were, or what they will be.
            let open = usize::from((first..first + sectors).contains(&sector));
            tags[tags.len().saturating_sub(1 + open)..].to_vec()
        });
        now.collect()
    }

    /// Opens everything, checks it, and takes what is there for what is to be there from now on.
    pub(crate) fn check(&mut self, dir: &Path, time: u64) {
        let store = open(dir, time);
        let listed = store.snapshots().unwrap();
        for digest in self.snapshots.keys() {
            assert!(listed.contains(digest), "{digest} is lost");
        }
        let mut there = BTreeMap::new();
        for digest in listed {
            let snapshot = store.snapshot(&digest).unwrap();
            snapshot.verify().unwrap();
            let found = tags(&snapshot.disk());
            match self.snapshots.get(&digest).or(self.collecting.get(&digest)) {
                Some(may) => agree(&found, may, "a snapshot"),
                None => assert!(
                    self.making.iter().any(|(_, may)| differ(&found, may).is_none()),
                    "nobody made {digest} as it is"
                ),
            }
            there.insert(digest, found.into_iter().map(|tag| vec![tag]).collect());
        }
        (self.snapshots, self.collecting) = (there, BTreeMap::new());
        self.making.clear();

        if let Some(digest) = self.clone {
            let clone = Volume::open(&dir.join("clone"), &store).unwrap();
            assert_eq!(clone.base(), Some(digest));
            agree(&tags(&clone.disk()), &self.snapshots[&digest], "a clone");
        }
        // Another one begins without, so it may go.
        self.clone = None;
        Volume::remove(&dir.join("clone")).unwrap();

        for (known, (name, encrypted)) in self.volumes.iter_mut().zip(VOLUMES) {
            let volume = match Volume::open(&dir.join(name), &store) {
                Ok(volume) => volume,
                Err(error) => {
                    let untouched = known.may.iter().all(|tags| tags[..] == [0]);
                    assert!(untouched && known.least == BEGINNING as usize, "{name}: {error}");
                    Volume::remove(&dir.join(name)).unwrap();
                    *known = Known::new();
                    continue;
                }
            };
            assert_eq!(volume.encrypted(), encrypted);
            let found = tags(&volume.disk());
            // One that was growing is as large as it was, or as it was to be.
            if found.len() == known.least {
                known.may.truncate(known.least);
            }
            agree(&found, &known.may, name);
            let may: May = found.iter().map(|tag| vec![*tag]).collect();
            *known = Known { least: may.len(), may, writing: None };
            let (snapshot, _): (Snapshot, _) = volume.snapshot(&store).unwrap();
            snapshot.verify().unwrap();
            assert_eq!(tags(&snapshot.disk()), found);
            self.snapshots.insert(snapshot.digest(), known.may.clone());
        }
    }
}

/// The number that each sector is full of.
fn tags(disk: &Disk) -> Vec<u64> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    let sector = |sector: &[u8]| {
        let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
        assert!(sector.chunks(8).all(|part| part == tag.to_le_bytes()), "half a sector was written");
        tag
    };
    bytes.chunks(SECTOR).map(sector).collect()
}

/// What is not as it may be.
fn differ(found: &[u64], may: &May) -> Option<String> {
    if found.len() != may.len() {
        return Some(format!("{} sectors, and may be {}", found.len(), may.len()));
    }
    let mut sectors = found.iter().zip(may).enumerate();
    let (sector, (found, may)) = sectors.find(|(_, (found, may))| !may.contains(found))?;
    Some(format!("sector {sector} is {found}, and may be {may:?}"))
}

fn agree(found: &[u64], may: &May, what: &str) {
    if let Some(why) = differ(found, may) {
        panic!("{what}: {why}");
    }
}

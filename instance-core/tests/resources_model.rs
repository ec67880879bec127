//! Volumes, snapshots and tags of two accounts against a reference in memory: after each of many random calls, which may
//! be refused, the region tells of them what the reference does.
//!
//! `REGION_RESOURCES_STEPS` says how many calls (1,500), `REGION_SEED` where to begin.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::time::Duration;

use ami_core::{Ami, Grantee, InstanceId, ModifyImageAttribute, ResourceId, SnapshotId, VolumeId, X86_64};
use common::{TestRegion, soon};
use instance_core::testing::tiny_elf;
use instance_core::{
    DescribeSnapshots, DescribeTags, DescribeVolumes, DirectBoot, ErrorKind, ImageSource, InstanceState,
    LaunchSpec, Result, VolumeSpec,
};
use random::{Random, number};

const DEVICES: [&str; 3] = ["/dev/sdf", "/dev/sdg", "/dev/xvda"];
const ACCOUNTS: [&str; 2] = ["111111111111", "222222222222"];
const MOST: usize = 8;

type Tags = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq)]
struct Volume {
    owner: usize,
    gib: u64,
    /// The instance, the device there, and whether it goes with it.
    place: Option<(InstanceId, String, bool)>,
    tags: Tags,
}

#[derive(Debug, Clone, PartialEq)]
struct Snapshot {
    owner: usize,
    volume: VolumeId,
    gib: u64,
    tags: Tags,
}

/// What there should be.
#[derive(Debug, Default)]
struct Model {
    volumes: BTreeMap<VolumeId, Volume>,
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// Those that are stopped, and whose they are.
    instances: BTreeMap<InstanceId, usize>,
}

impl Model {
    fn volume(&mut self, who: usize, id: VolumeId) -> Result<&mut Volume, ErrorKind> {
        let found = self.volumes.get_mut(&id).filter(|volume| volume.owner == who);
        found.ok_or(ErrorKind::VolumeNotFound)
    }

    fn snapshot(&mut self, who: usize, id: SnapshotId) -> Result<&mut Snapshot, ErrorKind> {
        let found = self.snapshots.get_mut(&id).filter(|snapshot| snapshot.owner == who);
        found.ok_or(ErrorKind::SnapshotNotFound)
    }

    fn attach(&mut self, who: usize, id: VolumeId, to: InstanceId, device: &str) -> Result<(), ErrorKind> {
        if self.instances.get(&to) != Some(&who) {
            return Err(ErrorKind::InstanceNotFound);
        }
        let mut places = self.volumes.values().filter_map(|volume| volume.place.clone());
        let taken = places.any(|(holder, name, _)| holder == to && name == device);
        let volume = self.volume(who, id)?;
        if volume.place.is_some() {
            return Err(ErrorKind::VolumeInUse);
        }
        if taken {
            return Err(ErrorKind::InvalidParameter);
        }
        volume.place = Some((to, device.to_owned(), false));
        Ok(())
    }

    fn delete(&mut self, who: usize, id: VolumeId) -> Result<(), ErrorKind> {
        if self.volume(who, id)?.place.is_some() {
            return Err(ErrorKind::VolumeInUse);
        }
        self.volumes.remove(&id);
        Ok(())
    }

    fn terminate(&mut self, id: InstanceId) {
        self.instances.remove(&id);
        let here = |volume: &Volume| volume.place.as_ref().is_some_and(|(holder, ..)| *holder == id);
        self.volumes
            .retain(|_, volume| !here(volume) || !volume.place.as_ref().is_some_and(|(.., goes)| *goes));
        self.volumes.values_mut().filter(|volume| here(volume)).for_each(|volume| volume.place = None);
    }

    fn tags(&mut self, who: usize, of: ResourceId) -> Result<&mut Tags, ErrorKind> {
        match of {
            ResourceId::Volume(id) => Ok(&mut self.volume(who, id)?.tags),
            ResourceId::Snapshot(id) => Ok(&mut self.snapshot(who, id)?.tags),
            other => panic!("{other} has no tags here"),
        }
    }
}

struct World {
    dir: tempfile::TempDir,
    regions: Vec<TestRegion>,
    ami: Ami<X86_64>,
    model: Model,
    random: Random,
}

fn open(dir: &std::path::Path) -> Vec<TestRegion> {
    let region = common::open(dir);
    ACCOUNTS.iter().map(|account| region.as_account(account.parse().unwrap())).collect()
}

impl World {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let regions = open(dir.path());
        let disk = storage_block::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = regions[0].register_image(Ami::<X86_64>::builder("base"), source).unwrap();
        let everyone = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
        regions[0].modify_image_attribute(ami.id(), &everyone).unwrap();
        Self { dir, regions, ami, model: Model::default(), random: Random(seed) }
    }

    /// Makes one call, as one of the accounts, which comes to what the reference says.
    fn step(&mut self) -> String {
        let who = self.random.below(ACCOUNTS.len());
        let Self { model, random, .. } = self;
        let (volume, snapshot) = (random.key(&model.volumes), random.key(&model.snapshots));
        let instance = random.key(&model.instances);
        let gib = 1 + random.below(3) as u64;
        let what = random.below(20);
        let region = &self.regions[who];
        let check = |said: String, found: Result<(), ErrorKind>, expected: Result<(), ErrorKind>| {
            assert_eq!(found, expected, "{said} by account {who}");
            said
        };
        let kind = |e: instance_core::Error| e.kind();
        match (what, volume, snapshot, instance) {
            (0 | 1, ..) if model.volumes.len() < MOST => {
                let made = region.create_volume(VolumeSpec::new(gib as u32)).unwrap();
                let volume = Volume { owner: who, gib, place: None, tags: Tags::new() };
                model.volumes.insert(made.id, volume);
                format!("create {}", made.id)
            }
            (2, _, Some(from), _) if model.volumes.len() < MOST => {
                let made = region.create_volume(VolumeSpec::of_snapshot(from).size_gib(gib as u32));
                let expected = model.snapshot(who, from).and_then(|snapshot| match snapshot.gib <= gib {
                    true => Ok(()),
                    false => Err(ErrorKind::InvalidParameter),
                });
                if let Ok(made) = &made {
                    let volume = Volume { owner: who, gib, place: None, tags: Tags::new() };
                    model.volumes.insert(made.id, volume);
                }
                check(format!("create of {from} with {gib} GiB"), made.map(drop).map_err(kind), expected)
            }
            (3 | 4, Some(id), ..) => {
                let found = region.delete_volume(id).map_err(kind);
                check(format!("delete {id}"), found, model.delete(who, id))
            }
            (5..=8, Some(id), _, Some(to)) => {
                let device = DEVICES[self.random.below(DEVICES.len())];
                let found = region.attach_volume(id, to, device).map_err(kind);
                check(format!("attach {id} to {to} at {device}"), found, model.attach(who, id, to, device))
            }
            (9 | 10, Some(id), ..) => {
                let found = region.detach_volume(id).map_err(kind);
                let expected = model.volume(who, id).and_then(|volume| match volume.place.take() {
                    Some(_) => Ok(()),
                    None => Err(ErrorKind::IncorrectState),
                });
                check(format!("detach {id}"), found, expected)
            }
            (11, Some(id), ..) => {
                let found = region.grow_volume(id, gib as u32).map(drop).map_err(kind);
                let expected = model.volume(who, id).and_then(|volume| match volume.gib <= gib {
                    true => {
                        volume.gib = gib;
                        Ok(())
                    }
                    false => Err(ErrorKind::InvalidParameter),
                });
                check(format!("grow {id} to {gib} GiB"), found, expected)
            }
            (12, Some(id), ..) if model.snapshots.len() < MOST => {
                let made = match self.random.below(3) {
                    0 => region.create_snapshot(id, ""),
                    1 => region.begin_create_snapshot(id, "").and_then(|pending| pending.wait(soon())),
                    _ => {
                        // One that is given up before or after it is there.
                        if let Ok(pending) = region.begin_create_snapshot(id, "") {
                            region.delete_snapshot(pending.id()).unwrap();
                        }
                        region.create_snapshot(id, "")
                    }
                };
                let expected = model.volume(who, id).map(|volume| volume.gib);
                if let (Ok(made), Ok(gib)) = (&made, expected) {
                    let snapshot = Snapshot { owner: who, volume: id, gib, tags: Tags::new() };
                    model.snapshots.insert(made.id, snapshot);
                }
                check(format!("snapshot {id}"), made.map(drop).map_err(kind), expected.map(drop))
            }
            (13, _, Some(id), _) => {
                let found = region.delete_snapshot(id).map_err(kind);
                let expected = model.snapshot(who, id).map(drop);
                if expected.is_ok() {
                    model.snapshots.remove(&id);
                }
                check(format!("delete {id}"), found, expected)
            }
            (14 | 15, Some(volume), snapshot, _) => {
                let on_volume = self.random.below(2) == 0;
                let of = snapshot.filter(|_| !on_volume).map_or(volume.into(), ResourceId::from);
                let (key, value) =
                    (format!("k{}", self.random.below(2)), format!("v{}", self.random.below(2)));
                let found = region.create_tags(&[of], &[(&key, &value)]).map_err(kind);
                let said = format!("tag {of} {key}={value}");
                check(said, found, model.tags(who, of).map(|tags| drop(tags.insert(key, value))))
            }
            (16, Some(volume), ..) => {
                let (of, value) = (ResourceId::from(volume), format!("v{}", self.random.below(2)));
                let found = region.delete_tags(&[of], &[("k0", Some(&value))]).map_err(kind);
                let expected = model.tags(who, of).map(|tags| {
                    if tags.get("k0") == Some(&value) {
                        tags.remove("k0");
                    }
                });
                check(format!("untag {of} k0={value}"), found, expected)
            }
            (17, ..) if model.instances.len() < 3 => {
                let made = region.launch(&self.ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
                made.stop(Duration::ZERO).unwrap();
                let root = made.describe().attachments.remove(0);
                let place = Some((made.id(), root.device_name, root.delete_on_termination));
                model.volumes.insert(root.volume_id, Volume { owner: who, gib: 1, place, tags: Tags::new() });
                model.instances.insert(made.id(), who);
                format!("launch {}", made.id())
            }
            (18, _, _, Some(id)) => {
                let owner = model.instances[&id];
                let theirs = self.regions[owner].instance(id).unwrap();
                theirs.terminate().unwrap();
                assert_eq!(theirs.state(), InstanceState::Terminated);
                model.terminate(id);
                format!("terminate {id}")
            }
            (19, ..) if self.random.below(4) == 0 => {
                self.regions.clear();
                self.regions = open(self.dir.path());
                "reopen".to_owned()
            }
            _ => "nothing".to_owned(),
        }
    }

    /// Compares all that the accounts are told with the reference.
    fn check(&self, after: &str) {
        let (mut volumes, mut snapshots, mut tags) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for (owner, region) in self.regions.iter().enumerate() {
            for told in region.describe_volumes(&DescribeVolumes::new()).unwrap().items {
                let place = told.attachment.map(|a| (a.instance_id, a.device_name, a.delete_on_termination));
                let volume = Volume { owner, gib: told.size_gib, place, tags: plain(&told.tags) };
                volumes.insert(told.id, volume);
            }
            for told in region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items {
                let (volume, gib) = (told.volume_id, told.volume_size_gib);
                snapshots.insert(told.id, Snapshot { owner, volume, gib, tags: plain(&told.tags) });
            }
            let told = region.describe_tags(&DescribeTags::new()).unwrap().items;
            tags.extend(told.into_iter().map(|tag| (tag.resource_id, tag.key, tag.value)));
        }
        assert_eq!(volumes, self.model.volumes, "{after}");
        assert_eq!(snapshots, self.model.snapshots, "{after}");
        let of_volumes = volumes.iter().map(|(id, volume)| (ResourceId::from(*id), &volume.tags));
        let of_snapshots = snapshots.iter().map(|(id, snapshot)| (ResourceId::from(*id), &snapshot.tags));
        let expected = of_volumes.chain(of_snapshots);
        let mut expected: Vec<_> = expected
            .flat_map(|(id, tags)| tags.iter().map(move |(key, value)| (id, key.clone(), value.clone())))
            .collect();
        expected.sort();
        tags.sort();
        assert_eq!(tags, expected, "{after}");
    }
}

fn plain(tags: &ami_core::Tags) -> Tags {
    tags.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn resources_are_as_the_reference_says() {
    let (steps, seed) = (number("REGION_RESOURCES_STEPS", 1500), number("REGION_SEED", 1));
    eprintln!("REGION_RESOURCES_STEPS={steps} REGION_SEED={seed}");
    let mut world = World::new(seed);
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for step in 0..steps {
        let done = world.step();
        *counts.entry(done.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
        world.check(&format!("step {step} of seed {seed}: {done}"));
        if step % 5000 == 4999 {
            eprintln!("{} of {steps} steps", step + 1);
        }
    }
    eprintln!("{counts:?}");
    // All of it is done, and not only refused.
    assert!(counts.len() >= 12 && counts.values().all(|count| *count > steps / 200), "{counts:?}");
}

//! What has been acknowledged, and what may be beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ami_core::{AnyAmi, Digest, X86_64};
use instance_core::{
    DescribeSnapshots, DescribeVolumes, ErrorKind, InstanceState, LaunchSpec, SnapshotState,
    VolumeDescription,
};

use super::child::{kernel, two_once};
use super::{PLACES, TestRegion, ask};

/// What stands at each of the [`PLACES`].
type Words = [String; PLACES.len()];

#[derive(Clone)]
struct Image {
    words: Words,
    /// Which kernel it boots.
    kernel: usize,
    snapshots: Vec<String>,
    /// It was launched once, and held what it should.
    seen: bool,
}

struct Instance {
    /// As the guest sees it.
    words: Words,
    /// As it was last made durable.
    durable: Words,
    /// What was written since; any of it may be there after a kill.
    unflushed: [Vec<String>; PLACES.len()],
    kernel: usize,
    volumes: Vec<String>,
    snapshots: Vec<String>,
    /// Why it is stopped, or will be found so; nothing while it runs.
    stopped: Option<&'static str>,
    /// What it has in mind while it hibernates.
    asleep: Option<String>,
    /// Its tag.
    tag: Option<String>,
}

/// The images and instances that were acknowledged, by their ids.
#[derive(Default)]
pub(crate) struct Model {
    images: BTreeMap<String, Image>,
    instances: BTreeMap<String, Instance>,
    /// Those that were terminated, of which the region tells for an hour.
    terminated: BTreeSet<String>,
    /// The images of the launches that had a client token, by that, and the instances that came of them.
    tokens: BTreeMap<String, (String, BTreeSet<String>)>,
    /// Volumes that outlived their instances, with the snapshots that they need.
    kept: BTreeMap<String, Vec<String>>,
    /// Those of them that are attached to an instance, beside its own.
    attached: BTreeMap<String, String>,
    /// Snapshots that were made of volumes, with their digests.
    snapshots: BTreeMap<String, String>,
    /// The action that was begun and not acknowledged.
    under_way: Option<Vec<String>>,
    /// What the child has said since the last kill.
    said: Vec<String>,
}

const LOST: &str = "Server.InternalError";
const BY_USER: &str = "Client.UserInitiatedShutdown";
pub(crate) const HIBERNATED: &str = "Client.UserInitiatedHibernate";
const BY_GUEST: &str = "Client.InstanceInitiatedShutdown";

pub(crate) fn snapshots_of(ami: &AnyAmi) -> Vec<Digest> {
    let mappings = ami.manifest().block_device_mappings();
    mappings.iter().filter_map(|m| m.as_ebs()?.snapshot().copied()).collect()
}

/// The instances that are terminated, and the others.
fn everyone(region: &TestRegion) -> (Vec<instance_core::Instance>, Vec<instance_core::Instance>) {
    region.instances().into_iter().partition(|i| i.state() == InstanceState::Terminated)
}

impl Model {
    /// Takes in a line of the child's; says whether it acknowledged something.
    pub(crate) fn hear(&mut self, line: &str) -> bool {
        let Some(line) = line.trim_end().strip_prefix('@') else { return false };
        self.said.push(line.to_owned());
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match words[0].as_str() {
            "begin" => {
                assert!(self.under_way.is_none(), "two actions at once");
                if words[1] == "write" {
                    let place: usize = words[3].parse().unwrap();
                    self.instance(&words[2]).unflushed[place].push(words[4].clone());
                }
                self.under_way = Some(words[1..].to_vec());
                false
            }
            _ => {
                let done = self.under_way.take().unwrap();
                self.acknowledge(&done, &words[1..]);
                true
            }
        }
    }

    fn instance(&mut self, id: &str) -> &mut Instance {
        self.instances.get_mut(id).unwrap()
    }

    fn acknowledge(&mut self, action: &[String], result: &[String]) {
        let subject = action[1].as_str();
        match action[0].as_str() {
            "register" => self.add_image(result, first_words(subject), action[2].parse().unwrap()),
            "create" => {
                let from = self.instance(subject);
                let (words, kernel) = (from.words.clone(), from.kernel);
                self.add_image(result, words, kernel);
            }
            "deregister" => drop(self.images.remove(subject).unwrap()),
            "launch" => self.add_instance(result, subject),
            "run" => {
                assert_eq!(result.len(), 6, "two instances with two volumes each, or none: {result:?}");
                result.chunks(3).for_each(|one| self.add_instance(one, subject));
                let ids = result.chunks(3).map(|one| one[0].clone()).collect();
                self.tokens.insert(action[2].clone(), (subject.to_owned(), ids));
            }
            "volume" => {
                let base = self.snapshots.get(subject).cloned();
                self.kept.insert(result[0].clone(), base.into_iter().collect());
            }
            "delete-volume" => drop(self.kept.remove(subject).unwrap()),
            "snapshot" => drop(self.snapshots.insert(result[0].clone(), result[1].clone())),
            "delete-snapshot" => drop(self.snapshots.remove(subject).unwrap()),
            "tag" => self.instance(subject).tag = Some(action[2].clone()),
            "attach" => drop(self.attached.insert(action[2].clone(), subject.to_owned())),
            "detach" => drop(self.attached.remove(&action[2]).unwrap()),
            "terminate" => self.remove_instance(subject),
            "write" => {
                let place: usize = action[2].parse().unwrap();
                self.instance(subject).words[place] = action[3].clone();
            }
            "flush" | "reboot" => self.instance(subject).settle(),
            "start" => {
                let instance = self.instance(subject);
                (instance.stopped, instance.asleep) = (None, None);
            }
            "hibernate" => {
                let instance = self.instance(subject);
                instance.settle();
                (instance.stopped, instance.asleep) = (Some(HIBERNATED), Some(action[2].clone()));
            }
            what @ ("stop" | "poweroff") => {
                let instance = self.instance(subject);
                instance.settle();
                instance.stopped.get_or_insert(if what == "stop" { BY_USER } else { BY_GUEST });
            }
            what => panic!("the child does not do {what}"),
        }
    }

    fn add_image(&mut self, described: &[String], words: Words, kernel: usize) {
        let image = Image { words, kernel, snapshots: described[1..].to_vec(), seen: false };
        assert!(self.images.insert(described[0].clone(), image).is_none(), "an id was given twice");
    }

    fn add_instance(&mut self, described: &[String], image: &str) {
        let Image { words, kernel, snapshots, .. } = self.images[image].clone();
        let volumes = described[1..].to_vec();
        let unflushed = Default::default();
        let durable = words.clone();
        let (stopped, asleep, tag) = (None, None, None);
        let instance =
            Instance { words, durable, unflushed, kernel, volumes, snapshots, stopped, asleep, tag };
        assert!(self.instances.insert(described[0].clone(), instance).is_none(), "an id was given twice");
    }

    /// The root volume goes with its instance, the second is kept.
    fn remove_instance(&mut self, id: &str) {
        let gone = self.instances.remove(id).unwrap();
        self.terminated.insert(id.to_owned());
        self.attached.retain(|_, holder| holder != id);
        self.kept.insert(gone.volumes[1].clone(), but_the_roots(&gone.snapshots));
    }

    /// Compares a region that was opened after a kill with this, and goes on from what it found.
    pub(crate) fn check(&mut self, region: &TestRegion, dir: &Path, kill: u64) {
        let when = format!("kill {kill} after\n{}\n", std::mem::take(&mut self.said).join("\n"));
        let under_way = self.under_way.take().unwrap_or_default();
        self.adopt(region, dir, &under_way);

        let found: Vec<String> = region.images().unwrap().iter().map(|i| i.ami().id().to_string()).collect();
        assert_eq!(found, self.images.keys().cloned().collect::<Vec<_>>(), "images, {when}");
        let (terminated, instances): (Vec<_>, Vec<_>) = everyone(region);
        let found: BTreeSet<String> = terminated.iter().map(|i| i.id().to_string()).collect();
        assert_eq!(found, self.terminated, "instances that were terminated, {when}");
        let found: Vec<String> = instances.iter().map(|i| i.id().to_string()).collect();
        assert_eq!(found, self.instances.keys().cloned().collect::<Vec<_>>(), "instances, {when}");
        self.check_files(dir, &when);
        self.check_resources(region, &when);
        self.check_tokens(region, &when);

        for instance in instances {
            let id = instance.id().to_string();
            let known = self.instance(&id);
            let description = instance.describe();
            assert_eq!(description.state, InstanceState::Stopped, "{id}, {when}");
            assert_eq!(description.tags.get("word"), known.tag.as_ref(), "{id}, {when}");
            let reason = description.state_reason.unwrap();
            if under_way.get(1) != Some(&id) {
                assert_eq!(reason.code, known.stopped.unwrap_or(LOST), "{id}, {when}: {reason}");
            }
            if reason.code == LOST {
                assert!(reason.message.contains("the process that owned the region ended"), "{reason}");
            }
            instance.start().unwrap();
            let recalled = ask(&instance, "recall", "recalled");
            assert_eq!(recalled, known.asleep.take().unwrap_or_default(), "{id}, {when}");
            for (place, (disk, sector)) in PLACES.into_iter().enumerate() {
                let word = ask(&instance, &format!("read {disk} {sector}"), "data");
                let (durable, unflushed) = (&known.durable[place], &known.unflushed[place]);
                let may_be = word == *durable || unflushed.contains(&word);
                assert!(may_be, "{id}, place {place}: {word:?}, not {durable:?} or {unflushed:?}, {when}");
                known.words[place] = word;
            }
            // It runs until the region is closed, which makes durable what it has written.
            known.settle();
            known.stopped = Some(LOST);
        }
        self.see_images(region, &when);
    }

    /// A launch that is asked for again gives what came of it, unless that has ended, and makes nothing.
    fn check_tokens(&self, region: &TestRegion, when: &str) {
        for (token, (image, ids)) in &self.tokens {
            // What is not there is not asked for.
            let Ok(image) = region.image(image.parse().unwrap()) else { continue };
            let ami = image.ami().typed::<X86_64>().unwrap();
            let again = region.run_instances(&ami, two_once(token));
            if !ids.iter().any(|id| self.instances.contains_key(id)) {
                let refused = again.err().map(|e| e.kind());
                assert_eq!(refused, Some(ErrorKind::IdempotentInstanceTerminated), "{token}, {when}");
                continue;
            }
            let again = again.unwrap_or_else(|e| panic!("{token}: {e}, {when}")).instances;
            let found: BTreeSet<String> = again.iter().map(|i| i.id().to_string()).collect();
            assert_eq!(found, *ids, "{token}, {when}");
        }
        let known = self.instances.len() + self.terminated.len();
        assert_eq!(region.instances().len(), known, "a launch was made twice, {when}");
    }

    /// What was under way may have been done: looks whether it was.
    fn adopt(&mut self, region: &TestRegion, dir: &Path, under_way: &[String]) {
        let [action, subject, rest @ ..] = under_way else { return };
        let asleep = names(&dir.join("hibernated")).contains(subject);
        let images = region.images().unwrap();
        let name = if action == "register" { subject } else { rest.first().unwrap_or(subject) };
        let image = images.iter().find(|i| i.ami().name() == name).map(|i| {
            let snapshots = snapshots_of(i.ami()).into_iter().map(|s| s.to_hex());
            [i.ami().id().to_string()].into_iter().chain(snapshots).collect::<Vec<_>>()
        });
        let (_, instances) = everyone(region);
        let new: Vec<String> = (instances.iter())
            .filter(|i| !self.instances.contains_key(&i.id().to_string()))
            .flat_map(|i| {
                let volumes = i.describe().attachments.into_iter().map(|a| a.volume_id.to_string());
                [i.id().to_string()].into_iter().chain(volumes)
            })
            .collect();
        let new = Some(new).filter(|new| !new.is_empty());
        let (volumes, snapshots) = resources(region);
        let known = self.instances.values().flat_map(|i| &i.volumes).chain(self.kept.keys());
        let volume = volumes.keys().find(|id| !known.clone().any(|known| known == *id)).cloned();
        let snapshot = snapshots.iter().find(|(id, _)| !self.snapshots.contains_key(*id));
        let snapshot = snapshot.map(|(id, digest)| vec![id.clone(), digest.clone()]);
        let gone = |id: &String| {
            !images.iter().any(|i| i.ami().id().to_string() == *id)
                && !instances.iter().any(|i| i.id().to_string() == *id)
        };
        match (action.as_str(), image, new) {
            ("register" | "create", Some(described), _) | ("launch" | "run", _, Some(described)) => {
                self.acknowledge(under_way, &described);
            }
            ("volume", ..) => {
                if let Some(id) = volume {
                    self.acknowledge(under_way, &[id]);
                }
            }
            ("snapshot", ..) => {
                if let Some(described) = snapshot {
                    self.acknowledge(under_way, &described);
                }
            }
            ("hibernate", ..) if asleep => self.acknowledge(under_way, &[]),
            ("start", ..) if !asleep => self.instance(subject).asleep = None,
            ("delete-volume", ..) if !volumes.contains_key(subject) => self.acknowledge(under_way, &[]),
            ("delete-snapshot", ..) if !snapshots.contains_key(subject) => self.acknowledge(under_way, &[]),
            ("attach", ..) if volumes[&rest[0]].is_some() => self.acknowledge(under_way, &[]),
            ("detach", ..) if volumes[&rest[0]].is_none() => self.acknowledge(under_way, &[]),
            ("tag", ..) => {
                let tagged = instances.iter().find(|i| i.id().to_string() == *subject).unwrap();
                if tagged.describe().tags.get("word") == Some(&rest[0]) {
                    self.acknowledge(under_way, &[]);
                }
            }
            ("deregister" | "terminate", ..) if gone(subject) => self.acknowledge(under_way, &[]),
            _ => {}
        }
    }

    /// What the region says of volumes and snapshots is what was acknowledged.
    fn check_resources(&self, region: &TestRegion, when: &str) {
        let (volumes, snapshots) = resources(region);
        assert_eq!(snapshots, self.snapshots, "snapshots, {when}");
        let left = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items;
        let mut left = left.into_iter().filter(|snapshot| snapshot.state != SnapshotState::Completed);
        assert!(left.all(|snapshot| snapshot.state == SnapshotState::Error), "a snapshot is pending, {when}");
        let own = self.instances.iter().flat_map(|(id, i)| i.volumes.iter().map(move |v| (v, Some(id))));
        let others = self.kept.keys().map(|v| (v, self.attached.get(v)));
        let expected: BTreeMap<String, Option<String>> =
            own.chain(others).map(|(volume, holder)| (volume.clone(), holder.cloned())).collect();
        assert_eq!(volumes, expected, "volumes, {when}");
    }

    /// Nothing lies in the directory that nothing names, and nothing that is named is missing.
    pub(crate) fn check_files(&self, dir: &Path, when: &str) {
        let (images, instances) = (self.images.values(), self.instances.values());
        let volumes = instances.clone().flat_map(|i| i.volumes.clone()).chain(self.kept.keys().cloned());
        let snapshots = (images.clone().flat_map(|i| i.snapshots.clone()))
            .chain(instances.clone().flat_map(|i| i.snapshots.clone()))
            .chain(self.kept.values().flatten().cloned())
            .chain(self.snapshots.values().cloned());
        let asleep = self.instances.iter().filter(|(_, i)| i.asleep.is_some()).map(|(id, _)| id.clone());
        let kernels = images.map(|i| i.kernel).chain(instances.map(|i| i.kernel));
        let kernels = kernels.map(|number| Digest::of(&kernel(number)).to_hex());
        for (place, expected) in [
            ("volumes", volumes.collect()),
            ("blocks/snapshots", snapshots.collect()),
            ("boot", kernels.collect()),
            ("instances", BTreeSet::new()),
            ("hibernated", asleep.collect()),
        ] {
            assert_eq!(names(&dir.join(place)), expected, "{place}, {when}");
        }
        let half_made = names(&dir.join("blocks/packs")).into_iter().find(|name| name.ends_with(".tmp"));
        assert_eq!(half_made, None, "{when}");
    }

    /// Launches every image that is new.
    fn see_images(&mut self, region: &TestRegion, when: &str) {
        for (id, image) in self.images.iter_mut().filter(|(_, image)| !image.seen) {
            let ami = region.image(id.parse().unwrap()).unwrap();
            let ami = ami.ami().typed::<X86_64>().unwrap();
            let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
            for ((disk, sector), word) in PLACES.into_iter().zip(&image.words) {
                let found = ask(&instance, &format!("read {disk} {sector}"), "data");
                assert_eq!(found, *word, "{id}, disk {disk}, sector {sector}, {when}");
            }
            let kept = instance.describe().attachments[1].volume_id.to_string();
            instance.terminate().unwrap();
            self.terminated.insert(instance.id().to_string());
            self.kept.insert(kept, but_the_roots(&image.snapshots));
            image.seen = true;
        }
    }

    /// Takes everything away but the volumes that were kept and the snapshots.
    pub(crate) fn take_down(&mut self, region: &TestRegion) {
        for instance in everyone(region).1 {
            instance.terminate().unwrap();
            self.remove_instance(&instance.id().to_string());
        }
        for image in region.images().unwrap() {
            region.deregister_image(image.ami().id()).unwrap();
        }
        self.images.clear();
    }
}

/// The volumes of a region with the instances that have them, and its snapshots with their digests.
fn resources(region: &TestRegion) -> (BTreeMap<String, Option<String>>, BTreeMap<String, String>) {
    let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items.into_iter();
    let holder = |v: &VolumeDescription| v.attachment.as_ref().map(|a| a.instance_id.to_string());
    let snapshots = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items.into_iter();
    (
        volumes.map(|v| (v.id.to_string(), holder(&v))).collect(),
        // Those that could not be made have none.
        snapshots.filter_map(|s| Some((s.id.to_string(), s.digest?.to_hex()))).collect(),
    )
}

impl Instance {
    /// All that was written is durable.
    fn settle(&mut self) {
        self.durable = self.words.clone();
        self.unflushed = Default::default();
    }
}

/// The root device's name comes last in the order of a manifest's.
fn but_the_roots(snapshots: &[String]) -> Vec<String> {
    snapshots[..snapshots.len() - 1].to_vec()
}

fn first_words(word: &str) -> Words {
    let mut words = Words::default();
    words[0] = word.to_owned();
    words
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

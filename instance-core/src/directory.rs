//! The descriptions of all instances, found without looking at each.
//!
//! What is asked for most (`instance-state-name`, `image-id`, a tag, ...) has an index: value by value the ids
//! of the instances that have it. A filter of such a field whose values have no wildcards is answered from the
//! index, in time of the page that is asked for and not of the region.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ami_core::{AccountId, InstanceId, Page, VolumeId};

use crate::describe::{Condition, DescribeInstances, Filterable, tag_values};
use crate::network::Network;
use crate::{Error, ErrorKind, InstanceDescription, InstanceState, Result};

/// The filters that have an index, with `tag:KEY`. [`is_found_alike`] compares what they look at.
const INDEXED: &[&str] = &[
    "client-token",
    "image-id",
    STATE,
    "instance-type",
    "key-name",
    "owner-id",
    "reservation-id",
    "tag-key",
];
const STATE: &str = "instance-state-name";
const GROUP: &str = "instance.group-id";

type Ids = BTreeSet<InstanceId>;

#[derive(Debug, Default)]
pub(crate) struct Directory(RwLock<Shelves>);

#[derive(Debug, Default)]
struct Shelves {
    descriptions: BTreeMap<InstanceId, Arc<InstanceDescription>>,
    /// By the name of the filter, and by the value.
    index: HashMap<Cow<'static, str>, HashMap<String, Ids>>,
    /// Which instance has a volume.
    attached: HashMap<VolumeId, InstanceId>,
}

impl Directory {
    // A panic under the lock would leave an index that misses an entry at worst.
    fn read(&self) -> RwLockReadGuard<'_, Shelves> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Shelves> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a description in the place of what there was. Who does it holds the instance.
    pub(crate) fn set(&self, description: Arc<InstanceDescription>) {
        let old = self.read().descriptions.get(&description.id).cloned();
        // What all wait for each other with is no more than the change.
        let change = Reindexing::of(old.as_deref(), &description);
        self.write().set(old.as_deref(), description, change);
    }

    pub(crate) fn remove(&self, id: InstanceId) {
        self.write().remove(id);
    }

    /// The instance that a volume is attached to.
    pub(crate) fn attached(&self, volume: VolumeId) -> Option<Arc<InstanceDescription>> {
        let shelves = self.read();
        shelves.descriptions.get(shelves.attached.get(&volume)?).cloned()
    }

    /// Every description of an account's, in the order of their ids.
    pub(crate) fn all(&self, owner: AccountId) -> Vec<Arc<InstanceDescription>> {
        self.read().descriptions.values().filter(|d| d.owner == owner).cloned().collect()
    }

    /// The answer to a request that `owner` makes.
    pub(crate) fn describe(
        &self,
        owner: AccountId,
        request: &DescribeInstances,
        network: Option<&dyn Network>,
    ) -> Result<Page<InstanceDescription>> {
        request.check::<InstanceDescription>()?;
        let after: Option<InstanceId> = request.page.after_key()?;
        let chosen_by_group = request.filters.iter().any(|filter| filter.name == GROUP);
        let shelves = self.read();
        let theirs = |id: &InstanceId| shelves.descriptions.get(id).filter(|d| d.owner == owner);
        if let Some(missing) = request.ids.iter().find(|id| theirs(id).is_none()) {
            return Err(not_found(*missing));
        }
        let named: Ids = request.ids.iter().copied().collect();
        let owned = Condition::new("owner-id", [owner.to_string()]);
        let candidates = match named.is_empty() {
            true => shelves.candidates(request, &owned),
            false => vec![&named],
        };
        let found = (Merged::after(&candidates, after))
            .filter_map(|id| theirs(&id))
            .map(|description| match chosen_by_group {
                true => Cow::Owned(InstanceDescription::clone(description).with_groups_of(network)),
                false => Cow::Borrowed(&**description),
            })
            .filter(|d| request.asks_for(d.id, &**d));
        // Nobody who asks for a page needs more than its items and a look at what follows.
        let page = Page::collect(found, request.page.max_results(), |d| d.id).map(Cow::into_owned);
        drop(shelves);
        // The network may have to be waited for.
        Ok(if chosen_by_group { page } else { page.map(|d| d.with_groups_of(network)) })
    }
}

impl Shelves {
    fn set(
        &mut self,
        old: Option<&InstanceDescription>,
        description: Arc<InstanceDescription>,
        Reindexing { gone, come }: Reindexing,
    ) {
        gone.iter().for_each(|value| self.unindex(description.id, value));
        for (name, value) in come {
            self.index.entry(name).or_default().entry(value).or_default().insert(description.id);
        }
        if let Some(old) = old {
            self.detach(old);
        }
        if description.state != InstanceState::Terminated {
            self.attached.extend(description.attachments.iter().map(|a| (a.volume_id, description.id)));
        }
        self.descriptions.insert(description.id, description);
    }

    fn remove(&mut self, id: InstanceId) {
        let Some(old) = self.descriptions.remove(&id) else { return };
        indexed_values(&old).iter().for_each(|value| self.unindex(id, value));
        self.detach(&old);
    }

    fn unindex(&mut self, id: InstanceId, (name, value): &Indexed) {
        let Some(values) = self.index.get_mut(name) else { return };
        let left = values.get_mut(value).map_or(0, |ids| {
            ids.remove(&id);
            ids.len()
        });
        if left == 0 {
            values.remove(value);
        }
        if values.is_empty() {
            self.index.remove(name);
        }
    }

    fn detach(&mut self, old: &InstanceDescription) {
        for attachment in &old.attachments {
            if self.attached.get(&attachment.volume_id) == Some(&old.id) {
                self.attached.remove(&attachment.volume_id);
            }
        }
    }

    /// The smallest lists of ids, by the index, that hold all that is asked for.
    fn candidates<'a>(&'a self, request: &DescribeInstances, owned: &Condition) -> Vec<&'a Ids> {
        let lists = request.filters.iter().chain([owned]).filter_map(|f| self.lists(f));
        lists.min_by_key(|lists| lists.iter().map(|ids| ids.len()).sum::<usize>()).unwrap_or_default()
    }

    /// The lists of the ids for which a filter holds, if it is one that the index answers.
    fn lists(&self, filter: &Condition) -> Option<Vec<&Ids>> {
        if !is_indexed(&filter.name) {
            return None;
        }
        let values: Option<Vec<String>> = filter.patterns.iter().map(|p| p.literal()).collect();
        let index = self.index.get(&*filter.name);
        Some(values?.iter().filter_map(|value| index?.get(value)).collect())
    }
}

fn is_indexed(name: &str) -> bool {
    name.starts_with("tag:") || INDEXED.contains(&name)
}

/// The name of a filter, and a value that it finds an instance by.
type Indexed = (Cow<'static, str>, String);

fn values_of(name: &'static str, description: &InstanceDescription) -> impl Iterator<Item = Indexed> + use<> {
    description.values(name).into_iter().map(move |value| (Cow::Borrowed(name), value))
}

fn indexed_values(description: &InstanceDescription) -> Vec<Indexed> {
    let tags = description.tags.iter().map(|(key, value)| (format!("tag:{key}").into(), value.clone()));
    INDEXED.iter().flat_map(|name| values_of(name, description)).chain(tags).collect()
}

/// By what an instance is no longer found, and by what it is now.
struct Reindexing {
    gone: Vec<Indexed>,
    come: Vec<Indexed>,
}

impl Reindexing {
    fn of(old: Option<&InstanceDescription>, new: &InstanceDescription) -> Self {
        // What happens most is that an instance moves on, and is found by all else as before.
        let alike = old.is_some_and(|old| is_found_alike(old, new));
        let values = |description: &InstanceDescription| match alike {
            true => values_of(STATE, description).collect(),
            false => indexed_values(description),
        };
        let (mut gone, mut come) = (old.map(values).unwrap_or_default(), values(new));
        gone.retain(|value| match come.iter().position(|other| other == value) {
            Some(kept) => {
                come.swap_remove(kept);
                false
            }
            None => true,
        });
        Self { gone, come }
    }
}

/// Whether two descriptions of an instance have the same values of all that is [`INDEXED`], but perhaps for the state.
fn is_found_alike(one: &InstanceDescription, other: &InstanceDescription) -> bool {
    let key = |d: &InstanceDescription| (d.image_id, d.owner, d.reservation_id);
    key(one) == key(other)
        && one.client_token == other.client_token
        && one.key_name == other.key_name
        && one.instance_type == other.instance_type
        && one.tags == other.tags
}

/// The ids of several lists in order, each once.
struct Merged<'a>(Vec<std::iter::Peekable<std::collections::btree_set::Range<'a, InstanceId>>>);

impl<'a> Merged<'a> {
    fn after(lists: &[&'a Ids], after: Option<InstanceId>) -> Self {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        Self(lists.iter().map(|ids| ids.range((from, Bound::Unbounded)).peekable()).collect())
    }
}

impl Iterator for Merged<'_> {
    type Item = InstanceId;

    fn next(&mut self) -> Option<InstanceId> {
        let next = **self.0.iter_mut().filter_map(|list| list.peek()).min()?;
        for list in &mut self.0 {
            list.next_if(|id| **id == next);
        }
        Some(next)
    }
}

pub(crate) fn not_found(id: InstanceId) -> Error {
    Error::new(ErrorKind::InstanceNotFound, format!("the instance {id} does not exist"))
}

impl Filterable for InstanceDescription {
    const WHAT: &'static str = "instances";
    const NAMES: &'static [&'static str] = &[
        "architecture",
        "block-device-mapping.delete-on-termination",
        "block-device-mapping.device-name",
        "block-device-mapping.volume-id",
        "client-token",
        "hibernation-options.configured",
        "image-id",
        "instance-id",
        "instance-state-code",
        "instance-state-name",
        "instance-type",
        "key-name",
        "launch-index",
        "launch-time",
        "instance.group-id",
        "metadata-options.http-endpoint",
        "metadata-options.http-tokens",
        "network-interface.network-interface-id",
        "owner-id",
        "private-dns-name",
        "private-ip-address",
        "product-code",
        "product-code.type",
        "reason",
        "reservation-id",
        "root-device-name",
        "root-device-type",
        "state-reason-code",
        "state-reason-message",
        "subnet-id",
        "tag-key",
        "virtualization-type",
        "vpc-id",
    ];

    fn values(&self, name: &str) -> Vec<String> {
        let attachments = || self.attachments.iter();
        let place = self.network.iter();
        match name {
            "architecture" => vec![self.architecture.to_string()],
            "block-device-mapping.delete-on-termination" => {
                attachments().map(|a| a.delete_on_termination.to_string()).collect()
            }
            "block-device-mapping.device-name" => attachments().map(|a| a.device_name.clone()).collect(),
            "block-device-mapping.volume-id" => attachments().map(|a| a.volume_id.to_string()).collect(),
            "client-token" => self.client_token.iter().cloned().collect(),
            "hibernation-options.configured" => vec![self.hibernation.to_string()],
            "image-id" => vec![self.image_id.to_string()],
            "instance-id" => vec![self.id.to_string()],
            "instance-state-code" => vec![self.state.code().to_string()],
            "instance-state-name" => vec![self.state.to_string()],
            "instance-type" => vec![self.instance_type.to_string()],
            "key-name" => self.key_name.iter().cloned().collect(),
            "launch-index" => vec![self.launch_index.to_string()],
            "launch-time" => vec![self.launch_time.to_string()],
            GROUP => place.flat_map(|p| &p.security_groups).map(ToString::to_string).collect(),
            "metadata-options.http-endpoint" => {
                let enabled = self.metadata_options.http_endpoint;
                vec![if enabled { "enabled" } else { "disabled" }.to_owned()]
            }
            "metadata-options.http-tokens" => vec![self.metadata_options.http_tokens.as_str().to_owned()],
            "network-interface.network-interface-id" => place.map(|p| p.interface_id.to_string()).collect(),
            "owner-id" => vec![self.owner.to_string()],
            "private-dns-name" => place.map(|p| p.private_dns_name.clone()).collect(),
            "private-ip-address" => place.map(|p| p.private_ip.to_string()).collect(),
            "product-code" => self.product_codes.iter().map(|code| code.id.clone()).collect(),
            "product-code.type" => self.product_codes.iter().map(|code| code.kind.to_string()).collect(),
            "reason" => {
                Some(self.state_transition_reason.clone()).filter(|r| !r.is_empty()).into_iter().collect()
            }
            "reservation-id" => vec![self.reservation_id.to_string()],
            "root-device-name" => vec![self.root_device_name.clone()],
            "root-device-type" => vec![self.root_device_type.to_string()],
            "state-reason-code" => self.state_reason.iter().map(|r| r.code.clone()).collect(),
            "state-reason-message" => self.state_reason.iter().map(|r| r.message.clone()).collect(),
            "subnet-id" => place.map(|p| p.subnet_id.to_string()).collect(),
            "virtualization-type" => vec!["hvm".to_owned()],
            "vpc-id" => place.map(|p| p.vpc_id.to_string()).collect(),
            name => tag_values(name, self.tags.iter().map(|(k, v)| (&**k, &**v))).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::{FakeHypervisor, tiny_elf};
    use crate::{DirectBoot, ImageSource, LaunchSpec, Region};
    use ami_core::{Ami, X86_64};

    /// An entry that stays behind would be passed over by every answer, and make each take longer.
    #[test]
    fn nothing_stays_of_an_instance_that_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let disk = storage_block::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = region.register_image(Ami::<X86_64>::builder("base"), source).unwrap();
        let spec = LaunchSpec::new("t2.nano".parse().unwrap()).count(2, 2).tag("stage", "test");
        let both = region.run_instances(&ami, spec.client_token("both")).unwrap().instances;
        region.create_tags(&[both[0].id().into()], &[("stage", "production")]).unwrap();
        let stages =
            |shelves: &Shelves| shelves.index["tag:stage"].values().map(BTreeSet::len).sum::<usize>();
        assert_eq!(stages(&region.inner.directory.read()), 2, "a value that was replaced is not found");
        assert_eq!(region.inner.directory.read().attached.len(), 2);
        both.iter().for_each(|instance| instance.terminate().unwrap());
        assert_eq!(region.inner.directory.read().attached.len(), 0);
        region.inner.forget_terminated(Instant::now() + Duration::from_secs(60 * 60));
        let shelves = region.inner.directory.read();
        assert!(shelves.descriptions.is_empty() && shelves.index.is_empty(), "{shelves:?}");
    }
}

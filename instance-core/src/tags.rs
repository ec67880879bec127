//! Tags on every resource (`CreateTags`, `DeleteTags`, `DescribeTags`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use ami_core::{
    AccountId, Action, AmiId, InstanceId, LaunchTemplateId, Page, PageRequest, ResourceId, ResourceType,
    SnapshotId, Tags, VolumeId,
};

use crate::describe::{Condition, Filterable, MIN_RESULTS, filters_and_page};
use crate::instance::{Cell, Hold};
use crate::launch_template::LaunchTemplateRecord;
use crate::modify::check_alive;
use crate::record::{ImageRecord, InstanceRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, Result};

/// A tag of a resource (`DescribeTags`); [`Region::create_tags`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TagDescription {
    /// Whose.
    pub resource_id: ResourceId,
    /// What that is.
    pub resource_type: ResourceType,
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
}

/// A request for tags, with the filters `key`, `resource-id`, `resource-type` and `value`.
///
/// ```
/// use instance_core::DescribeTags;
///
/// let request = DescribeTags::new().filter("resource-type", ["volume"]).filter("key", ["Name"]).max_results(50);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct DescribeTags {
    filters: Vec<Condition>,
    page: PageRequest,
}

impl DescribeTags {
    /// All tags.
    pub fn new() -> Self {
        Self::default()
    }

    filters_and_page!("5 to 1000");
}

impl<H> Region<H> {
    /// Sets tags of images, instances, launch templates, snapshots and volumes of the account's: of all of them or of none
    /// (`CreateTags`). A key that is there gets the new value.
    ///
    /// ```
    /// # use instance_core::{Region, testing::FakeHypervisor};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// use instance_core::{DescribeTags, VolumeSpec};
    ///
    /// let volume = region.create_volume(VolumeSpec::new(1).tag("stage", "test"))?;
    /// region.create_tags(&[volume.id.into()], &[("Name", "data"), ("stage", "production")])?;
    /// region.delete_tags(&[volume.id.into()], &[("stage", Some("test")), ("Name", None)])?;
    /// let left = region.describe_tags(&DescribeTags::new())?.items;
    /// let [tag] = &left[..] else { return Err("one is left: stage had another value".into()) };
    /// assert_eq!((tag.resource_id, &*tag.key, &*tag.value), (volume.id.into(), "stage", "production"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`InstanceNotFound`](ErrorKind::InstanceNotFound),
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`VolumeNotFound`](ErrorKind::VolumeNotFound),
    /// [`AuthFailure`](ErrorKind::AuthFailure) for another account's image,
    /// [`MalformedTagKey`](ErrorKind::MalformedTagKey), [`InvalidParameter`](ErrorKind::InvalidParameter) for a
    /// value of more than 256 characters, [`TagLimitExceeded`](ErrorKind::TagLimitExceeded),
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) for an instance that is terminated,
    /// [`MissingParameter`](ErrorKind::MissingParameter) without tags or resources, or what the host met.
    pub fn create_tags(&self, resources: &[ResourceId], tags: &[(&str, &str)]) -> Result<()> {
        let empty = tags.is_empty();
        self.inner.change_tags(*self.account(), resources, empty, |kept| {
            for (key, value) in tags {
                kept.insert(*key, *value)?;
            }
            Ok(())
        })
    }

    /// Removes tags: each by its key, or only where it has the value that is given (`DeleteTags`). It is no
    /// error if there is none.
    ///
    /// # Errors
    ///
    /// As [`create_tags`](Self::create_tags).
    pub fn delete_tags(&self, resources: &[ResourceId], tags: &[(&str, Option<&str>)]) -> Result<()> {
        self.inner.change_tags(*self.account(), resources, tags.is_empty(), |kept| {
            for (key, value) in tags {
                if value.is_none() || kept.get(key) == *value {
                    kept.remove(key);
                }
            }
            Ok(())
        })
    }

    /// The tags of the account's resources that the request asks for (`DescribeTags`), by resource and key.
    ///
    /// # Errors
    ///
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_tags(&self, request: &DescribeTags) -> Result<Page<TagDescription>> {
        request.page.check(MIN_RESULTS, false)?;
        request.filters.iter().try_for_each(Condition::check::<TagDescription>)?;
        let after = request.page.after()?;
        let mut found = BTreeMap::new();
        for (id, tags) in self.inner.all_tags(*self.account())? {
            for (key, value) in tags.iter() {
                let tag = TagDescription {
                    resource_id: id,
                    resource_type: id.resource_type(),
                    key: key.to_owned(),
                    value: value.to_owned(),
                };
                found.insert(tag.place(), tag);
            }
        }
        let found = found
            .into_iter()
            .filter(|(place, tag)| {
                after.as_ref().is_none_or(|after| place > after)
                    && request.filters.iter().all(|filter| filter.holds(tag))
            })
            .map(|(_, tag)| tag);
        Ok(Page::collect(found, request.page.max_results(), TagDescription::place))
    }
}

impl TagDescription {
    /// Where it stands in the order of all.
    fn place(&self) -> String {
        format!("{} {}", self.resource_id, self.key)
    }
}

impl Filterable for TagDescription {
    const WHAT: &'static str = "tags";
    const NAMES: &'static [&'static str] = &["key", "resource-id", "resource-type", "value"];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "key" => vec![self.key.clone()],
            "resource-id" => vec![self.resource_id.to_string()],
            "resource-type" => vec![self.resource_type.to_string()],
            "value" => vec![self.value.clone()],
            _ => Vec::new(),
        }
    }
}

impl Inner {
    fn all_tags(&self, owner: AccountId) -> Result<Vec<(ResourceId, Tags)>> {
        let mut all = Vec::new();
        for ImageRecord { image, .. } in self.store.all()? {
            if *image.ami().owner() == owner {
                all.push((image.id().into(), image.tags().clone()));
            }
        }
        for description in self.directory.all(owner) {
            all.push((description.id.into(), description.tags.clone().try_into()?));
        }
        let snapshots = self.snapshots_of(owner)?.into_iter();
        all.extend(snapshots.map(|s| (s.id.into(), s.tags)));
        all.extend(self.templates(owner)?.into_iter().map(|r| (r.template.id.into(), r.template.tags)));
        let volumes = self.store.all::<VolumeRecord>()?.into_iter().filter(|v| v.owner == owner);
        all.extend(volumes.map(|v| (v.id.into(), v.tags)));
        Ok(all)
    }

    fn change_tags(
        &self,
        owner: AccountId,
        resources: &[ResourceId],
        empty: bool,
        change: impl Fn(&mut Tags) -> Result<()>,
    ) -> Result<()> {
        if empty || resources.is_empty() {
            let what = "there are no resources or no tags to change";
            return Err(Error::new(ErrorKind::MissingParameter, what));
        }
        let mut sorted = Sorted::default();
        resources.iter().try_for_each(|id| sorted.add(*id))?;
        // In the order of their ids, so that two calls do not wait for each other.
        let cells: Result<Vec<Arc<Cell>>> = sorted.instances.iter().map(|id| self.cell(owner, *id)).collect();
        let cells = cells?;
        let mut holds: Vec<Hold<'_>> =
            cells.iter().map(|cell| cell.hold(self.supervisor.reports())).collect();
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let _resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);

        let mut instances: Vec<InstanceRecord> = Vec::new();
        for hold in &holds {
            let mut record = hold.record.clone();
            check_alive(&record.description)?;
            let mut tags = record.description.tags.clone().try_into()?;
            change(&mut tags)?;
            record.description.metadata_options.check_tags(&tags)?;
            record.description_mut().tags = tags.into();
            instances.push(record);
        }
        let (mut images, mut snapshots, mut volumes) = (Vec::new(), Vec::new(), Vec::new());
        let mut templates: Vec<LaunchTemplateRecord> = Vec::new();
        for id in &sorted.images {
            let mut record = self.image(*id)?;
            record.image.authorize(&owner, Action::Change)?;
            change(record.image.tags_mut())?;
            images.push(record);
        }
        let mut unfinished = Vec::new();
        for id in &sorted.snapshots {
            if let Some(mut record) = self.unfinished_snapshot(owner, *id)? {
                change(&mut record.tags)?;
                unfinished.push(record);
                continue;
            }
            let mut record = self.snapshot(owner, *id)?;
            change(&mut record.tags)?;
            snapshots.push(record);
        }
        for id in &sorted.templates {
            let mut record = self.template(owner, &(*id).into())?;
            change(&mut record.template.tags)?;
            templates.push(record);
        }
        for id in &sorted.volumes {
            let mut record = self.volume(owner, *id)?;
            change(&mut record.tags)?;
            volumes.push(record);
        }
        self.store.commit(|c| {
            instances.iter().try_for_each(|record| c.put(record))?;
            images.iter().try_for_each(|record| c.put(record))?;
            snapshots.iter().try_for_each(|record| c.put(record))?;
            unfinished.iter().try_for_each(|record| c.put(record))?;
            templates.iter().try_for_each(|record| c.put(record))?;
            volumes.iter().try_for_each(|record| c.put(record))
        })?;
        for ((cell, hold), record) in cells.iter().zip(&mut holds).zip(instances) {
            self.publish(cell, hold, record);
        }
        Ok(())
    }
}

/// Resources by their kind, each once and in the order of their ids.
#[derive(Default)]
struct Sorted {
    images: BTreeSet<AmiId>,
    instances: BTreeSet<InstanceId>,
    snapshots: BTreeSet<SnapshotId>,
    templates: BTreeSet<LaunchTemplateId>,
    volumes: BTreeSet<VolumeId>,
}

impl Sorted {
    fn add(&mut self, id: ResourceId) -> Result<()> {
        match id {
            ResourceId::Image(id) => self.images.insert(id),
            ResourceId::Instance(id) => self.instances.insert(id),
            ResourceId::LaunchTemplate(id) => self.templates.insert(id),
            ResourceId::Snapshot(id) => self.snapshots.insert(id),
            ResourceId::Volume(id) => self.volumes.insert(id),
            _ => {
                let what = format!("{id} is no resource of a region");
                return Err(Error::new(ErrorKind::InvalidResourceId, what));
            }
        };
        Ok(())
    }
}

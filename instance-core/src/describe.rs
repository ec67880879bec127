//! What the requests to describe resources share: ids, filters, pages.

use std::fmt;
use std::str::FromStr;

use ami_core::{Filter, InstanceId, Page, PageRequest, Pattern, SnapshotId, VolumeId};

use crate::{Error, ErrorKind, Result};

/// The setters that every request has which has `filters` and a `page`.
macro_rules! filters_and_page {
    ($results:literal) => {
        /// Only those for which this holds too.
        pub fn filter<V: Into<String>>(
            mut self,
            name: impl Into<String>,
            values: impl IntoIterator<Item = V>,
        ) -> Self {
            self.filters.push(crate::describe::Condition::new(name, values));
            self
        }

        #[doc = concat!("At most so many, ", $results, ", and a token for the rest.")]
        pub fn max_results(mut self, max: usize) -> Self {
            self.page = self.page.with_max_results(max);
            self
        }

        /// Goes on where an earlier page ended.
        pub fn next_token(mut self, token: impl Into<String>) -> Self {
            self.page = self.page.with_next_token(token);
            self
        }
    };
}
pub(crate) use filters_and_page;

/// A request for resources of a kind: all, or those of some ids, for which every filter holds.
///
/// A filter has EC2's name and values with the wildcards `*` and `?`, as a [`Pattern`] has them; it holds if
/// one of its values does. Which names there are stands at each call that takes a request.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # use instance_core::{Region, testing::FakeHypervisor};
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use instance_core::Describe;
///
/// let mut request = Describe::new().filter("instance-state-name", ["running"]).max_results(100);
/// loop {
///     let page = region.describe_instances(&request)?;
///     for instance in &page.items {
///         println!("{} {}", instance.id, instance.instance_type);
///     }
///     match page.next_token {
///         Some(token) => request = request.next_token(token),
///         None => break,
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct Describe<Id> {
    pub(crate) ids: Vec<Id>,
    pub(crate) filters: Vec<Condition>,
    pub(crate) page: PageRequest,
}

/// A request for instances.
pub type DescribeInstances = Describe<InstanceId>;
/// A request for volumes.
pub type DescribeVolumes = Describe<VolumeId>;
/// A request for snapshots.
pub type DescribeSnapshots = Describe<SnapshotId>;

/// The fewest results of a page, but for images.
pub(crate) const MIN_RESULTS: usize = 5;

impl<Id> Default for Describe<Id> {
    fn default() -> Self {
        Self { ids: Vec::new(), filters: Vec::new(), page: PageRequest::new() }
    }
}

impl<Id: Copy + Ord + fmt::Display> Describe<Id> {
    /// All of them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only this one, or one of those that are named so.
    pub fn id(mut self, id: Id) -> Self {
        self.ids.push(id);
        self
    }

    filters_and_page!("5 to 1000, or of launch templates 1 to 200");

    pub(crate) fn check<T: Filterable>(&self) -> Result<()> {
        self.page.check(MIN_RESULTS, !self.ids.is_empty())?;
        self.filters.iter().try_for_each(Condition::check::<T>)
    }

    /// The page that is asked for of `all`, which are in the order of their ids: each that is named has to be there.
    pub(crate) fn answer<R, T: Filterable>(
        &self,
        all: Vec<R>,
        id_of: impl Fn(&R) -> Id,
        describe: impl Fn(R) -> Option<T>,
        not_found: impl Fn(Id) -> Error,
    ) -> Result<Page<T>>
    where
        Id: FromStr,
    {
        let after: Option<Id> = self.page.after_key()?;
        if let Some(missing) = self.ids.iter().find(|id| all.iter().all(|one| id_of(one) != **id)) {
            return Err(not_found(*missing));
        }
        let rest = all.into_iter().map(|one| (id_of(&one), one));
        let found = (rest.filter(|(id, _)| after.is_none_or(|after| *id > after)))
            .filter_map(|(id, one)| Some((id, describe(one)?)))
            .filter(|(id, item)| self.asks_for(*id, item));
        Ok(Page::collect(found, self.page.max_results(), |(id, _)| *id).map(|(_, item)| item))
    }

    pub(crate) fn asks_for<T: Filterable>(&self, id: Id, item: &T) -> bool {
        (self.ids.is_empty() || self.ids.contains(&id)) && self.filters.iter().all(|f| f.holds(item))
    }
}

/// A filter: a name, and the values of which one has to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) name: String,
    pub(crate) patterns: Vec<Pattern>,
}

/// What filters choose among.
pub(crate) trait Filterable {
    /// What it is called in an error.
    const WHAT: &'static str;
    /// The names of its filters, but for `tag:KEY`.
    const NAMES: &'static [&'static str];

    /// The values that it has for a filter: none, one or several.
    fn values(&self, name: &str) -> Vec<String>;
}

impl Condition {
    pub(crate) fn new<V: Into<String>>(name: impl Into<String>, values: impl IntoIterator<Item = V>) -> Self {
        let patterns = values.into_iter().take(Filter::MAX_VALUES + 1).map(Pattern::new).collect();
        Self { name: name.into(), patterns }
    }

    pub(crate) fn check<T: Filterable>(&self) -> Result<()> {
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidParameter, what));
        let is_tag = self.name.strip_prefix("tag:").is_some_and(|key| !key.is_empty());
        if !is_tag && !T::NAMES.contains(&&*self.name) {
            return invalid(format!("{:?} is no name of a filter for {}", self.name, T::WHAT));
        }
        let (values, most) = (self.patterns.len(), Filter::MAX_VALUES);
        let what = format!("the filter {:?} must have 1 to {most} values", self.name);
        match values {
            0 => invalid(what),
            n if n > most => Err(Error::new(ErrorKind::FilterLimitExceeded, what)),
            _ => Ok(()),
        }
    }

    pub(crate) fn holds<T: Filterable>(&self, item: &T) -> bool {
        item.values(&self.name).iter().any(|value| self.patterns.iter().any(|p| p.matches(value)))
    }
}

/// The values of the filters `tag-key` and `tag:KEY`; `None` for another filter.
pub(crate) fn tag_values<'a>(
    name: &str,
    tags: impl Iterator<Item = (&'a str, &'a str)>,
) -> Option<Vec<String>> {
    match name.strip_prefix("tag:") {
        Some(key) => Some(tags.filter(|(k, _)| *k == key).map(|(_, value)| value.to_owned()).collect()),
        None if name == "tag-key" => Some(tags.map(|(key, _)| key.to_owned()).collect()),
        None => None,
    }
}

//! How launch templates and their versions are described.

use ami_core::{LaunchTemplateId, Page, PageRequest};

use super::version::VersionRecord;
use super::{LaunchTemplate, LaunchTemplateRef, LaunchTemplateVersion, TemplateVersion};
use crate::describe::{Condition, Describe, Filterable, filters_and_page, tag_values};
use crate::region::Region;
use crate::{Error, ErrorKind, Result};

/// A request for launch templates.
pub type DescribeLaunchTemplates = Describe<LaunchTemplateId>;

/// A request for versions of a launch template, or for one version of all.
///
/// ```
/// # use instance_core::{LaunchSpec, Region, testing::FakeHypervisor};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use instance_core::{DescribeLaunchTemplateVersions, TemplateVersion};
///
/// let template = region.create_launch_template("web", LaunchSpec::new("t2.nano".parse()?))?;
/// region.create_launch_template_version("web", LaunchSpec::new("t3.nano".parse()?))?;
/// let of_web = DescribeLaunchTemplateVersions::of(template.id).min_version(2);
/// assert_eq!(region.describe_launch_template_versions(&of_web)?.items[0].version, 2);
/// let defaults = DescribeLaunchTemplateVersions::of_all(TemplateVersion::Default);
/// assert!(region.describe_launch_template_versions(&defaults)?.items[0].is_default);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a request does nothing by itself"]
pub struct DescribeLaunchTemplateVersions {
    template: Option<LaunchTemplateRef>,
    versions: Vec<TemplateVersion>,
    range: (u64, u64),
    filters: Vec<Condition>,
    page: PageRequest,
}

impl DescribeLaunchTemplateVersions {
    /// The versions of one template: all, unless some are [named](Self::version).
    pub fn of(template: impl Into<LaunchTemplateRef>) -> Self {
        Self { template: Some(template.into()), ..Self::of_none() }
    }

    /// The latest or the default version of every template.
    pub fn of_all(version: TemplateVersion) -> Self {
        Self { versions: vec![version], ..Self::of_none() }
    }

    fn of_none() -> Self {
        let (versions, filters) = Default::default();
        Self { template: None, versions, range: (1, u64::MAX), filters, page: PageRequest::new() }
    }

    /// Only this version, or one of those that are named so.
    pub fn version(mut self, version: impl Into<TemplateVersion>) -> Self {
        self.versions.push(version.into());
        self
    }

    /// Only versions from this number on.
    pub fn min_version(mut self, number: u64) -> Self {
        self.range.0 = number;
        self
    }

    /// Only versions up to this number.
    pub fn max_version(mut self, number: u64) -> Self {
        self.range.1 = number;
        self
    }

    filters_and_page!("1 to 200");

    fn check(&self) -> Result<()> {
        check_page(&self.page, false)?;
        self.filters.iter().try_for_each(Condition::check::<LaunchTemplateVersion>)?;
        let is_number = |version: &TemplateVersion| matches!(version, TemplateVersion::Number(_));
        if self.template.is_none() && (self.versions.is_empty() || self.versions.iter().any(is_number)) {
            let what = "of all launch templates only $Latest and $Default can be asked for";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        if self.range != (1, u64::MAX) && !self.versions.is_empty() {
            let what = "versions are asked for by name or by their least and greatest number";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        Ok(())
    }
}

/// Of templates a page has 1 to 200 (API reference).
fn check_page(page: &PageRequest, ids: bool) -> Result<()> {
    const MOST: usize = 200;
    match page.max_results() {
        Some(max) if max > MOST => {
            let what = format!("{max} results cannot be asked for; use 1 to {MOST}");
            Err(Error::new(ErrorKind::InvalidParameter, what))
        }
        _ => Ok(page.check(1, ids)?),
    }
}

impl<H> Region<H> {
    /// The account's launch templates that the request asks for (`DescribeLaunchTemplates`).
    ///
    /// Filters: `create-time`, `launch-template-name`, `tag:KEY`, `tag-key`.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound) for an id that is not there,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_launch_templates(
        &self,
        request: &DescribeLaunchTemplates,
    ) -> Result<Page<LaunchTemplate>> {
        check_page(&request.page, !request.ids.is_empty())?;
        request.filters.iter().try_for_each(Condition::check::<LaunchTemplate>)?;
        let records = self.inner.templates(*self.account())?;
        let not_found = |id| LaunchTemplateRef::Id(id).not_found();
        request.answer(records, |record| record.template.id, |record| Some(record.template), not_found)
    }

    /// The versions that the request asks for, of one launch template of the account's or one of each, by template and
    /// number (`DescribeLaunchTemplateVersions`).
    ///
    /// Filters: `create-time`, `image-id`, `instance-type`, `is-default-version`.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`LaunchTemplateVersionNotFound`](ErrorKind::LaunchTemplateVersionNotFound),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_launch_template_versions(
        &self,
        request: &DescribeLaunchTemplateVersions,
    ) -> Result<Page<LaunchTemplateVersion>> {
        request.check()?;
        let after = request.page.after()?;
        let (inner, owner) = (&self.inner, *self.account());
        let templates = match &request.template {
            Some(named) => vec![inner.template(owner, named)?],
            None => inner.templates(owner)?,
        };
        let mut found = Vec::new();
        for record in &templates {
            let mut versions: Vec<VersionRecord> = match request.versions.is_empty() {
                true => inner.template_versions(record)?,
                false => {
                    let named = request.versions.iter().map(|v| inner.template_version(record, *v));
                    named.collect::<Result<_>>()?
                }
            };
            versions.sort_by_key(|version| version.version);
            versions.dedup_by_key(|version| version.version);
            versions.retain(|version| (request.range.0..=request.range.1).contains(&version.version));
            found.extend(
                versions.into_iter().map(|version| LaunchTemplateVersion::of(&record.template, version)),
            );
        }
        let found = found.into_iter().filter(|version| {
            after.as_ref().is_none_or(|after| place(version) > *after)
                && request.filters.iter().all(|filter| filter.holds(version))
        });
        Ok(Page::collect(found, request.page.max_results(), place))
    }
}

/// Where a version stands in the order of all.
fn place(version: &LaunchTemplateVersion) -> String {
    format!("{} {:020}", version.template_id, version.version)
}

impl Filterable for LaunchTemplate {
    const WHAT: &'static str = "launch templates";
    const NAMES: &'static [&'static str] = &["create-time", "launch-template-name", "tag-key"];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "create-time" => vec![self.create_time.to_string()],
            "launch-template-name" => vec![self.name.clone()],
            name => tag_values(name, self.tags.iter()).unwrap_or_default(),
        }
    }
}

impl Filterable for LaunchTemplateVersion {
    const WHAT: &'static str = "versions of launch templates";
    const NAMES: &'static [&'static str] =
        &["create-time", "image-id", "instance-type", "is-default-version"];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "create-time" => vec![self.create_time.to_string()],
            "image-id" => self.data.image_id.iter().map(ToString::to_string).collect(),
            "instance-type" => self.data.instance_type.iter().map(ToString::to_string).collect(),
            "is-default-version" => vec![self.is_default.to_string()],
            _ => Vec::new(),
        }
    }
}

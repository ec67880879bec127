//! EC2's calls on launch templates.

use std::sync::PoisonError;
use std::time::Instant;

use ami_core::{AccountId, LaunchTemplateId, Tags, Timestamp};

use super::version::VersionRecord;
use super::{
    LaunchTemplate, LaunchTemplateRecord, LaunchTemplateRef, LaunchTemplateVersion,
    LaunchTemplateVersionSpec, TemplateVersion, check_name,
};
use crate::launch::{Launch, digest_of};
use crate::record::LaunchedFrom;
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, LaunchSpec, Reservation, Result};

impl<H> Region<H> {
    /// Makes a launch template of the account's, with its first version (`CreateLaunchTemplate`).
    ///
    /// What it says is looked at when it is launched: only a text, a tag or a size that no launch could have is refused
    /// here.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNameDuplicate`](ErrorKind::LaunchTemplateNameDuplicate),
    /// [`MalformedLaunchTemplateName`](ErrorKind::MalformedLaunchTemplateName),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a description or a parameter that cannot be,
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for a count, a client token, a dry run or
    /// a source version, [`MaxTemplateLimitExceeded`](ErrorKind::MaxTemplateLimitExceeded), or what the host met.
    pub fn create_launch_template(
        &self,
        name: &str,
        first: impl Into<LaunchTemplateVersionSpec>,
    ) -> Result<LaunchTemplate> {
        check_name(name)?;
        let (inner, owner, first) = (&self.inner, *self.account(), first.into());
        if first.source.is_some() {
            let what = "a new launch template has no version that its first one could be made of";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        let _resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let templates = inner.templates(owner)?;
        if let Some(holder) = templates.iter().find(|record| record.template.name == name) {
            let what = format!("the name {name:?} is that of the launch template {}", holder.template.id);
            return Err(Error::new(ErrorKind::LaunchTemplateNameDuplicate, what));
        }
        if templates.len() >= LaunchTemplate::MAX {
            let what = format!("the account has {} launch templates, the most that can be", templates.len());
            return Err(Error::new(ErrorKind::MaxTemplateLimitExceeded, what));
        }
        let id = LaunchTemplateId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let version = first.into_record(id, 1)?;
        let template = LaunchTemplate {
            id,
            owner,
            name: name.to_owned(),
            create_time: version.create_time,
            default_version: 1,
            latest_version: 1,
            tags: Tags::new(),
        };
        let record = LaunchTemplateRecord { template, versions_made: 1 };
        inner.store.commit(|c| {
            c.put(&version)?;
            c.put(&record)
        })?;
        Ok(record.template)
    }

    /// Makes another version of a launch template of the account's (`CreateLaunchTemplateVersion`).
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`LaunchTemplateVersionNotFound`](ErrorKind::LaunchTemplateVersionNotFound) for its source,
    /// [`MaxTemplateVersionLimitExceeded`](ErrorKind::MaxTemplateVersionLimitExceeded), and otherwise as
    /// [`create_launch_template`](Self::create_launch_template).
    pub fn create_launch_template_version(
        &self,
        template: impl Into<LaunchTemplateRef>,
        version: impl Into<LaunchTemplateVersionSpec>,
    ) -> Result<LaunchTemplateVersion> {
        let (inner, mut spec) = (&self.inner, version.into());
        let _resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = inner.template(*self.account(), &template.into())?;
        let kept = inner.template_versions(&record)?.len();
        if kept >= LaunchTemplate::MAX_VERSIONS {
            let what = format!("{} has {kept} versions, the most that can be", record.template.id);
            return Err(Error::new(ErrorKind::MaxTemplateVersionLimitExceeded, what));
        }
        if let Some(source) = spec.source {
            spec.data = spec.data.or(inner.template_version(&record, source)?.data);
        }
        record.versions_made += 1;
        record.template.latest_version = record.versions_made;
        let version = spec.into_record(record.template.id, record.versions_made)?;
        inner.store.commit(|c| {
            c.put(&version)?;
            c.put(&record)
        })?;
        Ok(LaunchTemplateVersion::of(&record.template, version))
    }

    /// Says which version of a launch template a launch takes that does not name one (`ModifyLaunchTemplate`).
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`LaunchTemplateVersionNotFound`](ErrorKind::LaunchTemplateVersionNotFound), or what the host met.
    pub fn modify_launch_template(
        &self,
        template: impl Into<LaunchTemplateRef>,
        default_version: impl Into<TemplateVersion>,
    ) -> Result<LaunchTemplate> {
        let inner = &self.inner;
        let _resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = inner.template(*self.account(), &template.into())?;
        record.template.default_version = inner.template_version(&record, default_version.into())?.version;
        inner.store.commit(|c| c.put(&record))?;
        Ok(record.template)
    }

    /// Deletes a launch template of the account's with all its versions, and gives what it was
    /// (`DeleteLaunchTemplate`). What was launched from it stays.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound), or what the host met.
    pub fn delete_launch_template(&self, template: impl Into<LaunchTemplateRef>) -> Result<LaunchTemplate> {
        let inner = &self.inner;
        let _resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let record = inner.template(*self.account(), &template.into())?;
        let id = record.template.id;
        inner.store.commit(|c| {
            (1..=record.versions_made).for_each(|n| c.remove::<VersionRecord>(VersionRecord::key_of(id, n)));
            c.remove::<LaunchTemplateRecord>(id);
            Ok(())
        })?;
        Ok(record.template)
    }

    /// Deletes versions of a launch template, up to 200, and says of each what came of it
    /// (`DeleteLaunchTemplateVersions`): the default version is not deleted, and one that does not exist is an error of
    /// its own. Their numbers are not given out again.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`MissingParameter`](ErrorKind::MissingParameter) for none,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for more, or what the host met, after which all are there.
    pub fn delete_launch_template_versions(
        &self,
        template: impl Into<LaunchTemplateRef>,
        versions: &[u64],
    ) -> Result<Vec<(u64, Result<()>)>> {
        const MOST: usize = 200;
        let inner = &self.inner;
        match versions.len() {
            0 => return Err(Error::new(ErrorKind::MissingParameter, "there are no versions to delete")),
            1..=MOST => {}
            more => {
                let what = format!("{more} versions cannot be deleted at once; use {MOST} at most");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
        }
        let _resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = inner.template(*self.account(), &template.into())?;
        let id = record.template.id;
        let mut left = inner.template_versions(&record)?;
        let outcome = versions.iter().map(|number| {
            let one = match left.iter().position(|kept| kept.version == *number) {
                None => Err(version_not_found(id, TemplateVersion::Number(*number))),
                Some(_) if *number == record.template.default_version => {
                    let what = format!(
                        "version {number} is the default one of {id}; make another the default first"
                    );
                    Err(Error::new(ErrorKind::OperationNotPermitted, what))
                }
                Some(place) => {
                    left.remove(place);
                    Ok(())
                }
            };
            (*number, one)
        });
        let outcome: Vec<(u64, Result<()>)> = outcome.collect();
        // The default version is always among them.
        record.template.latest_version = left.iter().map(|v| v.version).max().unwrap_or(1);
        inner.store.commit(|c| {
            let gone = outcome.iter().filter(|(_, done)| done.is_ok());
            gone.for_each(|(number, _)| c.remove::<VersionRecord>(VersionRecord::key_of(id, *number)));
            c.put(&record)
        })?;
        Ok(outcome)
    }

    /// The account's launch template of this id or name.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound), or what reading the state store met.
    pub fn launch_template(&self, template: impl Into<LaunchTemplateRef>) -> Result<LaunchTemplate> {
        Ok(self.inner.template(*self.account(), &template.into())?.template)
    }

    /// Launches what a version of a launch template says (`RunInstances`). A parameter that is given in `overrides`
    /// takes the place of the template's, as a whole.
    ///
    /// A client token makes the launch happen once for the same template, version as it is named, and overrides: also
    /// where `$Latest` is another version by then, or the template is gone.
    ///
    /// # Errors
    ///
    /// [`LaunchTemplateNotFound`](ErrorKind::LaunchTemplateNotFound),
    /// [`LaunchTemplateVersionNotFound`](ErrorKind::LaunchTemplateVersionNotFound),
    /// [`MissingParameter`](ErrorKind::MissingParameter) if neither says which image or which instance type, and
    /// otherwise as [`run_instances`](Self::run_instances).
    pub fn launch_from_template(
        &self,
        template: impl Into<LaunchTemplateRef>,
        version: impl Into<TemplateVersion>,
        overrides: LaunchSpec,
    ) -> Result<Reservation> {
        let (inner, owner, version) = (&self.inner, *self.account(), version.into());
        let token = overrides.client_token.clone().filter(|_| !overrides.dry_run);
        LaunchSpec::check_token(token.as_deref())?;
        // With the last instance of a launch its token is free, and names no template.
        inner.forget_terminated(Instant::now());
        let from = inner.launched_from(owner, &template.into(), token.as_deref())?;
        let asked = digest_of(&(from.id, version.to_string(), overrides.count, &overrides))?;
        // What has happened with the same token is not looked up again: it need not be there any more.
        let run = || {
            let record = inner.template(owner, &from.id.into())?;
            let data = inner.template_version(&record, version)?.data;
            inner.run(owner, &Launch::by_template(overrides.or(data), asked, from.clone())?)
        };
        let cells = match token {
            Some(token) => inner.run_once(owner, &token, asked, Some(from.clone()), run),
            None => run(),
        };
        self.reservation(cells?)
    }
}

impl LaunchTemplateVersionSpec {
    fn into_record(self, template_id: LaunchTemplateId, version: u64) -> Result<VersionRecord> {
        let Self { data, description, .. } = self;
        if description.chars().count() > Self::MAX_DESCRIPTION {
            let what =
                format!("the description of a version has at most {} characters", Self::MAX_DESCRIPTION);
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        if data.count.is_some() || data.client_token.is_some() || data.dry_run {
            let what = "a count, a client token and a dry run are a launch's, and not a launch template's";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        data.check_texts()?;
        Ok(VersionRecord { template_id, version, description, create_time: Timestamp::now(), data })
    }
}

impl LaunchTemplateVersion {
    pub(super) fn of(template: &LaunchTemplate, record: VersionRecord) -> Self {
        Self {
            template_id: template.id,
            template_name: template.name.clone(),
            version: record.version,
            is_default: record.version == template.default_version,
            description: record.description,
            create_time: record.create_time,
            data: record.data,
        }
    }
}

impl Inner {
    /// The templates of an account, in the order of their ids.
    pub(crate) fn templates(&self, owner: AccountId) -> Result<Vec<LaunchTemplateRecord>> {
        let mut all = self.store.all::<LaunchTemplateRecord>()?;
        all.retain(|record| record.template.owner == owner);
        Ok(all)
    }

    pub(crate) fn template(
        &self,
        owner: AccountId,
        named: &LaunchTemplateRef,
    ) -> Result<LaunchTemplateRecord> {
        let found = match named {
            LaunchTemplateRef::Id(id) => self.store.get::<LaunchTemplateRecord>(&id.to_string())?,
            LaunchTemplateRef::Name(_) => self.templates(owner)?.into_iter().find(|r| named.is(&r.template)),
        };
        found.filter(|record| record.template.owner == owner).ok_or_else(|| named.not_found())
    }

    /// The template that a launch is by: the one that a launch with this token was by, if it is named so, and otherwise the one
    /// that is there.
    fn launched_from(
        &self,
        owner: AccountId,
        named: &LaunchTemplateRef,
        token: Option<&str>,
    ) -> Result<LaunchedFrom> {
        let known = token.and_then(|token| self.tokens.template(owner, token));
        let is = |from: &LaunchedFrom| match named {
            LaunchTemplateRef::Id(id) => from.id == *id,
            LaunchTemplateRef::Name(name) => from.name == *name,
        };
        if let Some(from) = known.filter(is) {
            return Ok(from);
        }
        match (self.template(owner, named), named) {
            (Ok(LaunchTemplateRecord { template: LaunchTemplate { id, name, .. }, .. }), _) => {
                Ok(LaunchedFrom { id, name })
            }
            // Earlier versions have not kept by which template a launch was. If there was none, the launch finds that out.
            (Err(e), LaunchTemplateRef::Id(id)) if e.kind() == ErrorKind::LaunchTemplateNotFound => {
                Ok(LaunchedFrom { id: *id, name: String::new() })
            }
            (Err(e), _) => Err(e),
        }
    }

    /// A version of a template; the caller has the template's record of this moment.
    pub(super) fn template_version(
        &self,
        record: &LaunchTemplateRecord,
        version: TemplateVersion,
    ) -> Result<VersionRecord> {
        let LaunchTemplate { id, default_version, latest_version, .. } = record.template;
        let number = match version {
            TemplateVersion::Number(number) => number,
            TemplateVersion::Latest => latest_version,
            TemplateVersion::Default => default_version,
        };
        let found = self.store.get(&VersionRecord::key_of(id, number))?;
        found.ok_or_else(|| version_not_found(id, version))
    }

    /// All versions of a template, by their numbers.
    pub(super) fn template_versions(&self, record: &LaunchTemplateRecord) -> Result<Vec<VersionRecord>> {
        let id = record.template.id;
        let numbers = 1..=record.versions_made;
        numbers.filter_map(|n| self.store.get(&VersionRecord::key_of(id, n)).transpose()).collect()
    }
}

fn version_not_found(id: LaunchTemplateId, version: TemplateVersion) -> Error {
    let what = format!("the launch template {id} has no version {version}");
    Error::new(ErrorKind::LaunchTemplateVersionNotFound, what)
}

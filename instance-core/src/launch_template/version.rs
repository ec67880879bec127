//! The versions of a launch template, which never change.

use std::fmt;
use std::str::FromStr;

use ami_core::{LaunchTemplateId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::store::Record;
use crate::{Error, ErrorKind, LaunchSpec};

/// Which version of a launch template.
///
/// ```
/// use instance_core::TemplateVersion;
///
/// for (text, version) in [
///     ("3", TemplateVersion::Number(3)),
///     ("$Latest", TemplateVersion::Latest),
///     ("$Default", TemplateVersion::Default),
/// ] {
///     assert_eq!((text.parse::<TemplateVersion>()?, &*version.to_string()), (version, text));
/// }
/// assert!("0".parse::<TemplateVersion>().is_err() && "latest".parse::<TemplateVersion>().is_err());
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TemplateVersion {
    /// The one of this number.
    Number(u64),
    /// The one with the highest number: `$Latest`.
    Latest,
    /// The template's default one: `$Default`.
    #[default]
    Default,
}

impl From<u64> for TemplateVersion {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl fmt::Display for TemplateVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Latest => f.pad("$Latest"),
            Self::Default => f.pad("$Default"),
        }
    }
}

impl FromStr for TemplateVersion {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "$Latest" => Ok(Self::Latest),
            "$Default" => Ok(Self::Default),
            number => match number.parse() {
                Ok(number) if number > 0 => Ok(Self::Number(number)),
                _ => {
                    let short: String = text.chars().take(80).collect();
                    let what = format!(
                        "{short:?} is no version of a launch template: a number, $Latest or $Default"
                    );
                    Err(Error::new(ErrorKind::InvalidParameter, what))
                }
            },
        }
    }
}

/// A version of a launch template (`DescribeLaunchTemplateVersions`); [`LaunchTemplate`](crate::LaunchTemplate) shows
/// it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchTemplateVersion {
    /// The template.
    pub template_id: LaunchTemplateId,
    /// Its name.
    pub template_name: String,
    /// The number of the version, from 1.
    pub version: u64,
    /// Whether it is the template's default one.
    pub is_default: bool,
    /// What its maker says of it.
    pub description: String,
    /// When it was made.
    pub create_time: Timestamp,
    /// What is launched with it.
    pub data: LaunchSpec,
}

/// What to make a version with. [`LaunchTemplate`](crate::LaunchTemplate) shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a specification makes nothing by itself"]
pub struct LaunchTemplateVersionSpec {
    pub(super) data: LaunchSpec,
    pub(super) description: String,
    pub(super) source: Option<TemplateVersion>,
}

impl LaunchTemplateVersionSpec {
    /// The most characters of a description.
    pub const MAX_DESCRIPTION: usize = 255;

    /// These parameters, which need not be all that a launch needs.
    pub fn new(data: LaunchSpec) -> Self {
        Self { data, description: String::new(), source: None }
    }

    /// What is to be known of the version.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Every parameter that is not given is that of this version. A parameter is taken as a whole: tags and block
    /// devices that are given are all that there are.
    pub fn source(mut self, version: TemplateVersion) -> Self {
        self.source = Some(version);
        self
    }
}

impl From<LaunchSpec> for LaunchTemplateVersionSpec {
    fn from(data: LaunchSpec) -> Self {
        Self::new(data)
    }
}

/// A version as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VersionRecord {
    pub(crate) template_id: LaunchTemplateId,
    pub(crate) version: u64,
    pub(crate) description: String,
    pub(crate) create_time: Timestamp,
    pub(crate) data: LaunchSpec,
}

impl VersionRecord {
    pub(super) fn key_of(template: LaunchTemplateId, version: u64) -> String {
        format!("{template}/{version}")
    }
}

impl Record for VersionRecord {
    const TABLE: &'static str = "launch-template-versions";

    fn key(&self) -> String {
        Self::key_of(self.template_id, self.version)
    }
}

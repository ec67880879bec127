//! Launch templates: parameters of launches under a name, in numbered versions.

mod calls;
mod describe;
#[cfg(test)]
mod tests;
mod version;

use std::fmt;

use ami_core::{AccountId, LaunchTemplateId, Tags, Timestamp};
use serde::{Deserialize, Serialize};

pub use self::describe::{DescribeLaunchTemplateVersions, DescribeLaunchTemplates};
pub use self::version::{LaunchTemplateVersion, LaunchTemplateVersionSpec, TemplateVersion};
use crate::store::Record;
use crate::{Error, ErrorKind, Result};

/// What is known of a launch template (`DescribeLaunchTemplates`).
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// use instance_core::{LaunchSpec, LaunchTemplateVersionSpec, TemplateVersion};
///
/// let first = LaunchSpec::new("t2.nano".parse()?).image_id(ami.id()).tag("Name", "web");
/// let template = region.create_launch_template("web-servers", first)?;
/// let larger = LaunchTemplateVersionSpec::new(LaunchSpec::new("t2.micro".parse()?)).source(TemplateVersion::Latest);
/// assert_eq!(region.create_launch_template_version(template.id, larger)?.version, 2);
///
/// // The default version, with a key besides.
/// let with_key = LaunchSpec::default().key_name("laptop");
/// let small = region.launch_from_template("web-servers", TemplateVersion::Default, with_key)?.instances;
/// assert_eq!(small[0].describe().instance_type.name(), "t2.nano");
/// let large = region.launch_from_template(template.id, TemplateVersion::Latest, LaunchSpec::default())?.instances;
/// assert_eq!((large[0].describe().instance_type.name(), &*large[0].describe().tags["Name"]), ("t2.micro", "web"));
///
/// assert_eq!(region.modify_launch_template("web-servers", 2)?.default_version, 2);
/// region.delete_launch_template(template.id)?; // the instances stay
/// assert!(region.launch_template("web-servers").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LaunchTemplate {
    /// Its id.
    pub id: LaunchTemplateId,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// Its name, which no other of the account's has.
    pub name: String,
    /// When it was made.
    pub create_time: Timestamp,
    /// The version that a launch takes which does not name one.
    pub default_version: u64,
    /// The highest number of a version.
    pub latest_version: u64,
    /// Its tags.
    pub tags: Tags,
}

impl LaunchTemplate {
    /// How many characters its name has.
    pub const NAME_LENGTH: std::ops::RangeInclusive<usize> = 3..=128;
    /// The most templates that an account has.
    pub const MAX: usize = 5000;
    /// The most versions that a template has.
    pub const MAX_VERSIONS: usize = 10_000;
}

/// Which launch template: by its id or by its name.
///
/// ```
/// use instance_core::LaunchTemplateRef;
///
/// let by_name: LaunchTemplateRef = "web-servers".into();
/// let by_id: LaunchTemplateRef = "lt-0123456789abcdef0".parse::<ami_core::LaunchTemplateId>()?.into();
/// assert_eq!(by_name, LaunchTemplateRef::Name("web-servers".to_owned()));
/// assert_eq!(by_id.to_string(), "lt-0123456789abcdef0");
/// # Ok::<(), ami_core::MalformedId>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LaunchTemplateRef {
    /// The one with this id.
    Id(LaunchTemplateId),
    /// The account's one of this name.
    Name(String),
}

impl From<LaunchTemplateId> for LaunchTemplateRef {
    fn from(id: LaunchTemplateId) -> Self {
        Self::Id(id)
    }
}

impl From<&str> for LaunchTemplateRef {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl fmt::Display for LaunchTemplateRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl LaunchTemplateRef {
    fn is(&self, template: &LaunchTemplate) -> bool {
        match self {
            Self::Id(id) => template.id == *id,
            Self::Name(name) => template.name == *name,
        }
    }

    fn not_found(&self) -> Error {
        let code = match self {
            Self::Id(_) => "InvalidLaunchTemplateId.NotFound",
            Self::Name(_) => "InvalidLaunchTemplateName.NotFoundException",
        };
        let what = format!("the launch template {self} does not exist");
        Error::new(ErrorKind::LaunchTemplateNotFound, what).with_code(code)
    }
}

/// A template as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LaunchTemplateRecord {
    #[serde(flatten)]
    pub(crate) template: LaunchTemplate,
    /// The number of the last version that was made: those of versions that are gone do not come again.
    pub(crate) versions_made: u64,
}

impl Record for LaunchTemplateRecord {
    const TABLE: &'static str = "launch-templates";

    fn key(&self) -> String {
        self.template.id.to_string()
    }
}

/// Letters, digits and `( ) . - / _` (API reference, `CreateLaunchTemplate`).
fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "().-/_".contains(c);
    if LaunchTemplate::NAME_LENGTH.contains(&name.chars().count()) && name.chars().all(allowed) {
        return Ok(());
    }
    let short: String = name.chars().take(80).collect();
    let what = format!("{short:?} is no name of a launch template: 3 to 128 letters, digits and ( ) . - / _");
    Err(Error::new(ErrorKind::MalformedLaunchTemplateName, what))
}

//! Where an image is, and whose it is.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, invalid_value, quote, text_type};

/// The name of a region, such as `us-east-1` or `local`: 1 to 64 lower-case letters, digits and
/// dashes. Cheap to clone.
///
/// ```
/// use ami_core::RegionName;
///
/// let region: RegionName = "us-east-1".parse()?;
/// assert_eq!(region.as_str(), "us-east-1");
/// assert!("US East".parse::<RegionName>().is_err());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct RegionName(Arc<str>);

impl RegionName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

text_type!(RegionName);

impl FromStr for RegionName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if text.is_empty() || text.len() > 64 || !text.bytes().all(allowed) {
            let text = quote(text);
            return Err(invalid_value(format!(
                "{text} is no region name; use 1 to 64 lower-case letters, digits and dashes"
            )));
        }
        Ok(Self(text.into()))
    }
}

/// The number of an account: 12 decimal digits.
///
/// ```
/// use ami_core::AccountId;
///
/// let account: AccountId = "000123456789".parse()?;
/// assert_eq!(account.to_string(), "000123456789");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct AccountId(u64);

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:012}", self.0))
    }
}

impl fmt::Debug for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for AccountId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let digits = text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| digits).map(Self).ok_or_else(|| {
            let message = format!("{} is no account id; use 12 digits", quote(text));
            Error::new(ErrorKind::MalformedAccount, message)
        })
    }
}

impl TryFrom<String> for AccountId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<AccountId> for String {
    fn from(account: AccountId) -> String {
        account.to_string()
    }
}

//! Tags: up to 50 keys with values.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, invalid_value, quote};

/// The tags of a resource, within EC2's limits: 50 tags, keys of 1 to 128 characters that do not begin
/// with `aws:`, values of at most 256 characters.
///
/// ```
/// use ami_core::{ErrorKind, Tags};
///
/// let mut tags = Tags::new();
/// tags.insert("stage", "production")?;
/// assert_eq!(tags.get("stage"), Some("production"));
/// assert_eq!(tags.iter().collect::<Vec<_>>(), [("stage", "production")]);
/// assert_eq!(tags.remove("stage").as_deref(), Some("production"));
/// assert!(tags.is_empty() && tags.len() < Tags::MAX);
/// assert_eq!(tags.insert("aws:owner", "me").unwrap_err().kind(), ErrorKind::MalformedTagKey);
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Tags(BTreeMap<String, String>);

impl Tags {
    /// The most tags that a resource has.
    pub const MAX: usize = 50;

    /// No tags.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a tag, and gives the value that it had before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::MalformedTagKey`], [`ErrorKind::InvalidParameterValue`] for the value, and
    /// [`ErrorKind::TagLimitExceeded`].
    pub fn insert(
        &mut self,
        key: impl Into<String>,
        value: impl Into<String>,
    ) -> Result<Option<String>, Error> {
        let (key, value) = (key.into(), value.into());
        check_key(&key)?;
        if value.chars().count() > 256 {
            let message = format!("the value of the tag {} has more than 256 characters", quote(&key));
            return Err(invalid_value(message));
        }
        if self.0.len() == Self::MAX && !self.0.contains_key(&key) {
            let message = format!("there are {} tags, the most that can be", Self::MAX);
            return Err(Error::new(ErrorKind::TagLimitExceeded, message));
        }
        Ok(self.0.insert(key, value))
    }

    /// Removes a tag, and gives the value that it had.
    pub fn remove(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// The value of a tag.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// The tags, sorted by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The number of tags.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn check_key(key: &str) -> Result<(), Error> {
    let malformed = |problem| {
        let message = format!("the tag key {} {problem}", quote(key));
        Err(Error::new(ErrorKind::MalformedTagKey, message))
    };
    if !(1..=128).contains(&key.chars().count()) {
        return malformed("must be 1 to 128 characters long");
    }
    if key.as_bytes().get(..4).is_some_and(|prefix| prefix.eq_ignore_ascii_case(b"aws:")) {
        return malformed("begins with aws:, which is reserved");
    }
    Ok(())
}

impl TryFrom<BTreeMap<String, String>> for Tags {
    type Error = Error;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut tags = Self::new();
        for (key, value) in map {
            tags.insert(key, value)?;
        }
        Ok(tags)
    }
}

impl From<Tags> for BTreeMap<String, String> {
    fn from(tags: Tags) -> Self {
        tags.0
    }
}

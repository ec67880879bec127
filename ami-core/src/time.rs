//! Points in time, as EC2 writes them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Error, invalid_value, quote};

/// A point in time from 1970 to the end of 9999, to the millisecond, in UTC.
///
/// ```
/// use ami_core::Timestamp;
///
/// let created: Timestamp = "2026-01-31T12:00:00.250Z".parse()?;
/// assert_eq!(created.as_unix_millis(), 1_769_860_800_250);
/// assert_eq!(created.to_string(), "2026-01-31T12:00:00.250Z");
/// assert_eq!(Timestamp::from_unix_millis(1_769_860_800_250), Some(created));
/// assert!((Timestamp::MIN..=Timestamp::MAX).contains(&Timestamp::now()));
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Timestamp(u64);

impl Timestamp {
    /// The first point in time: the start of 1970.
    pub const MIN: Self = Self(0);

    /// The last point in time: the last millisecond of 9999, beyond which the text has no room.
    pub const MAX: Self = Self(253_402_300_799_999);

    /// This moment, by the system's clock. A clock outside the range gives the nearest end of it.
    pub fn now() -> Self {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        Self(millis).min(Self::MAX)
    }

    /// The point in time so many milliseconds after the start of 1970, or `None` after 9999.
    pub fn from_unix_millis(millis: u64) -> Option<Self> {
        (millis <= Self::MAX.0).then_some(Self(millis))
    }

    /// Milliseconds since the start of 1970.
    pub const fn as_unix_millis(self) -> u64 {
        self.0
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        SystemTime::UNIX_EPOCH + Duration::from_millis(time.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&humantime::format_rfc3339_millis((*self).into()), f)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let millis = humantime::parse_rfc3339(text)
            .ok()
            .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
            .and_then(|time| u64::try_from(time.as_millis()).ok());
        millis.and_then(Self::from_unix_millis).ok_or_else(|| {
            let text = quote(text);
            invalid_value(format!("{text} is no time of the form 2026-01-31T12:00:00.000Z"))
        })
    }
}

impl TryFrom<String> for Timestamp {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Timestamp> for String {
    fn from(time: Timestamp) -> String {
        time.to_string()
    }
}

//! Content digests: SHA-256 under the name `sha256:` and 64 hexadecimal digits.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::quote;

/// The SHA-256 digest of some content, and so the name of that content.
///
/// ```
/// use ami_core::Digest;
///
/// let digest = Digest::of(b"");
/// let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
/// assert_eq!(digest.to_string(), text);
/// assert_eq!(text.parse(), Ok(digest));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The number of bytes in a digest.
    pub const LEN: usize = 32;

    /// What the text of a digest begins with.
    pub const PREFIX: &'static str = "sha256:";

    /// The digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// The digest whose bytes are known already.
    ///
    /// ```
    /// use ami_core::Digest;
    ///
    /// let digest = Digest::of(b"content");
    /// let stored: [u8; Digest::LEN] = *digest.as_bytes();
    /// assert_eq!(Digest::from_bytes(stored), digest);
    /// assert_eq!(format!("{}{}", Digest::PREFIX, digest.to_hex()), digest.to_string());
    /// ```
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// The 64 hexadecimal digits, without the `sha256:` before them.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}{}", Self::PREFIX, self.to_hex()))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no digest.
///
/// ```
/// use ami_core::Digest;
///
/// let problem = "sha1:da39a3ee".parse::<Digest>().err().map(|e| e.to_string());
/// assert!(problem.is_some_and(|text| text.starts_with(r#""sha1:da39a3ee" is not a digest"#)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a digest of the form sha256: and 64 lower-case hexadecimal digits", quote(.0))]
pub struct MalformedDigest(String);

impl FromStr for Digest {
    type Err = MalformedDigest;

    fn from_str(text: &str) -> Result<Self, MalformedDigest> {
        let digits =
            text.strip_prefix(Self::PREFIX).filter(|digits| !digits.bytes().any(|b| b.is_ascii_uppercase()));
        let mut bytes = [0; Self::LEN];
        digits
            .and_then(|digits| hex::decode_to_slice(digits, &mut bytes).ok())
            .map(|()| Self(bytes))
            .ok_or_else(|| MalformedDigest(text.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = MalformedDigest;

    fn try_from(text: String) -> Result<Self, MalformedDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Computes the digest of content that arrives in parts. Writing to it never fails.
///
/// ```
/// use std::io::Write;
/// use ami_core::{Digest, DigestWriter};
///
/// let mut writer = DigestWriter::new();
/// writer.write_all(b"in ")?;
/// writer.update(b"parts");
/// assert_eq!(writer.finish(), Digest::of(b"in parts"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct DigestWriter(Sha256);

impl DigestWriter {
    /// A writer that has seen no content.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next part of the content.
    pub fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// The digest of all parts, in the order in which they came.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl io::Write for DigestWriter {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.update(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for DigestWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DigestWriter").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_the_written_form_is_read() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let cases = [
            (format!("sha256:{hex}"), true),
            (hex.to_owned(), false),
            (format!("SHA256:{hex}"), false),
            (format!("sha256:{}", hex.to_uppercase()), false),
            (format!("sha256:{}", &hex[1..]), false),
            (format!("sha256:{hex}0"), false),
            (format!("sha256:{hex}00"), false),
            (format!("sha256: {}", &hex[1..]), false),
            (format!("sha256:{}g", &hex[1..]), false),
            (format!("sha256:{}é", &hex[2..]), false),
            (String::new(), false),
            ("sha256:".to_owned(), false),
        ];
        for (text, ok) in cases {
            assert_eq!(text.parse::<Digest>().is_ok(), ok, "{text}");
            let json = serde_json::to_string(&text).unwrap();
            assert_eq!(serde_json::from_str::<Digest>(&json).is_ok(), ok, "{text} in JSON");
        }
    }
}

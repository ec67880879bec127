//! How an instance's metadata is offered to its guest (`MetadataOptions`).

use ami_core::Tags;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// Whether requests for metadata need a token of a session (`HttpTokens`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HttpTokens {
    /// They need one (IMDSv2).
    #[default]
    Required,
    /// They may come without one (IMDSv1).
    Optional,
}

impl HttpTokens {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Optional => "optional",
        }
    }
}

/// How an instance's metadata is offered to its guest. The region keeps this and hands it out; who serves the
/// metadata obeys it.
///
/// ```
/// use instance_core::{HttpTokens, LaunchSpec, MetadataOptions};
///
/// let mut options = MetadataOptions::default();
/// assert_eq!((options.http_tokens, options.http_put_response_hop_limit), (HttpTokens::Required, 2));
/// options.http_tokens = HttpTokens::Optional;
/// options.instance_metadata_tags = true;
/// let spec = LaunchSpec::new("t3.micro".parse()?).metadata_options(options);
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MetadataOptions {
    /// Whether there is metadata at all.
    pub http_endpoint: bool,
    /// Whether it is offered over IPv6 too, which it cannot be: there is no IPv6. Who asks for it is refused.
    pub http_protocol_ipv6: bool,
    /// Whether requests need a token.
    pub http_tokens: HttpTokens,
    /// Over how many hops a token goes, 1 to 64.
    pub http_put_response_hop_limit: u8,
    /// Whether the instance's tags are part of it.
    pub instance_metadata_tags: bool,
}

impl Default for MetadataOptions {
    fn default() -> Self {
        Self {
            http_endpoint: true,
            http_protocol_ipv6: false,
            http_tokens: HttpTokens::default(),
            http_put_response_hop_limit: 2,
            instance_metadata_tags: false,
        }
    }
}

impl MetadataOptions {
    /// Refuses what no instance with these tags can have.
    pub(crate) fn check(&self, tags: &Tags) -> Result<()> {
        if self.http_protocol_ipv6 {
            let what = "metadata cannot be offered over IPv6: there is no IPv6";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if !(1..=64).contains(&self.http_put_response_hop_limit) {
            let what = format!("a hop limit of {} is not 1 to 64", self.http_put_response_hop_limit);
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        self.check_tags(tags)
    }

    /// Refuses tags that are to be offered and cannot be.
    pub(crate) fn check_tags(&self, tags: &Tags) -> Result<()> {
        match tags.iter().find(|(key, _)| self.instance_metadata_tags && !Self::can_offer(key)) {
            Some((key, _)) => {
                let what =
                    format!("the tag key {key:?} cannot be offered as metadata: it is no name in a path");
                Err(Error::new(ErrorKind::InvalidParameter, what))
            }
            None => Ok(()),
        }
    }

    /// Whether a tag of this key can be offered as metadata, where it is a name in a path: of letters and digits of ASCII
    /// and `+-=.,_:@`, as in EC2; and unlike there no number with a `=` behind it, which cloud-init takes for the name of
    /// an SSH key, and then finds nothing.
    ///
    /// ```
    /// use instance_core::MetadataOptions;
    ///
    /// assert!(MetadataOptions::can_offer("team@example.com"));
    /// assert!(!MetadataOptions::can_offer("cost center"));
    /// ```
    pub fn can_offer(key: &str) -> bool {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "+-=.,_:@".contains(c);
        let is_number = |text: &str| {
            text.contains(|c: char| c.is_ascii_digit())
                && text.chars().all(|c| c.is_ascii_digit() || "+-_".contains(c))
        };
        let numbered = key.split_once('=').is_some_and(|(before, _)| is_number(before));
        !key.is_empty() && key.chars().all(is_plain) && !numbered && ![".", "..", "_index"].contains(&key)
    }
}

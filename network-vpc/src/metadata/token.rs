//! The tokens of a session of metadata (IMDSv2): of one interface, for a time, and kept nowhere.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// For how many seconds a token may be good.
const TTL: std::ops::RangeInclusive<u64> = 1..=21_600;

/// What an interface's tokens are made and known by.
#[derive(Clone)]
pub(crate) struct Secret([u8; 32]);

impl Secret {
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
        Ok(Self(bytes))
    }

    /// A token that is good for so many seconds from `now` on, if it may be.
    pub(crate) fn issue(&self, ttl: u64, now: u64) -> Option<String> {
        let until = TTL.contains(&ttl).then(|| now.checked_add(ttl))??.to_be_bytes();
        let mut token = until.to_vec();
        token.extend(self.signature(&until)?.finalize().into_bytes());
        Some(URL_SAFE.encode(token))
    }

    /// For how many seconds a token is still good at `now`, if it is one.
    pub(crate) fn check(&self, token: &[u8], now: u64) -> Option<u64> {
        let bytes = URL_SAFE.decode(token).ok()?;
        let (until, signature) = bytes.split_first_chunk::<8>()?;
        self.signature(until)?.verify_slice(signature).ok()?;
        u64::from_be_bytes(*until).checked_sub(now).filter(|left| *left > 0)
    }

    fn signature(&self, until: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::new_from_slice(&self.0).ok()?;
        mac.update(until);
        Some(mac)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// The time that tokens are good by, in seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

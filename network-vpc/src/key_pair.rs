//! Key pairs: by which a user logs in to an instance (EC2 User Guide, "Amazon EC2 key pairs").

use ami_core::KeyPairId;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, LineEnding, PrivateKey, PublicKey};

use crate::{Error, ErrorKind, Result};

/// A key pair, as the network keeps it: without the private key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeyPair {
    /// Its id.
    pub id: KeyPairId,
    /// Its name.
    pub name: String,
    /// The public key, as OpenSSH writes it, with the name as its comment.
    pub public_key: String,
    /// By which users compare it: of an ED25519 key the SHA-256 in base64, as OpenSSH shows it without its prefix.
    pub fingerprint: String,
}

/// A key pair that was just made, with the private key, which nobody can be told again.
pub struct CreatedKeyPair {
    /// What is kept of it.
    pub key_pair: KeyPair,
    /// The private key, as OpenSSH writes it in PEM.
    pub private_key: String,
}

impl std::fmt::Debug for CreatedKeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedKeyPair").field("key_pair", &self.key_pair).finish_non_exhaustive()
    }
}

/// Makes an ED25519 key pair.
pub(crate) fn create(name: &str) -> Result<CreatedKeyPair> {
    let failed = |error: ssh_key::Error| {
        Error::new(ErrorKind::Host, "cannot make a key pair").with_source(error.to_string())
    };
    let mut private = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).map_err(failed)?;
    private.set_comment(name);
    let key_pair = described(name, private.public_key())?;
    let private_key = private.to_openssh(LineEnding::LF).map_err(failed)?.to_string();
    Ok(CreatedKeyPair { key_pair, private_key })
}

/// Takes over a public key that a user has made.
pub(crate) fn import(name: &str, public_key: &str) -> Result<KeyPair> {
    let parsed = PublicKey::from_openssh(public_key.trim()).map_err(|error| {
        let what = "the text is no public key as OpenSSH writes it";
        Error::new(ErrorKind::InvalidKeyFormat, what).with_source(error.to_string())
    })?;
    if ![Algorithm::Ed25519, Algorithm::Rsa { hash: None }].contains(&parsed.algorithm()) {
        let what = format!("{} keys cannot be used; ED25519 and RSA can", parsed.algorithm());
        return Err(Error::new(ErrorKind::InvalidKeyFormat, what));
    }
    described(name, &parsed)
}

fn described(name: &str, key: &PublicKey) -> Result<KeyPair> {
    let invalid = |error: ssh_key::Error| {
        Error::new(ErrorKind::InvalidKeyFormat, "the public key cannot be written")
            .with_source(error.to_string())
    };
    let mut key = key.clone();
    key.set_comment(name);
    let blob = key.to_bytes().map_err(invalid)?;
    let fingerprint = match key.key_data().rsa() {
        // EC2 takes the MD5 of the DER form of an imported RSA key.
        Some(rsa) => hex(&md5_of_der(rsa)?),
        None => STANDARD.encode(Sha256::digest(&blob)),
    };
    let id = KeyPairId::random().map_err(|e| Error::host("cannot make an id", e))?;
    Ok(KeyPair { id, name: name.to_owned(), public_key: key.to_openssh().map_err(invalid)?, fingerprint })
}

/// The MD5 of a public key as X.509 writes it (RFC 5280, SubjectPublicKeyInfo).
fn md5_of_der(key: &ssh_key::public::RsaPublicKey) -> Result<Vec<u8>> {
    use rsa::pkcs8::EncodePublicKey;
    let invalid = |what: String| Error::new(ErrorKind::InvalidKeyFormat, "no RSA key").with_source(what);
    let key = rsa::RsaPublicKey::try_from(key).map_err(|e| invalid(e.to_string()))?;
    let der = key.to_public_key_der().map_err(|e| invalid(e.to_string()))?;
    Ok(md5::Md5::digest(der.as_bytes()).to_vec())
}

/// Pairs of digits with colons between them.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_key_is_one_that_openssh_reads() {
        let made = create("mine").unwrap();
        let private = PrivateKey::from_openssh(&made.private_key).unwrap();
        assert_eq!(private.public_key().to_openssh().unwrap(), made.key_pair.public_key);
        assert!(made.key_pair.public_key.ends_with(" mine"));
        assert_eq!(import("mine", &made.key_pair.public_key).unwrap().fingerprint, made.key_pair.fingerprint);
        assert!(!format!("{made:?}").contains("PRIVATE"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let ecdsa = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc=";
        for text in ["", "ssh-ed25519", "ssh-ed25519 AAAA", "-----BEGIN PUBLIC KEY-----", ecdsa] {
            assert_eq!(import("mine", text).unwrap_err().kind(), ErrorKind::InvalidKeyFormat, "{text}");
        }
    }
}

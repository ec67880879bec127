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
    /// By which users compare it (EC2 User Guide, "Verify the fingerprint of your key pair"). Of an ED25519 key the
    /// SHA-256 of the public key in base64, as OpenSSH shows it without its prefix. Of an RSA key that was
    /// made here, the SHA-1 of the private key in PKCS #8; of one that was imported, the MD5 of the public key.
    pub fingerprint: String,
}

/// What a key pair is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum KeyType {
    /// Ed25519 (RFC 8032).
    Ed25519,
    /// RSA, with 2048 bits where it is made here.
    Rsa,
}

impl KeyPair {
    /// What it was made for.
    ///
    /// ```
    /// # let network = network_vpc::Network::in_memory(&"us-east-1".parse()?)?;
    /// let made = network.create_key_pair("mine")?;
    /// assert_eq!(made.key_pair.key_type(), network_vpc::KeyType::Ed25519);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key_type(&self) -> KeyType {
        if self.public_key.starts_with("ssh-rsa ") { KeyType::Rsa } else { KeyType::Ed25519 }
    }
}

/// A key pair that was just made, with the private key, which nobody can be told again.
pub struct CreatedKeyPair {
    /// What is kept of it.
    pub key_pair: KeyPair,
    /// The private key in PEM: of ED25519 as OpenSSH writes it, of RSA in PKCS #1 (RFC 8017), as EC2's.
    pub private_key: String,
}

impl std::fmt::Debug for CreatedKeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedKeyPair").field("key_pair", &self.key_pair).finish_non_exhaustive()
    }
}

/// Makes a key pair.
pub(crate) fn create(name: &str, key_type: KeyType) -> Result<CreatedKeyPair> {
    match key_type {
        KeyType::Ed25519 => create_ed25519(name),
        KeyType::Rsa => {
            const BITS: usize = 2048;
            let private = rsa::RsaPrivateKey::new(&mut OsRng, BITS).map_err(|e| failed(&e))?;
            created_rsa(name, &private)
        }
    }
}

fn create_ed25519(name: &str) -> Result<CreatedKeyPair> {
    let failed = |error: ssh_key::Error| failed(&error);
    let mut private = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).map_err(failed)?;
    private.set_comment(name);
    let key_pair = described(name, private.public_key())?;
    let private_key = private.to_openssh(LineEnding::LF).map_err(failed)?.to_string();
    Ok(CreatedKeyPair { key_pair, private_key })
}

/// What users are told of an RSA key, whose PKCS #8 is DER of RFC 5958.
fn created_rsa(name: &str, private: &rsa::RsaPrivateKey) -> Result<CreatedKeyPair> {
    use rsa::pkcs1::EncodeRsaPrivateKey;
    use rsa::pkcs8::EncodePrivateKey;
    let public = ssh_key::public::RsaPublicKey::try_from(private.to_public_key()).map_err(|e| failed(&e))?;
    let mut key_pair = described(name, &PublicKey::new(public.into(), ""))?;
    let der = private.to_pkcs8_der().map_err(|e| failed(&e))?;
    key_pair.fingerprint = hex(&sha1::Sha1::digest(der.as_bytes()));
    let pem = private.to_pkcs1_pem(rsa::pkcs8::LineEnding::LF).map_err(|e| failed(&e))?;
    Ok(CreatedKeyPair { key_pair, private_key: pem.to_string() })
}

fn failed(error: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::Host, "cannot make a key pair").with_source(error.to_string())
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
mod tests;

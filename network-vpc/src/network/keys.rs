//! Key pairs of a network.

use super::Network;
use crate::key_pair::{self, CreatedKeyPair, KeyPair, KeyType};
use crate::model::Model;
use crate::{Error, ErrorKind, Result};

/// The longest name.
const LONGEST_NAME: usize = 255;

impl Network {
    /// The key pairs.
    pub fn key_pairs(&self) -> Vec<KeyPair> {
        self.model().key_pairs.values().cloned().collect()
    }

    /// A key pair.
    ///
    /// # Errors
    ///
    /// [`KeyPairNotFound`](ErrorKind::KeyPairNotFound).
    pub fn key_pair(&self, name: &str) -> Result<KeyPair> {
        let found = self.model().key_pairs.get(name).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::KeyPairNotFound, format!("there is no key pair {name:?}")))
    }

    /// Makes an ED25519 key pair. The private key is told now and never again.
    ///
    /// ```
    /// # use network_vpc::Network;
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let made = network.create_key_pair("mine")?;
    /// assert!(made.private_key.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----"));
    /// assert_eq!(network.key_pair("mine")?, made.key_pair);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`KeyPairDuplicate`](ErrorKind::KeyPairDuplicate), [`InvalidParameter`](ErrorKind::InvalidParameter) for a
    /// name that cannot be one, or what the host refused.
    pub fn create_key_pair(&self, name: &str) -> Result<CreatedKeyPair> {
        self.create_key_pair_of(name, KeyType::Ed25519)
    }

    /// Makes a key pair of a type. The private key is told now and never again. An RSA key takes its time to be found:
    /// a second, or many without optimisation.
    ///
    /// ```no_run
    /// # let network = network_vpc::Network::in_memory(&"us-east-1".parse()?)?;
    /// let made = network.create_key_pair_of("mine", network_vpc::KeyType::Rsa)?;
    /// assert!(made.private_key.starts_with("-----BEGIN RSA PRIVATE KEY-----"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`create_key_pair`](Self::create_key_pair).
    pub fn create_key_pair_of(&self, name: &str, key_type: KeyType) -> Result<CreatedKeyPair> {
        check(name)?;
        let made = key_pair::create(name, key_type)?;
        self.change(|model| add(model, made.key_pair.clone()))?;
        Ok(made)
    }

    /// Takes over a public key, as OpenSSH writes it: ED25519, or RSA with at least 2048 bits.
    ///
    /// # Errors
    ///
    /// [`InvalidKeyFormat`](ErrorKind::InvalidKeyFormat), [`KeyPairDuplicate`](ErrorKind::KeyPairDuplicate),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a name that cannot be one, or what the host refused.
    pub fn import_key_pair(&self, name: &str, public_key: &str) -> Result<KeyPair> {
        check(name)?;
        let key_pair = key_pair::import(name, public_key)?;
        self.change(|model| add(model, key_pair.clone()))?;
        Ok(key_pair)
    }

    /// Deletes a key pair. Instances keep the public key that they were given; deleting none is no error, as in EC2.
    ///
    /// # Errors
    ///
    /// What the host refused.
    pub fn delete_key_pair(&self, name: &str) -> Result<()> {
        self.change(|model| {
            model.key_pairs.remove(name);
            Ok(())
        })
    }
}

fn check(name: &str) -> Result<()> {
    if !name.is_empty()
        && name.len() <= LONGEST_NAME
        && name.chars().all(|c| c.is_ascii_graphic() || c == ' ')
    {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidParameter, format!("{name:?} cannot be a key pair's name")))
}

fn add(model: &mut Model, key_pair: KeyPair) -> Result<()> {
    if model.key_pairs.contains_key(&key_pair.name) {
        let what = format!("there is a key pair {:?}", key_pair.name);
        return Err(Error::new(ErrorKind::KeyPairDuplicate, what));
    }
    model.key_pairs.insert(key_pair.name.clone(), key_pair);
    Ok(())
}

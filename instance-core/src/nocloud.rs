//! A disk by which cloud-init configures a guest without a network: the seed of its data source NoCloud (cloud-init's
//! documentation, "NoCloud").

use std::fs::File;
use std::io::{self, Write as _};

use serde::{Deserialize, Serialize};
use serde_json::json;
use ssh_key::PublicKey;
use storage_block::RawFile;

use crate::machine::DiskSpec;
use crate::power::memory_file;
use crate::record::InstanceRecord;
use crate::{Error, ErrorKind, Result};

/// The serial number that a guest finds the disk by, and the name of its file system, by which cloud-init does.
const SERIAL: &str = "nocloud";
const LABEL: [u8; 11] = *b"CIDATA     ";

/// The size of the disk: room for the longest user data and the most and longest keys.
const SIZE: u64 = 1 << 20;

/// The most keys, and the most bytes of one: an RSA key of 16,384 bits, the longest that OpenSSH makes, has 2,800.
const MOST_KEYS: usize = 32;
const LONGEST_KEY: usize = 8 << 10;

/// What an instance is told by a small disk that it can only read, for cloud-init's data source NoCloud: its id and name,
/// its user data, and the keys that may log in, that of its [key pair](crate::LaunchSpec::key_name) among them where the
/// region's network knows it. EC2 has nothing like it: it is for instances without a network, and so without
/// metadata.
///
/// There are at most 32 keys, of at most 8 KiB each, in one line and without control characters.
///
/// The disk comes behind all others of the instance. It is made anew whenever a machine is, of what the instance's user
/// data is by then, and is no volume: images of the instance do not have it.
///
/// ```
/// use instance_core::{LaunchSpec, NoCloudSeed};
///
/// let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me";
/// let spec = LaunchSpec::new("t3.micro".parse()?)
///     .nocloud_seed(NoCloudSeed::new().public_key(key))
///     .user_data("#!/bin/sh\necho hello > /dev/console\n");
/// assert_eq!(spec.nocloud_seed.map(|seed| seed.public_keys.len()), Some(1));
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NoCloudSeed {
    /// Keys that may log in, as OpenSSH writes them.
    pub public_keys: Vec<String>,
}

impl NoCloudSeed {
    /// One with no keys but that of the instance's key pair, if it has one.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more key that may log in, as OpenSSH writes it.
    #[must_use]
    pub fn public_key(mut self, key: impl Into<String>) -> Self {
        self.public_keys.push(key.into());
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |what: String| Error::new(ErrorKind::InvalidParameter, what);
        if self.public_keys.len() > MOST_KEYS {
            return Err(invalid(format!("there are more than {MOST_KEYS} keys for the NoCloud seed")));
        }
        if self.public_keys.iter().any(|key| key.len() > LONGEST_KEY) {
            let what = format!("a key for the NoCloud seed is longer than {LONGEST_KEY} bytes");
            return Err(invalid(what));
        }
        // None is part of a key, and written down each takes six times its room.
        if self.public_keys.iter().any(|key| line(key).contains(char::is_control)) {
            return Err(invalid("a key for the NoCloud seed has control characters in it".to_owned()));
        }
        let parsed = self.public_keys.iter().try_for_each(|key| PublicKey::from_openssh(key).map(drop));
        parsed.map_err(|e| {
            let what = "a key for the NoCloud seed is no public key as OpenSSH writes it";
            invalid(what.to_owned()).with_source(e.to_string())
        })
    }

    /// The disk for an instance.
    pub(crate) fn disk(&self, record: &InstanceRecord) -> Result<DiskSpec> {
        let user_data = record.user_data()?.unwrap_or_default();
        let file = memory_file().and_then(|file| {
            self.write(&file, record, &user_data)?;
            Ok(file)
        });
        let file = file.map_err(|e| Error::io(e, "cannot make the NoCloud seed"))?;
        let disk = RawFile::from_file(file, true);
        let disk = disk.map_err(|e| Error::storage(e, "cannot make the NoCloud seed"))?;
        Ok(DiskSpec::new(disk.into_disk(), SERIAL))
    }

    fn write(&self, file: &File, record: &InstanceRecord, user_data: &[u8]) -> io::Result<()> {
        let instance = &record.description;
        let name = instance.network.as_ref().map(|place| place.private_dns_name.clone());
        let keys: Vec<&str> =
            record.public_key.iter().chain(&self.public_keys).map(|key| line(key)).collect();
        // Its format is YAML, of which JSON is a part.
        let meta_data = json!({
            "instance-id": instance.id,
            "local-hostname": name.unwrap_or_else(|| instance.id.to_string()),
            "public-keys": keys,
        });
        file.set_len(SIZE)?;
        let options = fatfs::FormatVolumeOptions::new().volume_label(LABEL);
        fatfs::format_volume(file, options)?;
        let files = fatfs::FileSystem::new(file, fatfs::FsOptions::new())?;
        let root = files.root_dir();
        for (name, content) in [("meta-data", meta_data.to_string().as_bytes()), ("user-data", user_data)] {
            root.create_file(name)?.write_all(content)?;
        }
        drop(root);
        files.unmount()
    }
}

/// A key without the end of its line, which it has where it was read from a file.
fn line(key: &str) -> &str {
    key.trim_end_matches(['\r', '\n'])
}

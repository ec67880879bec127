//! The instance metadata service: what a guest is told of itself at `http://169.254.169.254/` (EC2 User Guide,
//! "Instance metadata and user data").

mod session;
#[cfg(test)]
mod tests;
mod token;
mod tree;

use std::collections::BTreeSet;

use ami_core::{AccountId, AmiId, Architecture, InstanceId, ProductCode, ReservationId, Tags, Timestamp};
use instance_core::MetadataOptions;

pub(crate) use self::session::{Session, Told};
pub(crate) use self::token::{Secret, now};

/// What a guest is told of its instance. What it is told of its network, the network knows.
///
/// ```
/// use network_vpc::Metadata;
///
/// let mut metadata = Metadata::new("i-0123456789abcdef0".parse()?);
/// metadata.instance_type = "t3.micro".to_owned();
/// metadata.user_data = Some(b"#!/bin/sh\necho hello\n".to_vec());
/// metadata.public_keys.push(("me".to_owned(), "ssh-ed25519 AAAA me".to_owned()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// The instance.
    pub instance_id: InstanceId,
    /// What it was launched of.
    pub image_id: Option<AmiId>,
    /// The products that it runs.
    pub product_codes: BTreeSet<ProductCode>,
    /// The name of its type.
    pub instance_type: String,
    /// Which of the instances of its launch it is.
    pub launch_index: u32,
    /// Its launch.
    pub reservation_id: Option<ReservationId>,
    /// When it was launched.
    pub launch_time: Option<Timestamp>,
    /// Whose it is.
    pub owner: Option<AccountId>,
    /// Its processor.
    pub architecture: Architecture,
    /// The name of its root device, such as `/dev/xvda`.
    pub root_device: Option<String>,
    /// The names of the devices that its volumes are, but for the root device.
    pub volumes: Vec<String>,
    /// The names of its disks of instance store, such as `ephemeral0`, with the names of the devices that they are.
    pub instance_store: Vec<(String, String)>,
    /// The names and the texts of the keys that may log in, as OpenSSH writes them.
    pub public_keys: Vec<(String, String)>,
    /// What it was given to do.
    pub user_data: Option<Vec<u8>>,
    /// Its tags, which are told where the options allow it.
    pub tags: Tags,
    /// Whether and how all this is told.
    pub options: MetadataOptions,
}

impl Metadata {
    /// Of an instance of which nothing else is known: 64-bit x86, and the options that are EC2's defaults.
    pub fn new(instance_id: InstanceId) -> Self {
        Self {
            instance_id,
            image_id: None,
            product_codes: BTreeSet::new(),
            instance_type: String::new(),
            launch_index: 0,
            reservation_id: None,
            launch_time: None,
            owner: None,
            architecture: Architecture::X86_64,
            root_device: None,
            volumes: Vec::new(),
            instance_store: Vec::new(),
            public_keys: Vec::new(),
            user_data: None,
            tags: Tags::default(),
            options: MetadataOptions::default(),
        }
    }
}

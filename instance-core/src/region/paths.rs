//! Where the parts of a region lie in its directory.

use std::path::PathBuf;

#[cfg(feature = "sbom")]
use ami_core::Digest;
use ami_core::{InstanceId, VolumeId};

/// Where things lie.
#[derive(Debug)]
pub(crate) struct Paths {
    pub(crate) root: PathBuf,
}

impl Paths {
    /// The database of the state store.
    pub(super) fn database(&self) -> PathBuf {
        self.root.join("region.db")
    }

    /// The journal in front of it.
    pub(super) fn journal(&self) -> PathBuf {
        self.root.join("region.journal")
    }

    pub(crate) fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub(crate) fn blocks(&self) -> PathBuf {
        self.root.join("blocks")
    }

    /// Where the block store keeps its snapshots.
    pub(super) fn snapshots(&self) -> PathBuf {
        self.blocks().join("snapshots")
    }

    pub(crate) fn volume(&self, id: VolumeId) -> PathBuf {
        self.volumes().join(id.to_string())
    }

    pub(crate) fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    /// Where it is kept what is installed on images.
    pub(crate) fn software_bills(&self) -> PathBuf {
        self.root.join("software")
    }

    #[cfg(feature = "sbom")]
    pub(crate) fn software_bill(&self, content: &Digest) -> PathBuf {
        self.software_bills().join(content.to_hex())
    }

    /// Where the machines are of instances that hibernate.
    pub(crate) fn hibernated(&self) -> PathBuf {
        self.root.join("hibernated")
    }

    pub(crate) fn saved_machine(&self, id: InstanceId) -> PathBuf {
        self.hibernated().join(id.to_string())
    }

    /// Where an instance's root device is that is instance store.
    pub(crate) fn store_root(&self, id: InstanceId) -> PathBuf {
        self.instances().join(format!("{id}.root"))
    }

    pub(crate) fn instance(&self, id: InstanceId) -> PathBuf {
        self.instances().join(id.to_string())
    }
}

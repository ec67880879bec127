//! What stands in the place of a disk or a cable that was taken from a guest which has not let go of the device yet,
//! when its machine is saved and restored: a device with nothing behind it, that looks as it did.

use instance_core::machine::NetSpec;
use instance_core::net::{self, MacAddress, Offloads};
use serde::{Deserialize, Serialize};
use storage_block::{BlockBackend, Disk, Error, ErrorKind};

use crate::error::{Result, saved};
use crate::saved as format;

/// What a device had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Gone {
    Disk(format::Disk),
    Net(format::Port),
}

impl Gone {
    /// What the device is.
    pub(crate) fn role(&self) -> format::Role {
        match self {
            Self::Disk(_) => format::Role::Disk,
            Self::Net(_) => format::Role::Net,
        }
    }

    /// What a device is to be given, and to lose before anybody uses it.
    pub(crate) fn disk(disk: &format::Disk) -> Result<Disk> {
        let stand_in = NoDisk { size: disk.size, read_only: disk.read_only };
        Disk::new(stand_in).map_err(|e| saved("a disk of the saved machine cannot be").with_source(e))
    }

    /// The same of a network port. What its network took is not known any more: all that a driver can have accepted.
    pub(crate) fn net(port: &format::Port) -> NetSpec {
        let (machine, network) = net::link();
        network.set_takes(Offloads::ALL);
        let mut spec = NetSpec::new(machine, MacAddress(port.mac));
        spec.mtu = port.mtu;
        spec
    }
}

/// A disk that has only a size.
#[derive(Debug)]
struct NoDisk {
    size: u64,
    read_only: bool,
}

impl NoDisk {
    fn refuse<T>() -> storage_block::Result<T> {
        Err(Error::new(ErrorKind::Io, "the disk was taken away"))
    }
}

impl BlockBackend for NoDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> storage_block::Result<()> {
        Self::refuse()
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> storage_block::Result<()> {
        Self::refuse()
    }

    fn flush(&self) -> storage_block::Result<()> {
        Self::refuse()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> storage_block::Result<()> {
        Self::refuse()
    }
}

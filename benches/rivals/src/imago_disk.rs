//! An image that imago has open, as a disk.

use std::io;
use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder as _, PermissiveImplicitOpenGate};
use storage_block::{BlockBackend, Disk, Error, Result};

struct Imago(FormatAccess<File>);

/// Opens a qcow2 image, and what it is an overlay of.
pub(crate) fn open(path: &Path) -> anyhow::Result<Disk> {
    let image = Qcow2::<File>::builder_path(path).write(true).open(PermissiveImplicitOpenGate::default())?;
    Ok(Disk::new(Imago(FormatAccess::new(image)))?)
}

impl std::fmt::Debug for Imago {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Imago").finish_non_exhaustive()
    }
}

fn failed(error: io::Error) -> Error {
    Error::io(error, "imago")
}

impl BlockBackend for Imago {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset).map_err(failed)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write(buf, offset).map_err(failed)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush().map_err(failed)?;
        self.0.sync().map_err(failed)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len).map_err(failed)
    }
}

//! VMDK images.
//!
//! From the layouts described in "Virtual Disk Format 5.0" (VMware, 2011) and what QEMU and VMware write. imago
//! reads none of the sparse kinds, and writes none at all.

mod descriptor;
mod disk;
mod header;
mod sparse;
mod write;

use std::path::Path;

use storage_block::Disk;

use crate::read_only::ReadOnly;
use crate::source::Source;
use crate::{Error, OpenOptions, Result};

use descriptor::Descriptor;
use disk::{Extent, Image};
use sparse::Sparse;

pub(crate) use write::{Kind, Writer};

/// The unit of all numbers in the format.
const SECTOR: u64 = 512;

/// Whether a file that begins so is a VMDK image: a descriptor, or an extent with one in it.
pub(crate) fn is_one(head: &[u8]) -> bool {
    head.starts_with(header::MAGIC) || head.starts_with(header::COWD) || Descriptor::is_one(head)
}

/// Opens an image to be read. Extents may lie in `directory`, if there is one.
pub(crate) fn open(source: Source, options: &OpenOptions, directory: Option<&Path>) -> Result<Disk> {
    let name = source.name().to_owned();
    let image = if Descriptor::is_one(&source.head(SECTOR as usize)?) {
        let descriptor = Descriptor::parse(&source)?;
        options.check_size(descriptor.size())?;
        disk::assemble(&descriptor, directory)?
    } else {
        let (sparse, descriptor) = Sparse::open(source, options)?;
        descriptor.check_alone(sparse.size())?;
        Image::new(vec![Extent::Sparse(sparse)])
    };
    Disk::new(ReadOnly::new(image, name)).map_err(|e| Error::disk(e, "the VMDK image is no disk"))
}

//! Vectored requests for backends that know slices alone: through a buffer where it must be, and past it
//! where the bytes lie in a file.

use crate::buffer::{gather, read_all_at, scatter, take_first, total};
use crate::{BlockBackend, Extent, IoBuf, IoBufMut, Result};

/// The most bytes that pass through memory of this crate at once.
const BOUNCE: u64 = 256 << 10;

/// Reads by the backend's extents.
pub(crate) fn read<B: BlockBackend + ?Sized>(
    backend: &B,
    mut bufs: &mut [IoBufMut<'_>],
    mut offset: u64,
) -> Result<()> {
    let mut left = total(bufs).unwrap_or(0);
    while left > 0 {
        let extent = backend.extent(offset, left);
        let len = extent.len(left);
        take_first(&mut bufs, len as usize, |mut part| match extent {
            // What the file does not give, the backend may, or knows why nobody can.
            Extent::File { file, offset: at, .. } => read_all_at(file, &mut part, at).or_else(|_| {
                let missing = total(part).unwrap_or(0);
                copy_in(backend, part, offset + len - missing)
            }),
            Extent::Zeroes { .. } => {
                part.iter_mut().for_each(IoBufMut::zero);
                Ok(())
            }
            Extent::Backend { .. } => copy_in(backend, part, offset),
        })?;
        (offset, left) = (offset + len, left - len);
    }
    Ok(())
}

/// Reads through a buffer.
fn copy_in<B: BlockBackend + ?Sized>(
    backend: &B,
    mut bufs: &mut [IoBufMut<'_>],
    mut offset: u64,
) -> Result<()> {
    let mut left = total(bufs).unwrap_or(0);
    let mut bounce = vec![0; left.min(BOUNCE) as usize];
    while left > 0 {
        let len = left.min(BOUNCE) as usize;
        backend.read_at(&mut bounce[..len], offset)?;
        take_first(&mut bufs, len, |part| scatter(&bounce[..len], part));
        (offset, left) = (offset + len as u64, left - len as u64);
    }
    Ok(())
}

/// Writes through a buffer.
pub(crate) fn write<B: BlockBackend + ?Sized>(
    backend: &B,
    mut bufs: &mut [IoBuf<'_>],
    mut offset: u64,
) -> Result<()> {
    let mut left = total(bufs).unwrap_or(0);
    let mut bounce = vec![0; left.min(BOUNCE) as usize];
    while left > 0 {
        let len = left.min(BOUNCE) as usize;
        take_first(&mut bufs, len, |part| gather(part, &mut bounce[..len]));
        backend.write_at(&bounce[..len], offset)?;
        (offset, left) = (offset + len as u64, left - len as u64);
    }
    Ok(())
}

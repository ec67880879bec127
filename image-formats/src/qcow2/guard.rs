//! What stands between imago and the file.
#![allow(unsafe_code, reason = "imago's trait has unsafe methods; nothing unsafe is done in them")]

use std::fmt;
use std::io;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::ErrorKind;

use super::tables::Tables;

/// What an error is that the file is to blame for and not the image. imago keeps an error's kind, though not always the
/// error, and makes none of this one.
pub(super) const FILE_FAILED: io::ErrorKind = io::ErrorKind::BrokenPipe;

/// Hands imago a header made for it, the L1 table that was checked, and L2 tables once they have been.
#[derive(Debug)]
pub(super) struct Guard {
    tables: Arc<Tables>,
    header: Vec<u8>,
    helper: CommonStorageHelper,
}

impl Guard {
    pub(super) fn new(tables: &Arc<Tables>) -> Self {
        let header = tables.header.for_reader();
        Self { tables: Arc::clone(tables), header, helper: CommonStorageHelper::default() }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> crate::Result<()> {
        let Tables { source, header, l1, .. } = &*self.tables;
        // Data and L2 tables lie in neither.
        if offset < header.cluster() {
            copy(&self.header, buf, offset);
        } else if (header.l1_offset..header.l1_offset + l1.len() as u64).contains(&offset) {
            copy(l1, buf, offset - header.l1_offset);
        } else {
            // The last cluster need not be all there.
            source.read_padded_at(buf, offset)?;
            if self.tables.is_l2(offset) {
                self.tables.check_l2(buf)?;
            }
        }
        Ok(())
    }
}

/// Fills `buf` with the bytes at `offset`, and with zeroes where they end.
fn copy(bytes: &[u8], buf: &mut [u8], offset: u64) {
    let from = &bytes[bytes.len().min(offset as usize)..];
    let len = from.len().min(buf.len());
    buf[..len].copy_from_slice(&from[..len]);
    buf[len..].fill(0);
}

impl Storage for Guard {
    fn size(&self) -> io::Result<u64> {
        Ok(self.tables.source.len())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in bufv.into_inner() {
            self.read(&mut part, offset).map_err(|e| {
                let kind = match e.kind() {
                    ErrorKind::Corrupt => io::ErrorKind::InvalidData,
                    _ => FILE_FAILED,
                };
                io::Error::new(kind, e)
            })?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, _: IoVector<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the image")
    }
}

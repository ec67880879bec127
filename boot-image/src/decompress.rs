//! The compression formats of kernels, with a bound on what comes out.

use std::io::{self, Read};

use bzip2::read::BzDecoder;
use flate2::read::GzDecoder;
use lz4_flex::frame::FrameDecoder as Lz4Decoder;
use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder as ZstdDecoder;

use crate::lzo::{self, LzopReader};
use crate::{Error, ErrorKind, Result};

/// The largest window or dictionary that a packed kernel may ask for. The kernel's own build uses
/// 32 MiB with xz and 128 MiB with Zstandard.
const MAX_WINDOW: u64 = 128 << 20;

/// A compression format, told by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Gzip,
    Xz,
    /// The format of `lz4 -l`: blocks of 8 MiB and no checksum.
    Lz4Legacy,
    Zstd,
    Lzma,
    Bzip2,
    Lzo,
}

impl Format {
    pub(crate) fn of(packed: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Format); 7] = [
            (b"\x1f\x8b", Format::Gzip),
            (b"\xfd7zXZ\0", Format::Xz),
            (b"\x02\x21\x4c\x18", Format::Lz4Legacy),
            (b"\x28\xb5\x2f\xfd", Format::Zstd),
            (b"\x5d\0\0", Format::Lzma),
            (b"BZh", Format::Bzip2),
            (lzo::MAGIC, Format::Lzo),
        ];
        MAGIC.iter().find(|(magic, _)| packed.starts_with(magic)).map(|(_, format)| *format)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4Legacy => "LZ4",
            Self::Zstd => "Zstandard",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "LZO",
        }
    }

    fn reader<'a>(self, packed: &'a [u8]) -> Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(GzDecoder::new(packed)),
            Self::Xz => Box::new(XzReader::new_mem_limit(packed, false, (MAX_WINDOW >> 10) as u32)),
            Self::Lz4Legacy => Box::new(Lz4Decoder::new(packed)),
            Self::Zstd => {
                check_zstd_window(packed)?;
                Box::new(ZstdDecoder::new(packed).map_err(|e| self.corrupt().because(e))?)
            }
            Self::Lzma => {
                let opened = LzmaReader::new_mem_limit(packed, (MAX_WINDOW >> 10) as u32, None);
                Box::new(opened.map_err(|e| self.failure(MAX_WINDOW as usize, e))?)
            }
            Self::Bzip2 => Box::new(BzDecoder::new(packed)),
            Self::Lzo => Box::new(LzopReader::new(packed).map_err(|e| self.corrupt().because(e))?),
        })
    }

    fn corrupt(self) -> Error {
        Error::new(ErrorKind::Corrupt, format!("the kernel's {} data cannot be unpacked", self.name()))
    }

    /// What a reader's error means, where no more than so many bytes may come out.
    fn failure(self, most: usize, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::OutOfMemory => too_large(most).because(error),
            _ => self.corrupt().because(error),
        }
    }
}

/// Unpacks everything, which must be `size` bytes and no more than `limit`.
pub(crate) fn exact(format: Format, packed: &[u8], size: usize, limit: usize) -> Result<Vec<u8>> {
    if size > limit {
        return Err(too_large(limit));
    }
    let mut out = Vec::new();
    // One byte more than said, to see that there is none.
    unpack(format, packed, size + 1, &mut out)?;
    if out.len() != size {
        let more = if out.len() > size { "more" } else { "less" };
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the kernel says that it unpacks to {size} bytes, and it unpacks to {more}"),
        ));
    }
    Ok(out)
}

/// Unpacks everything, which must be no more than `limit` bytes.
pub(crate) fn bounded(format: Format, packed: &[u8], limit: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    unpack(format, packed, limit + 1, &mut out)?;
    if out.len() > limit { Err(too_large(limit)) } else { Ok(out) }
}

fn unpack(format: Format, packed: &[u8], most: usize, out: &mut Vec<u8>) -> Result<()> {
    let read = format.reader(packed)?.take(most as u64).read_to_end(out);
    read.map(drop).map_err(|e| format.failure(most, e))
}

fn too_large(limit: usize) -> Error {
    Error::new(ErrorKind::TooLarge, format!("the kernel unpacks to more than {} MiB", limit >> 20))
}

/// The decoder keeps as much output as the frame's window says before it gives any of it away, so
/// a frame with a boundless window would be unpacked in memory as a whole (RFC 8878, 3.1.1.1).
fn check_zstd_window(packed: &[u8]) -> Result<()> {
    let corrupt = || Format::Zstd.corrupt();
    let header = packed.get(4..).unwrap_or_default();
    let (&descriptor, fields) = header.split_first().ok_or_else(corrupt)?;
    let single_segment = descriptor & 0x20 != 0;
    let window = if single_segment {
        let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size_len = [1, 2, 4, 8][usize::from(descriptor >> 6)];
        let size = fields.get(dictionary_id..dictionary_id + size_len).ok_or_else(corrupt)?;
        size.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    } else {
        let window = *fields.first().ok_or_else(corrupt)?;
        let base = 1u64 << (10 + (window >> 3));
        base + base / 8 * u64::from(window & 7)
    };
    // A single segment is as large as the kernel itself.
    let most = if single_segment { crate::kernel::MAX_UNPACKED as u64 } else { MAX_WINDOW };
    if window > most {
        return Err(Error::new(
            ErrorKind::TooLarge,
            format!(
                "the kernel's Zstandard data needs a window of {window} bytes; at most {most} are allowed"
            ),
        ));
    }
    Ok(())
}

//! Packing and unpacking of one cluster or grain, in memory.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ruzstd::decoding::StreamingDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use zlib_rs::{DeflateConfig, InflateConfig, ReturnCode};

use crate::Result;
use crate::error::corrupt;

/// The window of the deflate streams in qcow2 images: QEMU unpacks them with one of 2^12 bytes.
const QCOW2_WINDOW_BITS: i32 = 12;
/// The largest window that a Zstandard frame may ask for; its specification wants this much supported.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// Packs as a raw deflate stream, if that fits in `limit` bytes.
pub(crate) fn deflate(bytes: &[u8], level: u8, limit: usize) -> Option<Vec<u8>> {
    // A negative number of bits means a stream without zlib's header.
    compress(bytes, level, -QCOW2_WINDOW_BITS, limit)
}

/// Packs as a zlib stream. It may become a little longer.
pub(crate) fn zlib(bytes: &[u8], level: u8) -> Option<Vec<u8>> {
    compress(bytes, level, 15, zlib_rs::compress_bound(bytes.len()))
}

fn compress(bytes: &[u8], level: u8, window_bits: i32, limit: usize) -> Option<Vec<u8>> {
    let config = DeflateConfig { window_bits, ..DeflateConfig::new(level.into()) };
    let mut out = vec![0; limit];
    let (packed, code) = zlib_rs::compress_slice(&mut out, bytes, config);
    let len = packed.len();
    out.truncate(len);
    (code == ReturnCode::Ok).then_some(out)
}

/// Unpacks a zlib stream into the beginning of `out`; says how many bytes that were.
pub(crate) fn unzlib(packed: &[u8], out: &mut [u8]) -> Result<usize> {
    let (unpacked, code) = zlib_rs::decompress_slice(out, packed, InflateConfig::default());
    if code == ReturnCode::Ok { Ok(unpacked.len()) } else { Err(corrupt("a zlib stream cannot be unpacked")) }
}

/// Fills `out` with what a raw deflate stream holds, whatever follows that.
pub(crate) fn inflate(packed: &[u8], out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    let (unpacked, code) = zlib_rs::decompress_slice(out, packed, InflateConfig { window_bits: -15 });
    let is_whole = unpacked.len() == wanted && code == ReturnCode::Ok;
    if is_whole { Ok(()) } else { Err(corrupt("a deflate stream cannot be unpacked")) }
}

/// Packs as a Zstandard frame, if that fits in `limit` bytes.
///
/// The packer is younger than any unpacker, so what it made is unpacked once before it is believed.
pub(crate) fn zstd(bytes: &[u8], limit: usize) -> Option<Vec<u8>> {
    let packed = catch_unwind(|| compress_to_vec(bytes, CompressionLevel::Fastest)).ok()?;
    let mut again = vec![0; bytes.len()];
    (packed.len() <= limit && unzstd(&packed, &mut again).is_ok() && again == bytes).then_some(packed)
}

/// Fills `out` with what the first Zstandard frame in `packed` holds.
pub(crate) fn unzstd(packed: &[u8], out: &mut [u8]) -> Result<()> {
    let bad = || corrupt("a Zstandard frame cannot be unpacked");
    if zstd_window(packed).is_none_or(|window| window > MAX_ZSTD_WINDOW) {
        return Err(corrupt("a Zstandard frame has no window that is allowed"));
    }
    let unpack = || StreamingDecoder::new(packed).map(|mut frame| frame.read_exact(out));
    let read = catch_unwind(AssertUnwindSafe(unpack));
    matches!(read, Ok(Ok(Ok(())))).then_some(()).ok_or_else(bad)
}

/// How much memory a Zstandard frame asks for (RFC 8878, section 3.1.1.1).
fn zstd_window(packed: &[u8]) -> Option<u64> {
    let header = packed.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd])?;
    let (&descriptor, rest) = header.split_first()?;
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let byte = u64::from(*rest.first()?);
        let base = 1 << (10 + (byte >> 3));
        return Some(base + base / 8 * (byte & 7));
    }
    let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let len = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let field = rest.get(dictionary_id..dictionary_id + len)?;
    let size = field.iter().rev().fold(0, |size, byte| size << 8 | u64::from(*byte));
    Some(if len == 2 { size + 256 } else { size })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that pack, and some that do not.
    fn samples() -> Vec<Vec<u8>> {
        let mut seed = 1u32;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 24) as u8
            })
            .collect();
        let text = b"what is said twice is said in vain; ".iter().copied().cycle().take(65536).collect();
        let mixed = noise.iter().enumerate().map(|(i, byte)| if i % 64 < 40 { 0 } else { *byte }).collect();
        vec![noise, text, mixed, vec![0xff; 65536], vec![1; 2 << 20]]
    }

    #[test]
    fn unpacks_what_it_packed() {
        for bytes in samples() {
            let mut out = vec![0; bytes.len()];
            let packed = zlib(&bytes, 6).unwrap();
            assert_eq!(unzlib(&packed, &mut out).unwrap(), bytes.len());
            assert!(out == bytes);
            if let Some(packed) = zstd(&bytes, bytes.len() - 1) {
                out.fill(0);
                unzstd(&packed, &mut out).unwrap();
                assert!(out == bytes);
            }
        }
        assert!(zstd(&samples()[1], 1000).is_some() && deflate(&samples()[1], 6, 1000).is_some());
        assert!(zstd(&samples()[0], 65535).is_none() && deflate(&samples()[0], 6, 65535).is_none());
    }

    #[test]
    fn refuses_what_is_none() {
        let packed = zstd(&samples()[1], 65535).unwrap();
        let mut out = vec![0; 65536];
        for len in [0, 4, 5, 9, packed.len() / 2] {
            assert!(unzstd(&packed[..len], &mut out).is_err(), "{len} bytes");
        }
        let mut too_long = vec![0; 65537];
        assert!(unzstd(&packed, &mut too_long).is_err());
        // A window of 3.75 TiB, and a content of 2^60 bytes.
        assert_eq!(zstd_window(b"\x28\xb5\x2f\xfd\0\xff"), Some((1 << 41) + 7 * (1 << 38)));
        assert!(unzstd(b"\x28\xb5\x2f\xfd\0\xff\x01\0\0", &mut out).is_err());
        let huge = b"\x28\xb5\x2f\xfd\xe0\0\0\0\0\0\0\0\x10\x01\0\0";
        assert_eq!(zstd_window(huge), Some(1 << 60));
        assert!(unzstd(huge, &mut out).is_err());
        assert!(unzlib(b"\x78\x9c\x01", &mut out).is_err());
        let packed = zlib(&samples()[1], 9).unwrap();
        assert!(unzlib(&packed, &mut out[..65535]).is_err(), "it holds more than there is room for");
    }
}

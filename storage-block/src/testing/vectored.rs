//! Requests of several buffers, and what backends say of themselves.
#![allow(unsafe_code, reason = "memory that others may change is told by its address")]

use super::{Random, compare};
use crate::{Disk, ErrorKind, Extent, IoBuf, IoBufMut};

/// Buffers of any number and length, empty ones among them.
pub(super) fn shapes(disk: &Disk) {
    let mut oracle = vec![0; disk.size() as usize];
    let mut random = Random(3);
    for round in 0..150 {
        let lens: Vec<usize> = (0..random.below(7))
            .map(|_| [0, 1, 511, 512, 4096, 4097, 65536, 70_001][random.below(8) as usize])
            .collect();
        let len: usize = lens.iter().sum();
        let align = [1, 512, 4096][random.below(3) as usize];
        let offset = random.below((oracle.len() - len) as u64 + 1) / align * align;
        let range = offset as usize..offset as usize + len;
        let mut parts: Vec<Vec<u8>> =
            lens.iter().map(|len| (0..*len).map(|_| random.below(255) as u8 + 1).collect()).collect();
        if round % 2 == 0 {
            oracle[range].copy_from_slice(&parts.concat());
            let mut bufs: Vec<_> = parts.iter().map(|part| source(part, round)).collect();
            disk.write_vectored_at(&mut bufs, offset).expect("a write");
        } else {
            let mut bufs: Vec<_> = parts.iter_mut().map(|part| target(part, round)).collect();
            disk.read_vectored_at(&mut bufs, offset).expect("a read");
            assert!(parts.concat() == oracle[range], "a read of {lens:?} at {offset} finds other bytes");
        }
    }
    compare(disk, &oracle, "after vectored writes");
}

/// A slice, or the same as if others could change it.
fn source(part: &[u8], round: u64) -> IoBuf<'_> {
    match round % 4 {
        0 => IoBuf::new(part),
        // SAFETY: the slice is borrowed for as long.
        _ => unsafe { IoBuf::from_raw(part.as_ptr(), part.len()) },
    }
}

fn target(part: &mut [u8], round: u64) -> IoBufMut<'_> {
    match round % 4 {
        1 => IoBufMut::new(part),
        // SAFETY: the slice is borrowed mutably for as long.
        _ => unsafe { IoBufMut::from_raw(part.as_mut_ptr(), part.len()) },
    }
}

/// Buffers that leave the disk together, though neither does alone, or that have more bytes than a number can
/// say.
pub(super) fn bounds(disk: &Disk) {
    let size = disk.size();
    let (first, second) = ([1; 512], [2; 1]);
    let kind = |result: crate::Result<()>| result.map_err(|error| error.kind());
    let out = Err(ErrorKind::OutOfBounds);
    let write = |offset| kind(disk.write_vectored_at(&mut [IoBuf::new(&first), IoBuf::new(&second)], offset));
    let (mut first, mut second) = ([1; 512], [2; 1]);
    let mut read = |offset| {
        kind(disk.read_vectored_at(&mut [IoBufMut::new(&mut first), IoBufMut::new(&mut second)], offset))
    };
    for offset in [size - 512, size - 1, size, u64::MAX - 511, u64::MAX] {
        assert_eq!((write(offset), read(offset)), (out, out), "513 bytes at {offset}");
    }
    // SAFETY: so much memory there is nowhere, and it is refused before anybody looks at it.
    let endless = || unsafe { IoBuf::from_raw(std::ptr::dangling(), usize::MAX) };
    assert_eq!(kind(disk.write_vectored_at(&mut [endless(), endless(), endless()], 0)), out);
    assert_eq!(kind(disk.write_vectored_at(&mut [], size)), Ok(()));
    assert_eq!(kind(disk.write_vectored_at(&mut [], size + 1)), out);
    super::zeroes(disk, "after requests that were refused");
}

/// What a disk says of itself hangs together, and its extents cover it.
pub(super) fn capabilities(disk: &Disk) {
    let found = disk.capabilities();
    let (logical, physical) = (found.logical_block, found.physical_block);
    assert!(logical.is_power_of_two() && logical >= 512, "a logical block of {logical} bytes");
    assert!(physical.is_power_of_two() && physical >= logical, "a physical block of {physical} bytes");
    assert!(found.max_request >= u64::from(physical), "a longest request of {} bytes", found.max_request);
    let mut at = 0;
    while at < disk.size() {
        let wanted = disk.size() - at;
        let (Extent::File { len, .. } | Extent::Zeroes { len } | Extent::Backend { len }) =
            disk.backend.extent(at, wanted);
        assert!((1..=wanted).contains(&len), "an extent of {len} bytes at {at}, where {wanted} are left");
        at += len;
    }
}

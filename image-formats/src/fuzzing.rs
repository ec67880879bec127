//! What the fuzz targets run, and the tests over the corpus. No part of the interface.

use std::fs::File;
use std::io::Write;

use rustix::fs::MemfdFlags;
use storage_block::Disk;

use crate::source::Source;
use crate::{Format, OpenOptions};

/// The largest disk that is opened: what one packed cluster can hold.
const MAX_SIZE: u64 = 64 << 20;
/// How many bytes of a disk are read.
const MAX_READ: u64 = 8 << 20;

fn open(bytes: &[u8], format: Format) -> Option<Disk> {
    let mut file = File::from(rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    let source = Source::from_file(file).unwrap();
    OpenOptions::new().max_size(MAX_SIZE).open_source(source, format, None).ok()
}

/// Reads an image: its holes are zeroes, it ends where it says, and a second look finds the same.
fn read(bytes: &[u8], format: Format) {
    let Some(disk) = open(bytes, format) else { return };
    let size = disk.size();
    assert!(size <= MAX_SIZE && disk.read_only());
    let (mut at, mut left) = (0, MAX_READ);
    while at < size && left > 0 {
        let Ok(found) = disk.next_data(at) else { return };
        let found = found.unwrap_or(size..size);
        assert!(at <= found.start && found.start <= found.end && found.end <= size);
        check_hole(&disk, at, found.start);
        let len = (found.end - found.start).min(left).min(1 << 20);
        let mut first = vec![0xee; len as usize];
        if disk.read_at(&mut first, found.start).is_ok() {
            let mut second = vec![0xdd; first.len()];
            let (a, b) = second.split_at_mut(first.len() / 3);
            disk.read_at(a, found.start).unwrap();
            disk.read_at(b, found.start + a.len() as u64).unwrap();
            assert!(first == second, "a second look differs");
        }
        at = found.start + len.max(1);
        left -= len.max(1 << 10).min(left);
    }
}

fn check_hole(disk: &Disk, start: u64, end: u64) {
    let mut buf = vec![0xee; (end - start).min(64 << 10) as usize];
    for at in [start, end - buf.len() as u64] {
        if disk.read_at(&mut buf, at).is_ok() {
            assert!(buf.iter().all(|byte| *byte == 0), "the hole at {at} is none");
        }
    }
}

/// A qcow2 image.
pub fn qcow2_image(bytes: &[u8]) {
    read(bytes, Format::Qcow2);
}

/// A VMDK image: a descriptor or an extent.
pub fn vmdk_image(bytes: &[u8]) {
    read(bytes, Format::Vmdk);
}

/// A file of any format: what it is said to be can be opened or is refused, as nothing else.
pub fn image_format(bytes: &[u8]) {
    let head = &bytes[..bytes.len().min(512)];
    if let Ok(format) = Format::of(head) {
        assert_eq!(Format::of(bytes).unwrap(), format, "the first sector tells it");
        read(bytes, format);
        for other in [Format::Qcow2, Format::Vmdk] {
            assert!(other == format || open(bytes, other).is_none(), "it is {format} and {other}");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_target_bears_the_corpus() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        let mut run = 0;
        for dir in std::fs::read_dir(corpus).unwrap() {
            for file in std::fs::read_dir(dir.unwrap().path()).unwrap() {
                let bytes = std::fs::read(file.unwrap().path()).unwrap();
                for target in [super::qcow2_image, super::vmdk_image, super::image_format] {
                    target(&bytes);
                    run += 1;
                }
            }
        }
        assert!(run > 50, "the corpus is not there");
    }
}

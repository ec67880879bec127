//! A part of a disk as a reader.

use std::io::{self, Read, Seek, SeekFrom};

use storage_block::Disk;

/// How much is fetched at once for the sake of small reads: partition entries and group
/// descriptors are read one by one and lie side by side.
const CACHE: u64 = 64 << 10;

/// The bytes `start..start + len` of a disk. Offsets are relative to `start`; nothing outside can
/// be read.
#[derive(Debug)]
pub(crate) struct Window {
    disk: Disk,
    start: u64,
    len: u64,
    position: u64,
    cache: Vec<u8>,
    cache_offset: u64,
}

impl Window {
    /// The part of `disk` from `start`, at most `len` bytes; what would lie beyond the end of the
    /// disk is not part of it.
    pub(crate) fn new(disk: &Disk, start: u64, len: u64) -> Self {
        let start = start.min(disk.size());
        let len = len.min(disk.size() - start);
        Self { disk: disk.clone(), start, len, position: 0, cache: Vec::new(), cache_offset: 0 }
    }

    pub(crate) fn whole(disk: &Disk) -> Self {
        Self::new(disk, 0, disk.size())
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` with the bytes at `offset`.
    pub(crate) fn read_exact_at(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            let message = format!("{len} bytes at offset {offset} leave a partition of {} bytes", self.len);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        if len >= CACHE {
            return self.disk.read_at(buf, self.start + offset).map_err(io::Error::other);
        }
        let mut done = 0;
        while done < buf.len() {
            let cached = self.cached(offset + done as u64)?;
            let n = cached.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&cached[..n]);
            done += n;
        }
        Ok(())
    }

    /// What the cache holds from `offset`, which lies within the window; never empty.
    fn cached(&mut self, offset: u64) -> io::Result<&[u8]> {
        let first = offset - offset % CACHE;
        if self.cache.is_empty() || self.cache_offset != first {
            let mut cache = std::mem::take(&mut self.cache);
            cache.resize(CACHE.min(self.len - first) as usize, 0);
            self.disk.read_at(&mut cache, self.start + first).map_err(io::Error::other)?;
            self.cache = cache;
            self.cache_offset = first;
        }
        Ok(&self.cache[(offset - first) as usize..])
    }
}

impl Read for Window {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.len.saturating_sub(self.position);
        let n = left.min(buf.len() as u64) as usize;
        self.read_exact_at(&mut buf[..n], self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use storage_block::MemoryDisk;

    use super::*;

    #[test]
    fn reads_what_lies_there() {
        let bytes: Vec<u8> = (0..512 * 1024u32).map(|i| (i / 3) as u8).collect();
        let disk = MemoryDisk::from_vec(bytes.clone()).unwrap().into_disk();
        let mut window = Window::new(&disk, 1000, 300_000);
        let bytes = &bytes[1000..301_000];
        for (offset, len) in [(0, 1), (65_530, 12), (65_536, 65_536), (10, 200_000), (299_999, 1), (7, 0)] {
            let mut buf = vec![0; len];
            window.read_exact_at(&mut buf, offset as u64).unwrap();
            assert_eq!(buf, &bytes[offset..offset + len], "{len} at {offset}");
        }
        for (offset, len) in [(300_000, 1), (299_999, 2), (u64::MAX, 1)] {
            assert!(window.read_exact_at(&mut vec![0; len], offset).is_err(), "{len} at {offset}");
        }
    }

    #[test]
    fn never_leaves_the_disk() {
        let disk = MemoryDisk::new(4096).unwrap().into_disk();
        for (start, len, expected) in
            [(0, u64::MAX, 4096), (4095, 2, 1), (9000, 5, 0), (u64::MAX, u64::MAX, 0)]
        {
            let mut window = Window::new(&disk, start, len);
            assert_eq!(window.len(), expected);
            let mut all = Vec::new();
            window.read_to_end(&mut all).unwrap();
            assert_eq!(all.len() as u64, expected);
        }
    }
}

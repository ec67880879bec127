//! An initial RAM file system under construction: a "newc" cpio archive, equal for equal content.

use std::io::Write as _;

use cpio::newc::{self, Builder, ModeFileType};

use crate::error::Context as _;
use crate::{Error, ErrorKind, Result};

/// A cpio archive in memory; paths are relative to its root, parents come before children.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn dir(&mut self, path: &str) -> Result<()> {
        self.entry(path, ModeFileType::Directory, 0o755, b"")
    }

    pub(crate) fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.entry(path, ModeFileType::Regular, 0o644, content)
    }

    pub(crate) fn program(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.entry(path, ModeFileType::Regular, 0o755, content)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, ModeFileType::Symlink, 0o777, target.as_bytes())
    }

    /// The finished archive.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        newc::trailer(self.bytes).context(|| "cannot end a cpio archive".to_owned())
    }

    fn entry(&mut self, path: &str, kind: ModeFileType, mode: u32, content: &[u8]) -> Result<()> {
        let context = || format!("cannot put {path} into a cpio archive");
        let too_large =
            |_| Error::new(ErrorKind::InvalidParameter, format!("{path} is too large for an initrd"));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        self.entries += 1;
        let header = Builder::new(path).ino(self.entries).nlink(1).mode(mode).set_mode_file_type(kind);
        let mut writer = header.write(&mut self.bytes, size);
        writer.write_all(content).context(context)?;
        writer.finish().context(context)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn entries_come_back_as_they_were_put_in() {
        let mut archive = Archive::default();
        archive.dir("bin").unwrap();
        archive.program("bin/busybox", b"\x7fELF").unwrap();
        archive.symlink("bin/sh", "busybox").unwrap();
        archive.file("order", b"a\nb\n").unwrap();
        let bytes = archive.finish().unwrap();

        let mut rest = &bytes[..];
        for (name, mode, content) in [
            ("bin", 0o040_755, &b""[..]),
            ("bin/busybox", 0o100_755, b"\x7fELF"),
            ("bin/sh", 0o120_777, b"busybox"),
            ("order", 0o100_644, b"a\nb\n"),
        ] {
            let mut reader = newc::Reader::new(rest).unwrap();
            assert_eq!((reader.entry().name(), reader.entry().mode()), (name, mode));
            assert_eq!((reader.entry().uid(), reader.entry().mtime()), (0, 0));
            let mut found = Vec::new();
            reader.read_to_end(&mut found).unwrap();
            assert_eq!(found, content, "{name}");
            rest = reader.finish().unwrap();
        }
        assert!(newc::Reader::new(rest).unwrap().entry().is_trailer());
    }
}

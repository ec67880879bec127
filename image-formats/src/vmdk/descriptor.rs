//! The text that describes a VMDK image: what kind it is, and what its disk is put together of.

use crate::error::{corrupt, unsupported};
use crate::source::Source;
use crate::{Error, ErrorKind, Result};

use super::SECTOR;

const FIRST_LINE: &str = "# Disk DescriptorFile";
/// The longest text, and the most extents: 2 TiB in files of 2 GiB, each of which stays open.
pub(super) const MAX_LEN: u64 = 256 << 10;
const MAX_EXTENTS: usize = 1024;
/// The id of a parent that is none.
const NO_PARENT: &str = "ffffffff";

/// Where a part of the disk lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Zeroes,
    /// Byte for byte, from this sector of a file.
    Flat(String, u64),
    /// In grains of a file.
    Sparse(String),
}

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) sectors: u64,
    pub(super) place: Place,
}

/// A descriptor of a disk that stands for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) parts: Vec<Part>,
    sectors: u64,
}

impl Descriptor {
    /// Whether a file that begins so is a descriptor.
    pub(super) fn is_one(head: &[u8]) -> bool {
        head.get(..FIRST_LINE.len()).is_some_and(|line| line.eq_ignore_ascii_case(FIRST_LINE.as_bytes()))
    }

    /// Reads a file that is one.
    pub(super) fn parse(source: &Source) -> Result<Self> {
        if source.len() > MAX_LEN {
            return Err(Error::new(ErrorKind::TooLarge, "the VMDK descriptor is too long"));
        }
        Self::parse_text(&source.head(MAX_LEN as usize)?)
    }

    /// Reads the text, which may be followed by zeroes.
    pub(super) fn parse_text(text: &[u8]) -> Result<Self> {
        if !Self::is_one(text) {
            return Err(corrupt("the VMDK image has no descriptor"));
        }
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        let mut parts = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some((key, value)) = key_value(line) {
                check_value(&key, value)?;
            } else {
                parts.push(part(line)?);
            }
            if parts.len() > MAX_EXTENTS {
                return Err(Error::new(ErrorKind::TooLarge, "the VMDK image has too many extents"));
            }
        }
        let sectors = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.sectors));
        let sectors = sectors.filter(|sectors| *sectors <= u64::MAX / SECTOR);
        let sectors = sectors.ok_or_else(|| corrupt("the disk in the VMDK image has no possible size"))?;
        if parts.is_empty() {
            return Err(corrupt("the VMDK descriptor has no extent"));
        }
        Ok(Self { parts, sectors })
    }

    pub(super) fn size(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Checks that the disk is the one of `size` bytes in the file that the descriptor was found in.
    pub(super) fn check_alone(&self, size: u64) -> Result<()> {
        match &self.parts[..] {
            [Part { place: Place::Sparse(_), .. }] if self.size() == size => Ok(()),
            [_] => Err(corrupt("the VMDK descriptor does not describe the extent that it lies in")),
            _ => {
                Err(Error::new(ErrorKind::OtherFile, "the VMDK image has a part of its disk in another file"))
            }
        }
    }
}

/// Splits `key = "value"`. An extent's line has an equals sign at most within its file's name.
fn key_value(line: &str) -> Option<(String, &str)> {
    let (key, value) = line.split_once('=')?;
    let key = key.trim();
    let is_key = !key.is_empty() && !key.contains(|c: char| c.is_whitespace() || c == '"');
    is_key.then(|| (key.to_ascii_lowercase(), value.trim().trim_matches('"')))
}

fn check_value(key: &str, value: &str) -> Result<()> {
    match key {
        "parentcid" if !value.eq_ignore_ascii_case(NO_PARENT) => {
            Err(Error::new(ErrorKind::OtherFile, "the VMDK image has a parent"))
        }
        "parentfilenamehint" => Err(Error::new(ErrorKind::OtherFile, "the VMDK image names a parent")),
        _ if key.starts_with("encryption.") => {
            Err(Error::new(ErrorKind::Encrypted, "the VMDK image is encrypted"))
        }
        _ => Ok(()),
    }
}

/// Reads an extent's line: access, sectors, kind, and where the kind has one, a file's name and a sector.
fn part(line: &str) -> Result<Part> {
    let bad = || corrupt("the VMDK descriptor has a line that says nothing");
    let mut fields = line.splitn(4, char::is_whitespace);
    let access = fields.next().unwrap_or_default();
    if !matches!(access, "RW" | "RDONLY" | "NOACCESS") {
        return Err(bad());
    }
    if access == "NOACCESS" {
        return Err(unsupported("the VMDK image has an extent that may not be read"));
    }
    let sectors = fields.next().and_then(|field| field.parse().ok()).ok_or_else(bad)?;
    let kind = fields.next().unwrap_or_default();
    if kind == "ZERO" {
        return Ok(Part { sectors, place: Place::Zeroes });
    }
    let rest = fields.next().unwrap_or_default().trim_start();
    let (name, offset) = rest.strip_prefix('"').and_then(|rest| rest.rsplit_once('"')).ok_or_else(bad)?;
    let place = match kind {
        "FLAT" | "VMFS" => {
            let offset = offset.split_whitespace().next().map_or(Ok(0), str::parse);
            Place::Flat(name.to_owned(), offset.map_err(|_| bad())?)
        }
        "SPARSE" => Place::Sparse(name.to_owned()),
        _ => return Err(unsupported(format!("the VMDK image has an extent of the kind {kind:.16}"))),
    };
    Ok(Part { sectors, place })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Descriptor, ErrorKind> {
        let text = format!("{FIRST_LINE}\nversion=1\nCID=fffffffe\n{body}\n\0\0rest");
        Descriptor::parse_text(text.as_bytes()).map_err(|e| e.kind())
    }

    #[test]
    fn reads_extents() {
        let flat = |name: &str, at| Place::Flat(name.to_owned(), at);
        for (line, sectors, place) in [
            ("RW 4192256 SPARSE \"a b-s001.vmdk\"", 4_192_256, Place::Sparse("a b-s001.vmdk".to_owned())),
            ("RDONLY 8 FLAT \"x=1.vmdk\" 77", 8, flat("x=1.vmdk", 77)),
            ("RW 8 VMFS \"x-flat.vmdk\"", 8, flat("x-flat.vmdk", 0)),
            ("RW 8 FLAT \"a\"b\" 1", 8, flat("a\"b", 1)),
            ("RW 63 ZERO", 63, Place::Zeroes),
        ] {
            let found = parse(line).unwrap();
            assert_eq!(found.parts, [Part { sectors, place }], "{line}");
            assert_eq!(found.size(), sectors * 512);
        }
        let windows = "parentCID=FFFFFFFF\r\nRW 1 ZERO\r\nRW 2 ZERO\r\nddb.adapterType = \"ide\"\r";
        assert_eq!(parse(windows).unwrap().size(), 3 * 512);
    }

    #[test]
    fn refuses_what_is_more_or_less_than_an_image() {
        let many = "RW 1 ZERO\n".repeat(1025);
        for (body, kind) in [
            ("", ErrorKind::Corrupt),
            ("RW x ZERO", ErrorKind::Corrupt),
            ("RW 1", ErrorKind::Corrupt),
            ("RW 8 FLAT", ErrorKind::Corrupt),
            ("RW 8 FLAT \"x", ErrorKind::Corrupt),
            ("RW 8 FLAT \"x\" y", ErrorKind::Corrupt),
            ("RX 8 ZERO", ErrorKind::Corrupt),
            ("NOACCESS 8 FLAT \"x\"", ErrorKind::Unsupported),
            ("RW 8 VMFSSPARSE \"x\"", ErrorKind::Unsupported),
            ("RW 8 SESPARSE \"x\"", ErrorKind::Unsupported),
            ("RW 18446744073709551615 ZERO", ErrorKind::Corrupt),
            ("RW 9223372036854775807 ZERO\nRW 9223372036854775807 ZERO", ErrorKind::Corrupt),
            ("parentCID=12345678\nRW 8 ZERO", ErrorKind::OtherFile),
            ("parentFileNameHint=\"/etc/shadow\"\nRW 8 ZERO", ErrorKind::OtherFile),
            ("encryption.keySafe = \"vmware:key\"\nRW 8 ZERO", ErrorKind::Encrypted),
            (many.as_str(), ErrorKind::TooLarge),
        ] {
            assert_eq!(parse(body), Err(kind), "{body:.60}");
        }
    }
}

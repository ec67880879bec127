//! The name of a new volume's log, which says what its header would.

use ami_core::Digest;

use super::{BLOCK, MAX_SIZE, Wrong};

/// What all such names begin with, of whatever version.
pub(crate) const LOG_NAME: &str = "log-";
const VERSION: &str = "1";
/// What stands where there is no snapshot.
const NONE: &str = "none";

/// The name of the log of a volume of this size that begins as this snapshot.
pub(crate) fn log_name(size: u64, base: Option<&Digest>) -> String {
    let base = base.map_or_else(|| NONE.to_owned(), Digest::to_hex);
    let said = format!("{LOG_NAME}{VERSION}-{size:x}-{base}");
    let crc = crc32c::crc32c(said.as_bytes());
    format!("{said}-{crc:08x}")
}

pub(crate) fn parse_log_name(name: &str) -> Result<(u64, Option<Digest>), Wrong> {
    let Some(said) = name.strip_prefix(LOG_NAME) else {
        return Err("it is empty, and its name is not that of a new log".to_owned());
    };
    let parts: Vec<&str> = said.split('-').collect();
    let [VERSION, size, base, _] = parts[..] else {
        return Err(format!("its name is not one of version {VERSION}"));
    };
    let size = u64::from_str_radix(size, 16).ok();
    let base = match base {
        NONE => Some(None),
        hex => format!("{}{hex}", Digest::PREFIX).parse().ok().map(Some),
    };
    match (size, base) {
        // There is one way to write a name, and the checksum is in it.
        (Some(size), Some(base)) if log_name(size, base.as_ref()) == name => {
            if size % BLOCK != 0 || size > MAX_SIZE {
                return Err(format!("its name speaks of {size} bytes"));
            }
            Ok((size, base))
        }
        _ => Err("its name has been changed".to_owned()),
    }
}

/// Whether it may be such a name of a version that is not known here, of which no more is known than its number.
pub(crate) fn is_name_of_other_version(name: &str) -> bool {
    let version =
        name.strip_prefix(LOG_NAME).and_then(|said| said.split_once('-')).map(|(version, _)| version);
    // Other files are called after years.
    version.is_some_and(|version| version != VERSION && version.len() < 3 && version.parse::<u8>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These are out there for ever.
    #[test]
    fn names_say_size_and_snapshot() {
        let base = Digest::from_bytes([0xab; 32]);
        for (size, base, name) in [
            (1 << 30, None, "log-1-40000000-none-"),
            (MAX_SIZE, Some(base), &format!("log-1-400000000000-{}-", "ab".repeat(32))),
        ] {
            let made = log_name(size, base.as_ref());
            assert_eq!((&made[..name.len()], made.len()), (name, name.len() + 8));
            assert!(made.len() < 144, "some file systems have no room for longer names");
            assert_eq!(parse_log_name(&made), Ok((size, base)));
        }
        assert_eq!(log_name(4096, None), "log-1-1000-none-5a4ce2d1");
    }

    #[test]
    fn other_names_are_refused() {
        let name = log_name(4096, None);
        for at in 0..name.len() {
            for change in [1, 2, 0x10, 0x20] {
                let mut bytes = name.clone().into_bytes();
                bytes[at] ^= change;
                let changed = String::from_utf8(bytes).unwrap();
                assert!(parse_log_name(&changed).is_err(), "{changed}");
            }
            assert!(parse_log_name(&name[..at]).is_err());
        }
        for (size, says) in [(512, "512 bytes"), (MAX_SIZE + 4096, "bytes")] {
            assert!(parse_log_name(&log_name(size, None)).unwrap_err().contains(says));
        }
        assert!(parse_log_name(&name.replace("log-1", "log-2")).unwrap_err().contains("version 1"));
        assert!(parse_log_name("log").is_err());
        for (name, other) in [
            (name.replace("log-1", "log-2"), true),
            (name.clone(), false),
            (name.replace("1000", "2000"), false),
            ("log-2026-11-30.txt".to_owned(), false),
            ("log-rotate".to_owned(), false),
            ("log".to_owned(), false),
        ] {
            assert_eq!(is_name_of_other_version(&name), other, "{name}");
        }
    }
}

//! The distribution of the host, whose packages some images are made of.

use std::fs;

use ami_core::OperatingSystem;

use crate::{Error, ErrorKind, Result};

/// Where os-release(5) has the description of a system.
const OS_RELEASE: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

/// The host's distribution and its version, as `ID` and `VERSION_ID` of os-release(5) give them.
pub(crate) fn of_host() -> Result<OperatingSystem> {
    let text = OS_RELEASE.iter().find_map(|path| fs::read_to_string(path).ok());
    text.as_deref().and_then(parse).ok_or_else(|| {
        let places = OS_RELEASE.join(" and ");
        let what = format!("neither of {places} says which distribution and version this is");
        Error::new(ErrorKind::UnsupportedHost, what)
    })
}

fn parse(text: &str) -> Option<OperatingSystem> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        let value = value.trim().trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| value.to_owned())
    };
    // Debian's testing has a name and no number.
    Some(OperatingSystem::linux(field("ID")?, field("VERSION_ID").or_else(|| field("VERSION_CODENAME"))?))
}

/// The `os-release` of a minimal guest that is made of this distribution's packages.
pub(crate) fn os_release(of: &OperatingSystem) -> String {
    let (id, version) = (of.name(), of.version());
    format!("PRETTY_NAME=\"AMI quick start\"\nNAME=\"AMI quick start\"\nID={id}\nVERSION_ID=\"{version}\"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_os_release() {
        for (text, expected) in [
            (
                "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"13\"\nVERSION_CODENAME=trixie\nID=debian\n",
                "debian 13",
            ),
            ("ID_LIKE=debian\nID=ubuntu\nVERSION_ID='24.04'\n", "ubuntu 24.04"),
            ("ID=debian\nVERSION_CODENAME=forky\n", "debian forky"),
            ("ID=debian\n", ""),
            ("VERSION_ID=13\n", ""),
            ("", ""),
        ] {
            let parsed = parse(text);
            let said = parsed.as_ref().map(|d| format!("{} {}", d.name(), d.version())).unwrap_or_default();
            assert_eq!(said, expected, "{text}");
            if let Some(distribution) = parsed {
                assert_eq!(parse(&os_release(&distribution)), Some(distribution));
            }
        }
    }
}

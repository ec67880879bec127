//! The distribution that the guests' packages are of: the host's own.

use std::fs;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// Where os-release(5) has the description of a system.
const OS_RELEASE: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

/// A distribution and its version, as `ID` and `VERSION_ID` of os-release(5) give them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Distribution {
    pub(crate) id: String,
    pub(crate) version: String,
}

impl Distribution {
    pub(crate) fn of_host() -> anyhow::Result<Self> {
        let text = OS_RELEASE.iter().find_map(|path| fs::read_to_string(path).ok());
        text.as_deref().and_then(Self::parse).with_context(|| {
            format!("neither of {} says which distribution and version this is", OS_RELEASE.join(" and "))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            let value = value.trim().trim_matches(['"', '\'']);
            (!value.is_empty()).then(|| value.to_owned())
        };
        // Debian's testing has a name and no number.
        Some(Self { id: field("ID")?, version: field("VERSION_ID").or_else(|| field("VERSION_CODENAME"))? })
    }

    /// The guest's own `os-release`.
    pub(crate) fn os_release(&self) -> String {
        let Self { id, version } = self;
        format!(
            "PRETTY_NAME=\"AMI quick start\"\nNAME=\"AMI quick start\"\nID={id}\nVERSION_ID=\"{version}\"\n"
        )
    }
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
            let parsed = Distribution::parse(text);
            let said = parsed.as_ref().map(|d| format!("{} {}", d.id, d.version)).unwrap_or_default();
            assert_eq!(said, expected, "{text}");
            if let Some(distribution) = parsed {
                assert_eq!(Distribution::parse(&distribution.os_release()), Some(distribution));
            }
        }
    }
}

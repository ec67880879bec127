//! Logging in to an instance: where, as whom, and by which keys it is known.

use std::fmt::Write as _;
use std::net::SocketAddr;

use ssh_key::PublicKey;

use crate::{Error, ErrorKind, Result};

/// Between these cloud-init writes a machine's host keys on its console, when it has made them.
const BEGIN: &str = "-----BEGIN SSH HOST KEY KEYS-----";
const END: &str = "-----END SSH HOST KEY KEYS-----";

/// The most keys of a machine, whose console may say anything.
const MOST_KEYS: usize = 16;

/// What a user has to know to log in to an instance: [`Network::ssh`](crate::Network::ssh).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SshAccess {
    /// Where it is reached on the host.
    pub at: SocketAddr,
    /// As whom.
    pub user: String,
    /// The keys by which it is known, as OpenSSH writes them, without comments.
    pub host_keys: Vec<String>,
}

impl SshAccess {
    pub(crate) fn new(at: SocketAddr, user: &str, console: &[u8]) -> Result<Self> {
        // What looks like an option is none.
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if user.is_empty() || user.starts_with('-') || !user.chars().all(is_name) {
            return Err(Error::new(ErrorKind::InvalidParameter, format!("{user:?} is no user's name")));
        }
        let host_keys = host_keys(console);
        if host_keys.is_empty() {
            let what = "the console does not show the host keys, or not yet";
            return Err(Error::new(ErrorKind::HostKeysUnknown, what));
        }
        Ok(Self { at, user: user.to_owned(), host_keys })
    }

    /// The lines of a `known_hosts` file, so that `ssh` speaks with this machine and with no other.
    pub fn known_hosts(&self) -> String {
        self.host_keys.iter().fold(String::new(), |mut text, key| {
            // Into a string nothing fails.
            let _ = writeln!(text, "[{}]:{} {key}", self.at.ip(), self.at.port());
            text
        })
    }

    /// The arguments of OpenSSH's `ssh` that say where and as whom.
    ///
    /// ```no_run
    /// # fn log_in(access: network_vpc::SshAccess) -> std::io::Result<()> {
    /// std::fs::write("known_hosts", access.known_hosts())?;
    /// let mut ssh = std::process::Command::new("ssh");
    /// ssh.args(["-o", "UserKnownHostsFile=known_hosts", "-o", "StrictHostKeyChecking=yes", "-i", "identity"]);
    /// ssh.args(access.destination()).arg("uptime").status()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn destination(&self) -> [String; 3] {
        let port = self.at.port().to_string();
        ["-p".to_owned(), port, format!("{}@{}", self.user, self.at.ip())]
    }
}

/// The keys that a console has shown last, as OpenSSH writes them.
pub(crate) fn host_keys(console: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(console);
    let Some((before, _)) = text.rsplit_once(END) else { return Vec::new() };
    let Some((_, keys)) = before.rsplit_once(BEGIN) else { return Vec::new() };
    let keys = keys.lines().filter_map(|line| PublicKey::from_openssh(line.trim()).ok());
    let plain = keys.filter_map(|mut key| {
        key.set_comment("");
        key.to_openssh().ok().map(|text| text.trim_end().to_owned())
    });
    plain.take(MOST_KEYS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    fn access(user: &str, console: &str) -> Result<SshAccess> {
        SshAccess::new("127.0.0.1:2222".parse().unwrap(), user, console.as_bytes())
    }

    #[test]
    fn keys_are_those_that_the_console_has_shown_last() {
        let shown = |keys: &str| format!("booting\r\n{BEGIN}\r\n{keys}\r\n{END}\r\n");
        let old = KEY.replace("JKl", "JKm").replace("GKJl", "GKJm");
        let console = shown(&old) + &shown(&format!("no key\r\n{KEY} root@web\r\n")) + "login: ";
        let access = access("debian", &console).unwrap();
        assert_eq!(access.host_keys, [KEY]);
        assert_eq!(access.known_hosts(), format!("[127.0.0.1]:2222 {KEY}\n"));
        assert_eq!(access.destination(), ["-p", "2222", "debian@127.0.0.1"]);
    }

    #[test]
    fn without_keys_or_a_name_there_is_no_way_in() {
        let whole = format!("{BEGIN}\n{KEY}\n{END}\n");
        assert!(access("debian", &whole).is_ok());
        for (user, console, kind) in [
            ("debian", String::new(), ErrorKind::HostKeysUnknown),
            ("debian", format!("{BEGIN}\n{KEY}\n"), ErrorKind::HostKeysUnknown),
            ("debian", format!("{KEY}\n{END}\n"), ErrorKind::HostKeysUnknown),
            ("debian", format!("{END}\n{KEY}\n{BEGIN}\n"), ErrorKind::HostKeysUnknown),
            ("debian", format!("{BEGIN}\nssh-ed25519 AAAA\n{END}\n"), ErrorKind::HostKeysUnknown),
            ("", whole.clone(), ErrorKind::InvalidParameter),
            ("-oProxyCommand=x", whole.clone(), ErrorKind::InvalidParameter),
            ("a b", whole, ErrorKind::InvalidParameter),
        ] {
            assert_eq!(access(user, &console).unwrap_err().kind(), kind, "{user:?} {console:?}");
        }
    }
}

//! Logging in to an instance: where, as whom, and by which keys it is known.

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::modify::check_alive;
use crate::{Error, ErrorKind, Instance, Result};

/// The port of SSH servers (RFC 4251, section 4.1).
const PORT: u16 = 22;

/// What a user has to know to log in to an instance: [`Instance::ssh`].
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
    /// The lines of a `known_hosts` file, so that `ssh` speaks with this machine and with no other.
    pub fn known_hosts(&self) -> String {
        self.host_keys.iter().fold(String::new(), |mut text, key| {
            // Into a string nothing fails.
            let _ = match (self.at.ip(), self.at.port()) {
                // The one port that is not said.
                (ip, 22) => writeln!(text, "{ip} {key}"),
                (ip, port) => writeln!(text, "[{ip}]:{port} {key}"),
            };
            text
        })
    }

    /// The arguments of OpenSSH's `ssh` that say where and as whom.
    ///
    /// ```no_run
    /// # fn log_in(access: instance_core::SshAccess) -> std::io::Result<()> {
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

impl Instance {
    /// What this user has to know to log in: where on the host the instance's SSH server is reached, which the region's
    /// network sees to from now on if it did not before, and the keys by which the machine is known. Who gets in is up to
    /// its security groups and its user's key.
    ///
    /// The keys are those that its console has shown last, as cloud-init has a guest do at its first boot. They
    /// are kept with the instance, whatever its console says afterwards.
    ///
    /// ```no_run
    /// # fn log_in(server: instance_core::Instance) -> Result<(), Box<dyn std::error::Error>> {
    /// let access = server.ssh("debian")?;
    /// std::fs::write("known_hosts", access.known_hosts())?;
    /// println!("ssh -o UserKnownHostsFile=known_hosts {}", access.destination().join(" "));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`HostKeysUnknown`](ErrorKind::HostKeysUnknown) until the console has shown them,
    /// [`Unsupported`](ErrorKind::Unsupported) for an instance that is in no network, or in one without a way in,
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) if it is terminated,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for what is no user's name, or what the host refused.
    pub fn ssh(&self, user: &str) -> Result<SshAccess> {
        check_user(user)?;
        let (region, cell) = self.parts();
        let live = cell.hold(region.supervisor.reports());
        let description = &live.record.description;
        check_alive(description)?;
        let (Some(network), Some(placement)) = (&region.network, &description.network) else {
            let what = format!("{} is in no network, over which one could log in", cell.id);
            return Err(Error::new(ErrorKind::Unsupported, what));
        };
        let shown = cell.console.host_keys();
        let host_keys = if shown.is_empty() { live.record.host_keys.clone() } else { shown };
        if host_keys.is_empty() {
            let what = format!("the console of {} has not shown its host keys", cell.id);
            return Err(Error::new(ErrorKind::HostKeysUnknown, what));
        }
        let at = network.reach(placement, PORT)?;
        Ok(SshAccess { at, user: user.to_owned(), host_keys })
    }
}

/// That it is a user's name, and nothing that `ssh` would take for an option.
fn check_user(user: &str) -> Result<()> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match !user.is_empty() && !user.starts_with('-') && user.chars().all(of_name) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidParameter, format!("{user:?} is no user's name"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_ssh_is_told() {
        let host_keys = vec!["ssh-ed25519 AAAA".to_owned(), "ssh-rsa BBBB".to_owned()];
        let at = "127.0.0.1:2222".parse().unwrap();
        let access = SshAccess { at, user: "debian".to_owned(), host_keys };
        let expect = "[127.0.0.1]:2222 ssh-ed25519 AAAA\n[127.0.0.1]:2222 ssh-rsa BBBB\n";
        assert_eq!(access.known_hosts(), expect);
        assert_eq!(access.destination(), ["-p", "2222", "debian@127.0.0.1"]);
    }

    #[test]
    fn names_of_users_are_no_options() {
        for (user, expect) in [
            ("debian", true),
            ("a-b_c.1", true),
            ("", false),
            ("-oProxyCommand=x", false),
            ("a b", false),
            ("a@b", false),
        ] {
            assert_eq!(check_user(user).is_ok(), expect, "{user:?}");
        }
    }
}

//! Logging in with the system's `ssh`, to a host whose keys are known from its console.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ami_core::NetworkInterfaceId;
use anyhow::{Context as _, Result, ensure};
use network_vpc::{Network, SshAccess};

use crate::process;

/// The user that Debian's cloud-init makes.
const USER: &str = "debian";

/// What cloud-init writes behind a machine's host keys on its console.
pub(super) const KEYS_END: &str = "-----END SSH HOST KEY KEYS-----";

/// A way into an instance.
pub(super) struct Ssh {
    access: SshAccess,
    identity: PathBuf,
    known_hosts: PathBuf,
}

impl Ssh {
    /// Into an instance, with a private key, if its host key is one that the console has shown.
    pub(super) fn new(
        dir: &Path,
        network: &Network,
        interface: NetworkInterfaceId,
        private_key: &str,
        console: &[u8],
    ) -> Result<Self> {
        let identity = dir.join("identity");
        fs::write(&identity, private_key)?;
        fs::set_permissions(&identity, Permissions::from_mode(0o600))?;
        let access = network.ssh(interface, USER, console)?;
        let known_hosts = dir.join(format!("known_hosts-{}", access.at.port()));
        fs::write(&known_hosts, access.known_hosts())?;
        Ok(Self { access, identity, known_hosts })
    }

    fn command(&self, what: &str) -> Command {
        let mut ssh = process::command("ssh");
        ssh.args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=60"]);
        ssh.args(["-o", "IdentitiesOnly=yes", "-o", "GlobalKnownHostsFile=/dev/null", "-F", "none"]);
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", self.known_hosts.display()));
        ssh.arg("-i").arg(&self.identity).args(self.access.destination()).arg(what);
        ssh
    }

    /// What a command says.
    pub(super) fn run(&self, command: &str) -> Result<String> {
        process::output(&mut self.command(command))
    }

    /// A session that goes on, and says again what it is told.
    pub(super) fn echo(&self) -> Result<Echo> {
        let mut child = self.command("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut echo = Echo {
            child,
            stdin: stdin.context("no pipe to ssh")?,
            stdout: BufReader::new(stdout.context("no pipe from ssh")?),
        };
        echo.check("hello")?;
        Ok(echo)
    }
}

/// See [`Ssh::echo`].
pub(super) struct Echo {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Echo {
    /// That the session is alive.
    pub(super) fn check(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin, "{line}").context("the session has ended")?;
        let mut heard = String::new();
        self.stdout.read_line(&mut heard)?;
        ensure!(heard.trim_end() == line, "the session says {heard:?}, not {line:?}");
        Ok(())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

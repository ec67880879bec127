//! Logging in with the system's `ssh`, to a host whose keys are known from its console.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::process;

/// The user that Debian's cloud-init makes.
const USER: &str = "debian";

/// Where cloud-init writes a machine's host keys between, on its console.
const KEYS_BEGIN: &str = "-----BEGIN SSH HOST KEY KEYS-----";
pub(super) const KEYS_END: &str = "-----END SSH HOST KEY KEYS-----";

/// A way into an instance.
pub(super) struct Ssh {
    at: SocketAddr,
    identity: PathBuf,
    known_hosts: PathBuf,
}

impl Ssh {
    /// To what listens at `at`, with a private key, if its host key is one that the console has shown.
    pub(super) fn new(dir: &Path, at: SocketAddr, private_key: &str, console: &str) -> Result<Self> {
        let identity = dir.join("identity");
        fs::write(&identity, private_key)?;
        fs::set_permissions(&identity, Permissions::from_mode(0o600))?;
        let keys = console.split(KEYS_BEGIN).nth(1).and_then(|rest| rest.split(KEYS_END).next());
        let keys = keys.context("the console does not show the host's keys")?;
        let line = |key: &str| format!("[{}]:{} {}\n", at.ip(), at.port(), key.trim());
        let known: String = keys.lines().filter(|key| key.contains("AAAA")).map(line).collect();
        ensure!(!known.is_empty(), "the console shows no host key");
        let known_hosts = dir.join(format!("known_hosts-{}", at.port()));
        fs::write(&known_hosts, known)?;
        Ok(Self { at, identity, known_hosts })
    }

    fn command(&self, what: &str) -> Command {
        let mut ssh = process::command("ssh");
        ssh.args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=60"]);
        ssh.args(["-o", "IdentitiesOnly=yes", "-o", "GlobalKnownHostsFile=/dev/null", "-F", "none"]);
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", self.known_hosts.display()));
        ssh.arg("-i").arg(&self.identity).args(["-p", &self.at.port().to_string()]);
        ssh.arg(format!("{USER}@{}", self.at.ip())).arg(what);
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

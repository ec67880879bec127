//! Logging in with the system's `ssh`, to a host whose keys are known from its console.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use instance_core::{Instance, SshAccess};

use crate::process;

/// The user that Debian's cloud-init makes.
const USER: &str = "debian";

/// A way into an instance.
pub(super) struct Ssh {
    access: SshAccess,
    identity: PathBuf,
    known_hosts: PathBuf,
}

impl Ssh {
    /// Into an instance whose console has shown its host keys, with the private key in a file.
    pub(super) fn new(dir: &Path, instance: &Instance, identity: &Path) -> Result<Self> {
        let (access, identity) = (instance.ssh(USER)?, identity.to_owned());
        let known_hosts = dir.join(format!("known_hosts-{}", access.at.port()));
        fs::write(&known_hosts, access.known_hosts())?;
        Ok(Self { access, identity, known_hosts })
    }

    fn command(&self, what: &str) -> Command {
        self.command_with(&self.identity, &[], what)
    }

    fn command_with(&self, identity: &Path, options: &[&str], what: &str) -> Command {
        let mut ssh = process::command("ssh");
        ssh.args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=60"]);
        ssh.args(["-o", "IdentitiesOnly=yes", "-o", "GlobalKnownHostsFile=/dev/null", "-F", "none"]);
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", self.known_hosts.display()));
        ssh.args(options).arg("-i").arg(identity).args(self.access.destination()).arg(what);
        ssh
    }

    /// What a command says.
    pub(super) fn run(&self, command: &str) -> Result<String> {
        process::output(&mut self.command(command))
    }

    /// How it is refused who has another key; an error if they are let in.
    pub(super) fn refusal_of(&self, identity: &Path) -> Result<String> {
        refusal(&mut self.command_with(identity, &[], "true"))
    }

    /// How it is refused who has the key and comes from another address of the host's; an error if they are let in.
    pub(super) fn refusal_from(&self, address: &str) -> Result<String> {
        refusal(&mut self.command_with(&self.identity, &["-b", address], "true"))
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

/// Writes a private key into a file that nobody else reads.
pub(super) fn keep_identity(file: PathBuf, private_key: &str) -> Result<PathBuf> {
    fs::write(&file, private_key)?;
    fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    Ok(file)
}

/// What `ssh` says as it fails, as it should.
fn refusal(ssh: &mut Command) -> Result<String> {
    let output = ssh.output().context("cannot run ssh")?;
    if output.status.success() {
        bail!("one was let in who should not be");
    }
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
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

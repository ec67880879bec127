//! What the tests of the NBD server and client share: programs of others, and bytes to compare.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![allow(dead_code, reason = "no test needs all of it")]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Whether the tools are there; a test that cannot run says so, and fails under CI.
pub(crate) fn have(tools: &[&str]) -> bool {
    let missing = tools.iter().find(|tool| Command::new(tool).arg("--version").output().is_err());
    if let Some(tool) = missing {
        skip(&format!("{tool} is not installed; NBD is not tested with it"));
    }
    missing.is_none()
}

pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("SKIPPED: {why}");
}

/// What a program says that has to succeed.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let (success, text) = outcome(tool, args);
    assert!(success, "{tool} {args:?} failed: {text}");
    text
}

/// Whether a program succeeds, and what it says.
pub(crate) fn outcome(tool: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(tool).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), text.concat())
}

/// An NBD server of others, which ends with this.
pub(crate) struct Daemon(Child);

impl Daemon {
    /// Starts one on a socket that is listened on before it runs.
    pub(crate) fn start(socket: &Path, command: &[&str]) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let script = r#"export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null"#;
        let mut shell = Command::new("sh");
        shell
            .args(["-c", script, "sh"])
            .args(command)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
        Self(shell.spawn().unwrap())
    }

    /// Ends it as if its host had lost power.
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Bytes that look random, and zeroes, in turns of 256 KiB.
pub(crate) fn image(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = if at >> 18 & 1 == 0 { (state >> 24) as u8 } else { 0 };
    }
    bytes
}

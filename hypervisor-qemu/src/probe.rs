//! Finding QEMU and asking for its version.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use instance_core::machine::{MachineError, MachineErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::child::Process;

/// The program for 64-bit x86.
const PROGRAM: &str = "qemu-system-x86_64";

/// What to do where it is missing.
const INSTALL: &str = "install qemu-system-x86 (apt-get install qemu-system-x86)";

/// The first version that takes devices as JSON.
const OLDEST: (u32, u32) = (6, 2);

/// How much of what `--version` prints is read.
const MAX_OUTPUT: usize = 4096;

/// The program in the first directory of `path`, a `PATH`, that has it.
pub(crate) fn find(path: Option<&OsStr>) -> Result<PathBuf, MachineError> {
    let executable = |file: &PathBuf| {
        // Relative directories in PATH would make the answer depend on where the process is later.
        file.is_absolute()
            && file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    path.and_then(|path| std::env::split_paths(path).map(|dir| dir.join(PROGRAM)).find(executable))
        .ok_or_else(|| missing(format!("{PROGRAM} is not in PATH; {INSTALL}")))
}

/// The version of the program, at least [`OLDEST`].
pub(crate) fn version(program: &Path, deadline: Instant) -> Result<(u32, u32), MachineError> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let failed = |source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::NotFound {
            missing(format!("there is no {}; {INSTALL}", program.display()))
        } else {
            let what = format!("cannot run {}", program.display());
            MachineError::new(MachineErrorKind::Host, what).with_source(source)
        }
    };
    let mut process = Process::spawn(command, Vec::new()).map_err(failed)?;
    let output = match process.take_stdout() {
        Some(stdout) => read_until(stdout, deadline).map_err(failed)?,
        None => Vec::new(),
    };
    // `process` is dropped, which ends one that still runs.
    let text = String::from_utf8_lossy(&output);
    match parse_version(&text) {
        Some(version) if version >= OLDEST => Ok(version),
        Some((major, minor)) => {
            let (program, (at_least, least)) = (program.display(), OLDEST);
            Err(missing(format!(
                "{program} is QEMU {major}.{minor}; {at_least}.{least} is needed; {INSTALL}"
            )))
        }
        None => {
            let what = format!("{} --version does not say what QEMU says", program.display());
            Err(MachineError::new(MachineErrorKind::Host, what))
        }
    }
}

fn missing(what: String) -> MachineError {
    MachineError::new(MachineErrorKind::Missing, what)
}

/// Reads to the end, or as much as is wanted, or until `deadline`, which is an error.
fn read_until(pipe: OwnedFd, deadline: Instant) -> std::io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut buf = [0; MAX_OUTPUT];
    while output.len() < MAX_OUTPUT {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return Err(std::io::ErrorKind::TimedOut.into()),
            Ok(_) => match rustix::io::read(&pipe, &mut buf)? {
                0 => break,
                len => output.extend_from_slice(&buf[..len]),
            },
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(output)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let rest = text.trim_start().strip_prefix("QEMU emulator version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let check = |text: &str, expect| assert_eq!(parse_version(text), expect, "{text:?}");
        check("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright", Some((7, 2)));
        check("QEMU emulator version 10.0.0", Some((10, 0)));
        check("QEMU emulator version 9.0-rc1", Some((9, 0)));
        check("QEMU emulator version", None);
        check("QEMU emulator version 99999999999.1", None);
        check("", None);
    }

    #[test]
    fn a_path_without_it_says_what_to_install() {
        for path in [None, Some(""), Some("/nowhere:relative"), Some("/")] {
            let err = find(path.map(OsStr::new)).unwrap_err();
            assert_eq!(err.kind(), MachineErrorKind::Missing);
            assert!(err.to_string().contains("apt-get install qemu-system-x86"), "{err}");
        }
    }
}

//! The lab's virtual machine: a QEMU process and the ports through which it speaks.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};

use super::Lab;
use crate::guest::Artifacts;
use crate::process;

/// How much of what kernel and QEMU say is kept for an error message.
const KEPT: usize = 4096;

/// What came out of the machine.
pub(super) struct Finished {
    /// What the lab's init said.
    pub(super) status: String,
    /// The archive of the files brought back.
    pub(super) files: Vec<u8>,
    /// The end of the kernel's console and of QEMU's own messages.
    pub(super) console: String,
}

/// Boots the lab from `dir`, which holds its disk, and waits for its end. Output goes to `output` and
/// `errors` as it comes.
pub(super) fn run(
    lab: &Lab,
    artifacts: &Artifacts,
    dir: tempfile::TempDir,
    disk: &Path,
    mut output: impl Write + Send,
    mut errors: impl Write + Send,
) -> anyhow::Result<Finished> {
    let ports = Ports::listen(dir.path())?;
    let mut qemu = spawn(lab, artifacts, dir.path(), disk)?;
    let console = (qemu.stdout.take(), qemu.stderr.take());
    // Open files outlive their names: when the guest is up, nothing is left that could stay behind.
    let mut dir = Some(dir);

    thread::scope(|scope| {
        let output = scope.spawn(|| pump(&ports.output, |bytes| output.write_all(bytes)));
        let errors = scope.spawn(|| pump(&ports.errors, |bytes| errors.write_all(bytes)));
        let files = scope.spawn(|| gather(&ports.files));
        let status = scope.spawn(|| {
            let mut text = Vec::new();
            let end = pump(&ports.status, |bytes| {
                dir.take();
                text.extend_from_slice(bytes);
                Ok(())
            });
            end.map(|()| String::from_utf8_lossy(&text).into_owned())
        });
        let (kernel, emulator) = console;
        let kernel = scope.spawn(|| tail(kernel));
        let emulator = scope.spawn(|| tail(emulator));

        let ended = wait(&mut qemu, lab.deadline);
        ports.release();

        let joined = "a thread of the lab panicked";
        output.join().map_err(|_| anyhow!(joined))?.context("cannot pass on the lab's output")?;
        errors.join().map_err(|_| anyhow!(joined))?.context("cannot pass on the lab's output")?;
        let files = files.join().map_err(|_| anyhow!(joined))?.context("cannot receive the lab's files")?;
        let status = status.join().map_err(|_| anyhow!(joined))?.context("cannot receive the lab's status")?;
        let console = [kernel.join(), emulator.join()].map(Result::unwrap_or_default).concat();
        ended?;
        Ok(Finished { status, files, console })
    })
}

/// One Unix socket for each port. QEMU connects to them, so its end is their end.
struct Ports {
    output: UnixListener,
    errors: UnixListener,
    status: UnixListener,
    files: UnixListener,
}

const PORT_NAMES: [&str; 4] = ["output", "errors", "status", "files"];

impl Ports {
    fn listen(dir: &Path) -> anyhow::Result<Self> {
        let listen = |name: &str| UnixListener::bind(dir.join(name)).context("cannot make a socket for the lab");
        Ok(Self {
            output: listen("output")?,
            errors: listen("errors")?,
            status: listen("status")?,
            files: listen("files")?,
        })
    }

    /// Lets go whoever still waits for a QEMU that ended before it connected.
    fn release(&self) {
        for port in [&self.output, &self.errors, &self.status, &self.files] {
            let connected = port.local_addr().and_then(|address| UnixStream::connect_addr(&address));
            drop(connected);
        }
    }
}

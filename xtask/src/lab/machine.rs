//! The lab's virtual machine: a QEMU process and the ports through which it speaks.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::work::WorkDir;
use super::{Lab, pulse};
use crate::guest::Artifacts;
use crate::process;

/// How much of what kernel and QEMU say is kept for an error message.
const KEPT: usize = 4096;
/// How long the lab may take to come up. It takes three seconds, on a busy machine many more.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// What came out of the machine.
pub(super) struct Finished {
    /// What the lab's init said.
    pub(super) status: String,
    /// The archive of the files brought back.
    pub(super) files: Vec<u8>,
    /// The end of the kernel's console and of QEMU's own messages.
    pub(super) console: String,
    /// Why it ended.
    pub(super) end: End,
}

/// Why the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It powered off, or QEMU failed.
    Own,
    /// It was ended, for it didn't come up in [`BOOT_PATIENCE`].
    NotUp,
    /// It was ended, for the command took longer than its deadline.
    Late,
    /// It was ended, for it did nothing any more: the emulator is at fault, and not the command.
    StoodStill,
}

/// Boots the lab with `disk`, which lies in `disk_dir`, and waits for its end. What the command writes
/// goes to `output` and `errors` as it comes.
pub(super) fn run(
    lab: &Lab,
    artifacts: &Artifacts,
    (disk, disk_dir): (&Path, WorkDir),
    mut output: impl Write + Send,
    mut errors: impl Write + Send,
) -> anyhow::Result<Finished> {
    // A socket's path has to be short.
    let sockets = tempfile::Builder::new().prefix("lab-").tempdir().context("cannot make a directory")?;
    let [output_port, errors_port, status_port, files_port, pulse_port] =
        PORTS.map(|name| Port::listen(sockets.path(), name));
    let (output_port, errors_port, status_port, files_port, pulse_port) =
        (output_port?, errors_port?, status_port?, files_port?, pulse_port?);
    let mut qemu = command(lab, artifacts, disk, sockets.path()).spawn().context("cannot start QEMU")?;
    let (kernel, emulator) = (qemu.stdout.take(), qemu.stderr.take());
    // Closed by the thread that hears the lab say that it is up.
    let (up, waits_for_up) = UnixStream::pair().context("cannot make a socket")?;
    // Shut down by the thread that feels the lab's pulse when there is none.
    let (still, alive) = UnixStream::pair().context("cannot make a socket")?;
    // Open files outlive their names: once the lab is up, nothing is left that could stay behind.
    let mut until_up = Some((sockets, disk_dir, waits_for_up));

    thread::scope(|scope| {
        // The status port last: its thread removes the sockets as it ends.
        let ports = [&output_port, &errors_port, &files_port, &pulse_port, &status_port];
        let releases = ports.map(|port| port.path.clone());
        let output = scope.spawn(|| output_port.pump(|bytes| pass_on(&mut output, bytes)));
        let errors = scope.spawn(|| errors_port.pump(|bytes| pass_on(&mut errors, bytes)));
        let files = scope.spawn(|| files_port.gather());
        // Time that is counted shall not depend on what comes from outside.
        let pulse = scope.spawn(|| if lab.icount { Ok(()) } else { pulse::feel(&pulse_port, &alive) });
        let status = scope.spawn(move || {
            let mut status = Vec::new();
            status_port.pump(|bytes| {
                drop(until_up.take());
                status.extend_from_slice(bytes);
                Ok(())
            })?;
            Ok(status)
        });
        let kernel = scope.spawn(|| kernel.map(tail).unwrap_or_default());
        let emulator = scope.spawn(|| emulator.map(tail).unwrap_or_default());

        let end = wait(&mut qemu, &up, &still, lab.deadline);
        for path in releases {
            // Lets a thread go that waits for a QEMU which ended before it connected.
            drop(UnixStream::connect(path));
        }
        join(output)?;
        join(errors)?;
        join(pulse)?;
        let status = String::from_utf8_lossy(&join(status)?).into_owned();
        let files = join(files)?;
        let console = [kernel.join(), emulator.join()].map(Result::unwrap_or_default).concat();
        Ok(Finished { status, files, console, end: end? })
    })
}

/// The names of the ports, as the lab's init knows them.
const PORTS: [&str; 5] = ["output", "errors", "status", "files", "pulse"];

/// A port's host end: QEMU connects to it, and closes it when it ends.
pub(super) struct Port {
    path: PathBuf,
    pub(super) listener: UnixListener,
}

impl Port {
    pub(super) fn listen(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let path = dir.join(name);
        let listener = UnixListener::bind(&path).context("cannot make a socket for the lab")?;
        Ok(Self { path, listener })
    }

    /// Hands on all that arrives, as it arrives.
    fn pump(&self, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let (mut stream, _) = self.listener.accept()?;
        let mut buffer = [0; 16 << 10];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => to(&buffer[..length])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn gather(&self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        self.pump(|bytes| all.write_all(bytes))?;
        Ok(all)
    }
}

fn pass_on(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    match to.write_all(bytes).and_then(|()| to.flush()) {
        // Who reads no longer doesn't stop the command.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn join<T>(thread: ScopedJoinHandle<'_, io::Result<T>>) -> anyhow::Result<T> {
    let result = thread.join().map_err(|_| anyhow!("a thread of the lab panicked"))?;
    result.context("cannot listen to the lab")
}

/// The last [`KEPT`] bytes of a stream.
fn tail(mut stream: impl Read) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; KEPT];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..length]);
        kept.drain(..kept.len().saturating_sub(KEPT));
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Waits for QEMU's end, and brings it about where the lab isn't up or the command not done in time.
fn wait(
    qemu: &mut Child,
    up: &UnixStream,
    still: &UnixStream,
    deadline: Option<Duration>,
) -> anyhow::Result<End> {
    let end = await_end(qemu, up, still, deadline);
    if !matches!(end, Ok(End::Own)) {
        qemu.kill().context("cannot end QEMU")?;
    }
    qemu.wait().context("cannot wait for QEMU")?;
    end
}

fn await_end(
    qemu: &Child,
    up: &UnixStream,
    still: &UnixStream,
    deadline: Option<Duration>,
) -> anyhow::Result<End> {
    let pid = i32::try_from(qemu.id()).ok().and_then(Pid::from_raw).context("QEMU has no process id")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).context("cannot open QEMU's process")?;
    if !any_ready(&[&process, up], Some(BOOT_PATIENCE))? {
        return Ok(End::NotUp);
    }
    Ok(match any_ready(&[&process, still], deadline)? {
        false => End::Late,
        true if any_ready(&[&process], Some(Duration::ZERO))? => End::Own,
        true => End::StoodStill,
    })
}

/// Whether something happens to one of `files` within `patience`.
fn any_ready(files: &[&dyn AsFd], patience: Option<Duration>) -> anyhow::Result<bool> {
    let mut files: Vec<_> =
        files.iter().map(|file| PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN)).collect();
    let end = patience.map(|patience| Instant::now() + patience);
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut files, left.as_ref()) {
            Ok(ready) => return Ok(ready != 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for QEMU"),
        }
    }
}

fn command(lab: &Lab, artifacts: &Artifacts, disk: &Path, sockets: &Path) -> Command {
    // QEMU dies with this process, whatever ends it.
    let mut qemu = process::command("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-cpu", "max"]);
    qemu.args(["-machine", "q35,usb=off,vmport=off", "-serial", "stdio"]);
    if lab.icount {
        qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi", "-smp"]).arg(lab.cpus.to_string());
    }
    qemu.arg("-m").arg(format!("{}M", lab.memory_mib));
    qemu.arg("-kernel").arg(artifacts.vmlinuz()).arg("-initrd").arg(artifacts.lab_initrd());
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    // The disk ends with the lab, so nothing has to reach the host's disk.
    qemu.arg("-drive")
        .arg(format!("if=none,id=disk,format=raw,cache=unsafe,discard=unmap,file={}", escaped(disk)));
    qemu.args(["-device", "virtio-blk-pci,drive=disk", "-device", "virtio-serial-pci"]);
    if lab.network {
        qemu.args(["-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net"]);
    }
    for name in PORTS {
        qemu.arg("-chardev").arg(format!("socket,id={name},path={}", escaped(&sockets.join(name))));
        qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
    }
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    qemu
}

/// A path as the value of a QEMU option, where a comma is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

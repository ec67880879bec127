//! A child process that dies with its parent, whatever ends the parent.
#![expect(unsafe_code, reason = "what a child does between fork and exec is outside what Rust checks")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};

use rustix::fd::AsRawFd;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// A descriptor that a [`Process`] will have under the same number.
#[derive(Debug)]
pub(crate) struct Inherited(OwnedFd);

impl Inherited {
    /// A copy of `fd` for the child, clear of the numbers of standard input, output and error.
    pub(crate) fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self(fcntl_dupfd_cloexec(fd, 3)?))
    }

    /// Its number, here and in the child.
    pub(crate) fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// A path by which the child opens the file anew, from its beginning.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.number())
    }
}

impl AsFd for Inherited {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A running child. Dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    /// Starts `command` with the descriptors `inherited` and, beyond its standard ones, no others.
    ///
    /// The kernel kills the child when **the thread that calls this** ends: call it from one that
    /// outlives the child. It is in a process group of its own, so that no key pressed at the
    /// embedder's terminal reaches it.
    pub(crate) fn spawn(mut command: Command, inherited: Vec<Inherited>) -> io::Result<Self> {
        let parent = getpid();
        let prepare = move || prepare(parent, &inherited);
        // SAFETY: `prepare` runs in the child after fork, where another thread may have held any lock:
        // it must allocate nothing and take no lock. It makes plain system calls on values that were
        // there before the fork, and its errors are bare numbers.
        unsafe { command.pre_exec(prepare) };
        let child = command.process_group(0).spawn()?;
        // `command` goes here, and with it this process's copies of what the child inherited.
        Ok(Self(child))
    }

    /// The process id.
    pub(crate) fn pid(&self) -> io::Result<Pid> {
        i32::try_from(self.0.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The pipe from its standard error, if it has one and it was not taken before.
    pub(crate) fn take_stderr(&mut self) -> Option<OwnedFd> {
        self.0.stderr.take().map(OwnedFd::from)
    }

    /// The pipe from its standard output, if it has one and it was not taken before.
    pub(crate) fn take_stdout(&mut self) -> Option<OwnedFd> {
        self.0.stdout.take().map(OwnedFd::from)
    }

    /// Kills it; does nothing to one that has ended.
    pub(crate) fn kill(&mut self) {
        // The only failure is that it has been reaped already.
        let _ = self.0.kill();
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        self.0.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait();
    }
}

/// In the child, before it becomes the program.
fn prepare(parent: Pid, inherited: &[Inherited]) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A parent that died before the line above sends no signal any more.
    if getppid() != Some(parent) {
        return Err(io::Error::from_raw_os_error(libc::ECHILD));
    }
    // Descriptors that the embedder left open across exec are no business of the child. Kernels
    // before 5.11 refuse; then they stay, as in any other child.
    // SAFETY: marks descriptors, closes none, touches no memory.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    for fd in inherited {
        fcntl_setfd(&fd.0, FdFlags::empty())?;
    }
    Ok(())
}

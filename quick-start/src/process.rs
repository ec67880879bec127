//! Running other programs, which end when they are told to, and with the thread that waits for them.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::Context as _;
use crate::host;
use crate::progress::{Cancel, Reporter};
use crate::{Error, ErrorKind, Result};

/// What programs are told to end with, one after the other, and how long they may take to clean up then. fakeroot ends its
/// daemon, which is in no group, at an interrupt alone; what shells have in the background heeds none.
const REQUESTS: [(Signal, Duration); 2] =
    [(Signal::INT, Duration::from_secs(2)), (Signal::TERM, Duration::from_secs(10))];
/// How much of what a program complains of is shown in an error.
const SHOWN: usize = 16 << 10;

/// A command for [`run`], which is told to end when the thread that runs it does.
pub(crate) fn command(program: &str) -> Command {
    let mut command = host::command("setpriv");
    command.args(["--pdeathsig", "TERM", "--", program]);
    command
}

/// The same for fakeroot, which ends its daemon when it is interrupted: also where whoever runs this process has it ignore
/// interrupts, as shells do in the background, and its children with it.
pub(crate) fn fakeroot() -> Command {
    let (inner, mut command) = (command("fakeroot"), host::command("env"));
    command.arg("--default-signal=INT").arg(inner.get_program()).args(inner.get_args());
    command
}

/// The program that such a command runs.
fn name_of(command: &Command) -> String {
    let program = command.get_args().skip_while(|arg| *arg != "--").nth(1);
    program.unwrap_or_default().to_string_lossy().into_owned()
}

/// Runs a command to its end and returns its standard output; fails if it does.
pub(crate) fn output(command: &mut Command, reporter: &mut Reporter<'_>) -> Result<String> {
    run(command, reporter, |_, _| ())
}

/// The same, with each line of its standard error given to `line`.
pub(crate) fn run(
    command: &mut Command,
    reporter: &mut Reporter<'_>,
    mut line: impl FnMut(&mut Reporter<'_>, &str),
) -> Result<String> {
    let name = name_of(command);
    reporter.check()?;
    let cancel = reporter.cancel();
    // A group of its own, so that whatever it starts can be ended with it.
    let group = command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = group.spawn().context(|| format!("cannot run {name}"))?;
    let mut running = Running { child, ended: false };
    let said = running.listen(&cancel, |text| line(reporter, text));
    let [output, errors] = said.context(|| format!("cannot listen to {name}"))?;
    cancel.check()?;
    let status = running.wait().context(|| format!("cannot wait for {name}"))?;
    if !status.success() {
        let errors = String::from_utf8_lossy(&errors[errors.len().saturating_sub(SHOWN)..]).into_owned();
        let what = format!("{name} failed ({status}): {}", errors.trim());
        return Err(Error::new(ErrorKind::ProgramFailed, what));
    }
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// A program with all that it has started. Dropping it ends them.
struct Running {
    child: Child,
    /// Its number may be another's by now.
    ended: bool,
}

impl Running {
    /// What comes out of its standard output and error, until the last process that has them is gone.
    fn listen(&mut self, cancel: &Cancel, mut line: impl FnMut(&str)) -> io::Result<[Vec<u8>; 2]> {
        let mut output = Pipe::new(self.child.stdout.take());
        let mut errors = Pipe::new(self.child.stderr.take());
        let mut requests = REQUESTS.into_iter();
        // Until when it may go on that was told to end.
        let mut deadline: Option<Instant> = None;
        while output.file.is_some() || errors.file.is_some() {
            let for_cancel = if deadline.is_none() { PollFlags::IN } else { PollFlags::empty() };
            let fds = [output.poll_fd(cancel), errors.poll_fd(cancel), PollFd::new(cancel, for_cancel)];
            let [from_output, from_errors, cancelled] = wait(fds, deadline)?;
            if cancelled || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                // Dropping it sends the signal that nobody can ignore.
                let Some((signal, grace)) = requests.next() else { break };
                deadline = Some(Instant::now() + grace);
                self.signal(signal);
            }
            if from_output {
                output.read()?;
            }
            if from_errors {
                errors.read()?;
                errors.lines(&mut line);
            }
        }
        Ok([output.said, errors.said])
    }

    fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.ended = true;
        Ok(status)
    }

    fn signal(&self, signal: Signal) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // It fails when all of them are gone.
        let _ = group.map(|group| kill_process_group(group, signal));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.signal(Signal::KILL);
            let _ = self.wait();
        }
    }
}

/// Which of these are ready; none at the deadline.
fn wait(mut fds: [PollFd<'_>; 3], deadline: Option<Instant>) -> io::Result<[bool; 3]> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => Ok(fds.map(|fd| !fd.revents().is_empty())),
        Err(rustix::io::Errno::INTR) => Ok([false; 3]),
        Err(e) => Err(e.into()),
    }
}

/// What a program writes, and has written.
struct Pipe {
    file: Option<File>,
    said: Vec<u8>,
    /// How many bytes of it, in whole lines, were given.
    taken: usize,
}

impl Pipe {
    fn new(pipe: Option<impl Into<OwnedFd>>) -> Self {
        Self { file: pipe.map(|pipe| File::from(pipe.into())), said: Vec::new(), taken: 0 }
    }

    /// Waits for more of it, or, where there will be no more, for nothing at a descriptor that is there.
    fn poll_fd<'a>(&'a self, or: &'a Cancel) -> PollFd<'a> {
        match &self.file {
            Some(file) => PollFd::new(file, PollFlags::IN),
            None => PollFd::new(or, PollFlags::empty()),
        }
    }

    /// Takes what is there, or the end.
    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let Some(file) = &mut self.file else { return Ok(()) };
        match file.read(&mut buffer)? {
            0 => self.file = None,
            count => self.said.extend_from_slice(&buffer[..count]),
        }
        Ok(())
    }

    /// Gives whole lines that were not given before.
    fn lines(&mut self, mut line: impl FnMut(&str)) {
        while let Some(length) = self.said[self.taken..].iter().position(|byte| *byte == b'\n') {
            line(&String::from_utf8_lossy(&self.said[self.taken..self.taken + length]));
            self.taken += length + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::process::{PidfdFlags, pidfd_open};

    use super::*;
    use crate::Progress;

    fn shell(script: &str) -> Command {
        let mut shell = command("sh");
        shell.args(["-c", script]);
        shell
    }

    #[test]
    fn a_program_says_what_it_has_to_say_or_why_it_fails() {
        let mut nobody = |_: Progress| ();
        let mut reporter = Reporter::new(&mut nobody).unwrap();
        let mut lines = Vec::new();
        let script = "echo out; printf 'one\\ntwo\\n' >&2; echo more; printf unfinished >&2";
        let said = run(&mut shell(script), &mut reporter, |_, line| lines.push(line.to_owned())).unwrap();
        assert_eq!((said.as_str(), lines), ("out\nmore\n", vec!["one".to_owned(), "two".to_owned()]));

        let error = output(&mut shell("echo no such luck >&2; exit 3"), &mut reporter).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ProgramFailed);
        assert_eq!(error.to_string(), "sh failed (exit status: 3): no such luck");
        let error = output(&mut command("no-such-program"), &mut reporter).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ProgramFailed, "{error}");
    }

    #[test]
    fn a_program_that_is_cancelled_ends_with_all_that_it_has_started() {
        let mut nobody = |_: Progress| ();
        let mut reporter = Reporter::new(&mut nobody).unwrap();
        let mut ids = Vec::new();
        let script =
            "sleep 1000 & echo $! >&2; (trap '' HUP; exec sleep 1000) & echo $! >&2; echo $$ >&2; wait";
        let ended = run(&mut shell(script), &mut reporter, |reporter, id| {
            ids.push(id.to_owned());
            if ids.len() == 3 {
                reporter.cancel().set();
            }
        });
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(ids.len(), 3);
        for id in ids {
            // Those that nobody has waited for yet have no command line any more.
            let line = std::fs::read(Path::new("/proc").join(&id).join("cmdline")).unwrap_or_default();
            assert!(line.is_empty(), "{id} goes on: {}", String::from_utf8_lossy(&line));
        }
        assert_eq!(output(&mut shell("true"), &mut reporter).unwrap_err().kind(), ErrorKind::Cancelled);
    }

    /// The daemon is in no group of its caller's. Interrupts are ignored, as where this runs in the background of a shell's.
    #[test]
    fn a_cancelled_fakeroot_takes_its_daemon_with_it() {
        if !host::FAKEROOT.is_there() {
            eprintln!("SKIPPED: there is no fakeroot");
            return;
        }
        let mark = format!("QUICK_START_TEST_MARK={}", std::process::id());
        let marked = || -> Vec<_> {
            let processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap());
            let of_fakeroot = processes.filter(|process| {
                let read = |name| std::fs::read(process.path().join(name)).unwrap_or_default();
                let is_marked = read("environ").split(|byte| *byte == 0).any(|text| text == mark.as_bytes());
                is_marked && read("comm").starts_with(b"faked")
            });
            let ids = of_fakeroot.map(|process| process.file_name().to_string_lossy().parse().unwrap());
            ids.filter_map(|id| pidfd_open(Pid::from_raw(id).unwrap(), PidfdFlags::empty()).ok()).collect()
        };
        let inner = super::fakeroot();
        let mut fakeroot = Command::new("sh");
        fakeroot
            .args(["-c", "trap '' INT; exec \"$@\"", "sh"])
            .arg(inner.get_program())
            .args(inner.get_args());
        let (name, value) = mark.split_once('=').unwrap();
        fakeroot.env(name, value).args(["--", "sh", "-c", "echo up >&2; exec sleep 1000"]);
        let mut nobody = |_: Progress| ();
        let mut daemons = Vec::new();
        let ended = run(&mut fakeroot, &mut Reporter::new(&mut nobody).unwrap(), |reporter, _| {
            daemons = marked();
            reporter.cancel().set();
        });
        assert_eq!((ended.unwrap_err().kind(), daemons.len()), (ErrorKind::Cancelled, 1));
        let timeout = Timespec::try_from(Duration::from_secs(10)).unwrap();
        let ended = poll(&mut [PollFd::new(&daemons[0], PollFlags::IN)], Some(&timeout));
        assert_eq!(ended, Ok(1), "the daemon goes on");
    }

    /// It heeds no request, and goes as soon as it may not go on any longer.
    #[test]
    fn a_program_goes_with_whoever_gives_up_on_it() {
        let mut shell = shell("trap '' TERM; echo $$; while :; do sleep 1; done");
        let child = shell.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut running = Running { child, ended: false };
        let mut id = [0; 16];
        let length = running.child.stdout.as_mut().unwrap().read(&mut id).unwrap();
        running.signal(Signal::TERM);
        drop(running);
        let id = String::from_utf8_lossy(&id[..length]).trim().to_owned();
        assert!(!Path::new("/proc").join(id).exists());
    }
}

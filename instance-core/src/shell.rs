//! A session with a POSIX shell on a serial console: run a command, read its output and status,
//! write and read files.
//!
//! For guests without a network, and for the minutes before they have one. It expects `sh`, `stty`,
//! `base64` and a terminal in canonical mode, as BusyBox and every distribution offer.

use std::io;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::console::{Console, ConsoleReader};

/// The longest line that is typed: a Linux terminal in canonical mode takes 4095 bytes and drops
/// the rest (`N_TTY_BUF_SIZE`); a quarter of that leaves room for a guest that is slow to read.
const LINE: usize = 1000;

/// What a command did.
///
/// ```
/// use instance_core::shell::Output;
///
/// let output = Output { status: 0, text: "Linux\n".to_owned() };
/// assert_eq!((output.status, output.text.trim()), (0, "Linux"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// What it wrote to standard output and standard error, lines ended by `\n`.
    pub text: String,
}

/// A shell on a console. The session has the console to itself: what others type meanwhile goes
/// into it.
///
/// ```no_run
/// use std::time::{Duration, Instant};
/// use instance_core::shell::Shell;
///
/// # fn demo(server: &instance_core::Instance) -> std::io::Result<()> {
/// let deadline = Instant::now() + Duration::from_secs(60);
/// let mut shell = Shell::connect(&server.console(), deadline)?;
/// shell.must("apt-get install -y nginx", deadline)?;
/// shell.write_file("/var/www/html/index.html", b"hello", deadline)?;
/// assert_eq!(shell.read_file("/var/www/html/index.html", deadline)?, b"hello");
/// let running = shell.run("systemctl is-active nginx", deadline)?;
/// assert_eq!((running.status, running.text.trim()), (0, "active"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Shell {
    console: Console,
    reader: ConsoleReader,
    commands: u64,
}

impl Shell {
    /// Begins a session with the shell that waits at the console: wait for its prompt, or for whatever
    /// the guest says before it, first. What is typed while a guest boots may be lost.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if no shell answered by the deadline,
    /// [`InvalidData`](io::ErrorKind::InvalidData) if what answered is none.
    pub fn connect(console: &Console, deadline: Instant) -> io::Result<Self> {
        let mut shell = Self { console: console.clone(), reader: console.reader_from_now(), commands: 0 };
        // Without echo and prompt the output of a command is all that comes back.
        shell.run("stty -echo -onlcr; PS1=; PS2=", deadline)?;
        Ok(shell)
    }

    /// Runs `command`, a line or several of shell script, and waits for its end.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if it had not ended by the deadline and
    /// [`QuotaExceeded`](io::ErrorKind::QuotaExceeded) if it wrote more than
    /// [`WAIT_KEPT`](crate::console::WAIT_KEPT) bytes, after which the session is of no more use;
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if one of its lines is longer than 1000 bytes, which
    /// leaves room in what a terminal takes;
    /// [`InvalidData`](io::ErrorKind::InvalidData) if what answers is no shell.
    pub fn run(&mut self, command: &str, deadline: Instant) -> io::Result<Output> {
        if command.lines().any(|line| line.len() > LINE) {
            let what = format!("a line of the command is longer than {LINE} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.commands += 1;
        // Typed in two halves, so that an echo of the command is not taken for its end.
        let (half, number) = ("AMI-SHELL", self.commands);
        let typed = format!("{{ {command}\n}} 2>&1; printf '\\n%s-%s-%s:' {half} {number} $?\n");
        self.console.write_all(typed.as_bytes(), deadline)?;

        let end = format!("\n{half}-{number}-");
        let text = self.reader.wait_for(&end, deadline)?;
        let status = self.reader.wait_for(":", deadline)?;
        let status = String::from_utf8_lossy(&status);
        let status = status.trim_end_matches(':').parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("the shell gave {status:?} as a status"))
        })?;
        let text = &text[..text.len() - end.len()];
        Ok(Output { status, text: String::from_utf8_lossy(text).replace("\r\n", "\n") })
    }

    /// Writes a file in the guest, replacing what was there, and makes sure that it lies on its
    /// disk.
    ///
    /// # Errors
    ///
    /// As [`must`](Self::must), with the guest's words if it could not be written.
    pub fn write_file(&mut self, path: &str, content: &[u8], deadline: Instant) -> io::Result<()> {
        let path = quote(path);
        self.must(&format!(": > {path}.b64"), deadline)?;
        for chunk in BASE64.encode(content).as_bytes().chunks(LINE / 2) {
            let chunk = String::from_utf8_lossy(chunk);
            self.must(&format!("echo {chunk} >> {path}.b64"), deadline)?;
        }
        self.must(&format!("base64 -d {path}.b64 > {path} && rm {path}.b64 && sync"), deadline)?;
        Ok(())
    }

    /// Reads a file of the guest.
    ///
    /// # Errors
    ///
    /// As [`must`](Self::must), with the guest's words if it could not be read, and
    /// [`InvalidData`](io::ErrorKind::InvalidData) if what came is not base64.
    pub fn read_file(&mut self, path: &str, deadline: Instant) -> io::Result<Vec<u8>> {
        let text = self.must(&format!("base64 {}", quote(path)), deadline)?;
        let digits: String = text.split_whitespace().collect();
        BASE64.decode(digits).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Runs a command that must succeed, and returns what it wrote.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), and [`Other`](io::ErrorKind::Other) with its output if its status is
    /// not 0.
    pub fn must(&mut self, command: &str, deadline: Instant) -> io::Result<String> {
        let output = self.run(command, deadline)?;
        if output.status == 0 {
            return Ok(output.text);
        }
        let (status, text) = (output.status, output.text.trim());
        Err(io::Error::other(format!("the guest's shell says {status}: {text}")))
    }
}

/// `text` as one word of shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    /// Runs `act` with a shell of the host's at the console, in an empty directory.
    fn with_host_shell(act: impl FnOnce(&mut Shell, Instant)) {
        use std::io::{Read, Write};
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sh")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let console = Console::new();
        let port = console.port();
        let (wake, woken) = std::sync::mpsc::channel();
        port.set_input_notifier(Some(std::sync::Arc::new(move || wake.send(()).unwrap_or(()))));
        let output = port.clone();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut buf = [0; 4096];
                while let Ok(n @ 1..) = stdout.read(&mut buf) {
                    output.write_output(&buf[..n]);
                }
            });
            let input = port.clone();
            scope.spawn(move || {
                while woken.recv().is_ok() {
                    let mut buf = [0; 4096];
                    while let n @ 1.. = input.read_input(&mut buf) {
                        stdin.write_all(&buf[..n]).unwrap();
                    }
                }
            });
            let deadline = Instant::now() + Duration::from_secs(20);
            act(&mut Shell::connect(&console, deadline).unwrap(), deadline);
            port.set_input_notifier(None);
        });
        child.wait().unwrap();
    }

    #[test]
    fn commands_give_back_their_output_and_status() {
        with_host_shell(|shell, deadline| {
            let table = [
                ("echo one; echo two >&2", 0, "one\ntwo\n"),
                ("printf no-newline", 0, "no-newline"),
                ("(exit 7)", 7, ""),
                ("for i in 1 2\ndo echo $i\ndone", 0, "1\n2\n"),
                ("echo 'AMI-SHELL-1-0:'", 0, "AMI-SHELL-1-0:\n"),
            ];
            for (command, status, text) in table {
                let expected = Output { status, text: text.to_owned() };
                assert_eq!(shell.run(command, deadline).unwrap(), expected, "{command}");
            }
            let failed = shell.must("echo why; false", deadline).unwrap_err();
            assert!(failed.to_string().contains("why"), "{failed}");
        });
    }

    #[test]
    fn files_go_in_and_come_out_byte_for_byte() {
        with_host_shell(|shell, deadline| {
            let bytes: Vec<u8> = (0..5000_u32).map(|n| (n * 7 % 256) as u8).collect();
            for (name, content) in [("all bytes", &bytes[..]), ("it's empty", b"")] {
                shell.write_file(name, content, deadline).unwrap();
                assert_eq!(shell.read_file(name, deadline).unwrap(), content, "{name}");
            }
            assert_eq!(shell.must("ls", deadline).unwrap(), "all bytes\nit's empty\n");
            assert!(shell.read_file("missing", deadline).is_err());
        });
    }

    #[test]
    fn a_line_that_no_terminal_takes_is_refused() {
        let console = Console::new();
        let mut shell = Shell { console: console.clone(), reader: console.reader(), commands: 0 };
        let refused = shell.run(&"x".repeat(LINE + 1), Instant::now()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}

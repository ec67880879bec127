//! Why a machine ended, from what QEMU left behind: pure functions.

use std::collections::VecDeque;
use std::process::ExitStatus;

use instance_core::machine::ExitCause;

/// How much of QEMU's standard error is kept: its end.
const STDERR_KEPT: usize = 4096;

/// How many of its lines an error shows.
const STDERR_LINES: usize = 8;

/// The line that the emulator logs before it turns a triple fault into a reset.
const TRIPLE_FAULT: &[u8] = b"Triple fault";

/// What is known about the end of a machine.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// The reason in QEMU's `SHUTDOWN` event.
    pub(crate) shutdown: Option<String>,
    /// Whether the emulator logged a triple fault.
    pub(crate) triple_fault: LogScan,
    /// What the supervisor ended QEMU for.
    pub(crate) failure: Option<String>,
    /// The last that QEMU wrote to its standard error.
    pub(crate) stderr: Tail,
}

impl Evidence {
    /// The cause, where the process ended with `status` and that was `asked` for, or not.
    pub(crate) fn cause(&self, asked: Option<&ExitCause>, status: Option<ExitStatus>) -> ExitCause {
        match (self.shutdown.as_deref(), asked) {
            (Some("guest-shutdown"), _) => ExitCause::PowerOff,
            (Some("guest-reset"), _) if self.triple_fault.found => ExitCause::TripleFault(None),
            (Some("guest-reset"), _) => ExitCause::Reset,
            (Some("guest-panic"), _) => ExitCause::Panic,
            (_, Some(asked)) => asked.clone(),
            (Some(reason), None) => {
                ExitCause::HostFailure(format!("QEMU shut down for the reason `{reason}`"))
            }
            (None, None) => ExitCause::HostFailure(self.failure(status)),
        }
    }

    /// What went wrong, where nobody wanted QEMU to end.
    pub(crate) fn failure(&self, status: Option<ExitStatus>) -> String {
        let what = match (&self.failure, status) {
            (Some(failure), _) => failure.clone(),
            (None, Some(status)) => format!("QEMU ended with {status}"),
            (None, None) => "QEMU ended".to_owned(),
        };
        match self.stderr.last_lines() {
            lines if lines.is_empty() => what,
            lines => format!("{what}: {lines}"),
        }
    }

    /// Whether what QEMU said before it gave up is about the kernel or the initial RAM disk.
    pub(crate) fn is_about_boot_files(&self) -> bool {
        let said = self.stderr.last_lines();
        // The texts of QEMU's hw/i386/x86.c, which are all it says.
        ["ELF Note", "elf kernel", "kernel file", "kernel header", "initrd", "ram disk", "error reading"]
            .iter()
            .any(|text| said.contains(text))
    }
}

/// The end of a text.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let surplus = self.0.len().saturating_sub(STDERR_KEPT);
        self.0.drain(..surplus);
    }

    /// Its last lines, as printable text.
    pub(crate) fn last_lines(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace(|c: char| c.is_control() && c != '\n', " ");
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        lines[lines.len().saturating_sub(STDERR_LINES)..].join("\n")
    }
}

/// Looks for [`TRIPLE_FAULT`] in a log that comes in pieces.
#[derive(Debug, Default)]
pub(crate) struct LogScan {
    pub(crate) found: bool,
    /// The end of what came before, shorter than the text looked for.
    carried: Vec<u8>,
}

impl LogScan {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.carried.extend_from_slice(bytes);
        self.found |= self.carried.windows(TRIPLE_FAULT.len()).any(|w| w == TRIPLE_FAULT);
        let surplus = self.carried.len().saturating_sub(TRIPLE_FAULT.len() - 1);
        self.carried.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn causes() {
        let check = |shutdown: Option<&str>, log: &str, asked: Option<ExitCause>, expect: ExitCause| {
            let mut evidence = Evidence { shutdown: shutdown.map(str::to_owned), ..Evidence::default() };
            evidence.triple_fault.push(log.as_bytes());
            evidence.stderr.push(b"\x1b[0mqemu: oops\n");
            let status = Some(ExitStatus::from_raw(0x100));
            assert_eq!(evidence.cause(asked.as_ref(), status), expect, "{shutdown:?} {log} {asked:?}");
        };
        let host = |text: &str| ExitCause::HostFailure(text.to_owned());
        let (killed, reset) = (Some(ExitCause::Killed), Some(ExitCause::Reset));
        check(Some("guest-shutdown"), "", None, ExitCause::PowerOff);
        check(Some("guest-shutdown"), "", killed.clone(), ExitCause::PowerOff);
        check(Some("guest-shutdown"), "", reset.clone(), ExitCause::PowerOff);
        check(Some("guest-reset"), "CPU Reset (CPU 0)", None, ExitCause::Reset);
        check(Some("guest-reset"), "x\nTriple fault\n", None, ExitCause::TripleFault(None));
        check(Some("guest-panic"), "", None, ExitCause::Panic);
        check(Some("host-signal"), "", killed.clone(), ExitCause::Killed);
        check(Some("host-signal"), "", reset.clone(), ExitCause::Reset);
        check(Some("host-signal"), "", None, host("QEMU shut down for the reason `host-signal`"));
        check(None, "", killed, ExitCause::Killed);
        check(None, "", reset, ExitCause::Reset);
        check(None, "", None, host("QEMU ended with exit status: 1: [0mqemu: oops"));
    }

    #[test]
    fn a_triple_fault_is_found_in_any_pieces() {
        let log = b"CPU Reset\nTriple fault\n";
        for cut in 0..log.len() {
            let mut scan = LogScan::default();
            scan.push(&log[..cut]);
            scan.push(&log[cut..]);
            assert!(scan.found, "cut at {cut}");
        }
    }

    #[test]
    fn the_tail_is_bounded() {
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.push(&[b'a'; 1000]);
        }
        tail.push(b"\n1\n2\n3\n4\n5\n6\n7\n8\n");
        assert_eq!(tail.0.len(), STDERR_KEPT);
        assert_eq!(tail.last_lines(), "1\n2\n3\n4\n5\n6\n7\n8");
    }
}

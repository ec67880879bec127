//! Whoever reads along what the guest writes.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use event_listener::Listener;

use super::{Shared, WAIT_KEPT};

/// Reads a console's output from some point on.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
///
/// let console = Console::new();
/// let mut reader = console.reader();
/// console.port().write_output(b"booting... login: ");
/// let deadline = Instant::now() + Duration::from_secs(10);
/// assert_eq!(reader.wait_for("login:", deadline)?, b"booting... login:");
/// assert_eq!(reader.read(deadline)?, b" ", "what follows is left");
/// assert_eq!(reader.read_new(), b"", "and then there is nothing new");
/// assert_eq!(console.reader_from_now().read_new(), b"");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct ConsoleReader {
    pub(super) shared: Arc<Shared>,
    pub(super) position: u64,
}

impl ConsoleReader {
    /// What has been written since the last call, without blocking. Output that was forgotten before
    /// it was read is skipped.
    pub fn read_new(&mut self) -> Vec<u8> {
        let state = self.shared.lock();
        let oldest = state.written - state.output.len() as u64;
        let from = (self.position.max(oldest) - oldest) as usize;
        self.position = state.written;
        state.output.iter().skip(from).copied().collect()
    }

    /// Waits until there is new output and returns it.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if there was none by the deadline.
    pub fn read(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            let grew = self.shared.output_grew.listen();
            let new = self.read_new();
            if !new.is_empty() {
                return Ok(new);
            }
            if grew.wait_deadline(deadline).is_none() {
                return Err(timed_out("the guest wrote nothing"));
            }
        }
    }

    /// Waits until the guest has written `text`; returns everything up to and with it. What follows
    /// it is left for the next read.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if it had not come by the deadline, with the last line
    /// that had; [`QuotaExceeded`](io::ErrorKind::QuotaExceeded) if more than [`WAIT_KEPT`] bytes came
    /// without it. This reader has then read all that came.
    pub fn wait_for(&mut self, text: &str, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut seen = Vec::new();
        loop {
            // A match may straddle two reads, so search again from just before the new bytes.
            let from = seen.len().saturating_sub(text.len());
            match self.read(deadline) {
                Ok(new) => seen.extend(new),
                Err(_) => {
                    let text_seen = String::from_utf8_lossy(&seen);
                    let last = text_seen.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("").trim();
                    return Err(timed_out(&format!(
                        "waiting for {text:?}; the console's last line is {last:?}"
                    )));
                }
            }
            if let Some(at) = find(&seen[from..], text.as_bytes()) {
                let end = from + at + text.len();
                self.position -= (seen.len() - end) as u64;
                seen.truncate(end);
                return Ok(seen);
            }
            if seen.len() > WAIT_KEPT {
                let what = format!("waiting for {text:?}; the guest wrote {WAIT_KEPT} bytes without it");
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, what));
            }
        }
    }
}

impl fmt::Debug for ConsoleReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleReader").field("position", &self.position).finish_non_exhaustive()
    }
}

pub(super) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|w| w == needle)
}

pub(super) fn timed_out(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what.to_owned())
}

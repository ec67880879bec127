//! The console of a machine: what the guest wrote, and what it is told.
//!
//! A [`Console`] belongs to the instance, not to the machine: it outlives a reboot. The machine gets
//! its [`ConsolePort`] with its specification: for its serial port, and another, if that is wanted, for a
//! [virtio console](crate::machine::MachineSpec::virtio_console), which is faster and knows the terminal's size. Output is kept as EC2 keeps it, the last 64 KiB
//! (`GetConsoleOutput`).

mod host_keys;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use event_listener::{Event, EventListener, Listener};

use self::host_keys::HostKeys;
pub use self::reader::ConsoleReader;
use self::reader::{find, timed_out};

/// How many bytes of output are kept: the last 64 KiB.
///
/// ```
/// use instance_core::console::{Console, OUTPUT_KEPT};
///
/// let console = Console::new();
/// console.port().write_output(&vec![b'.'; OUTPUT_KEPT + 1]);
/// assert_eq!(console.output().len(), OUTPUT_KEPT);
/// assert_eq!(console.written(), OUTPUT_KEPT as u64 + 1);
/// ```
pub const OUTPUT_KEPT: usize = 64 * 1024;

/// How many bytes of input wait for a guest that does not read them.
///
/// ```
/// use std::io::ErrorKind::TimedOut;
/// use std::time::{Duration, Instant};
/// use instance_core::console::{Console, INPUT_KEPT};
///
/// let deadline = Instant::now() + Duration::from_millis(1);
/// let too_much = Console::new().write_all(&vec![b'x'; INPUT_KEPT + 1], deadline);
/// assert_eq!(too_much.err().map(|e| e.kind()), Some(TimedOut));
/// ```
pub const INPUT_KEPT: usize = 64 * 1024;

/// How many bytes [`ConsoleReader::wait_for`] holds while what it waits for does not come: 16 MiB. A guest
/// that writes without end costs no more.
///
/// ```
/// use std::io::ErrorKind::QuotaExceeded;
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
///
/// let console = Console::new();
/// let (mut reader, port) = (console.reader(), console.port());
/// std::thread::scope(|scope| {
///     let waiting = scope.spawn(move || reader.wait_for("login:", Instant::now() + Duration::from_secs(60)));
///     while !waiting.is_finished() {
///         port.write_output(&[b'.'; 4096]);
///     }
///     let refused = waiting.join().map(|waited| waited.err().map(|e| e.kind()));
///     assert_eq!(refused.ok(), Some(Some(QuotaExceeded)));
/// });
/// ```
pub const WAIT_KEPT: usize = 16 << 20;

/// How large the terminal at a [`Console`] is. See [`Console::resize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConsoleSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl Default for ConsoleSize {
    /// The 80 columns and 25 rows of a PC.
    fn default() -> Self {
        Self { columns: 80, rows: 25 }
    }
}

type Notifier = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    output: VecDeque<u8>,
    /// Output bytes ever written; `written - output.len()` have been forgotten.
    written: u64,
    input: VecDeque<u8>,
    notifier: Option<Notifier>,
    size: ConsoleSize,
    resize_notifier: Option<Notifier>,
    host_keys: HostKeys,
    host_keys_notifier: Option<Notifier>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    output_grew: Event,
    input_shrank: Event,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle for whoever sits at the console. Cheap to clone; any number read at once, each at its
/// own pace.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
///
/// let console = Console::new();
/// console.port().write_output(b"login: ");
/// let deadline = Instant::now() + Duration::from_secs(1);
/// console.reader().wait_for("login:", deadline)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Console(Arc<Shared>);

impl Console {
    /// A console that nothing has been written to.
    pub fn new() -> Self {
        Self::default()
    }

    /// The side of the machine.
    pub fn port(&self) -> ConsolePort {
        ConsolePort(self.0.clone())
    }

    /// The last 64 KiB that the guest wrote.
    pub fn output(&self) -> Vec<u8> {
        self.0.lock().output.iter().copied().collect()
    }

    /// The keys by which the guest's SSH server is known, as OpenSSH writes them, without comments: those that the guest
    /// has shown last, as cloud-init does when it has made them. They are kept however much it writes after them.
    ///
    /// ```
    /// use instance_core::console::Console;
    ///
    /// const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";
    /// let console = Console::new();
    /// let shown =
    ///     format!("-----BEGIN SSH HOST KEY KEYS-----\n{KEY} root@web\n-----END SSH HOST KEY KEYS-----\n");
    /// console.port().write_output(shown.as_bytes());
    /// assert_eq!(console.host_keys(), [KEY]);
    /// ```
    pub fn host_keys(&self) -> Vec<String> {
        self.0.lock().host_keys.shown().to_vec()
    }

    /// Whether the guest has shown others than these.
    pub(crate) fn has_other_host_keys(&self, than: &[String]) -> bool {
        let state = self.0.lock();
        let shown = state.host_keys.shown();
        !shown.is_empty() && shown != than
    }

    /// Has `notify` called when the guest has shown other host keys than before, in the thread that writes them.
    pub(crate) fn set_host_keys_notifier(&self, notify: Notifier) {
        self.0.lock().host_keys_notifier = Some(notify);
    }

    /// How many bytes the guest has ever written.
    pub fn written(&self) -> u64 {
        self.0.lock().written
    }

    /// Whether the guest has written `text` after so many bytes, of what is kept.
    pub(crate) fn has_written(&self, text: &str, after: u64) -> bool {
        let mut reader = ConsoleReader { shared: self.0.clone(), position: after };
        find(&reader.read_new(), text.as_bytes()).is_some()
    }

    /// Heard when the guest has written something, or [`wake_readers`](Self::wake_readers) was called.
    pub(crate) fn news(&self) -> EventListener {
        self.0.output_grew.listen()
    }

    /// Has whoever waits for output look again.
    pub(crate) fn wake_readers(&self) {
        self.0.output_grew.notify(usize::MAX);
    }

    /// A reader that begins with the oldest output still kept.
    pub fn reader(&self) -> ConsoleReader {
        ConsoleReader { shared: self.0.clone(), position: 0 }
    }

    /// A reader that begins with what the guest writes from now on.
    pub fn reader_from_now(&self) -> ConsoleReader {
        ConsoleReader { shared: self.0.clone(), position: self.written() }
    }

    /// Says how large the terminal is, which is told to a guest whose console can be told: a virtio console. A
    /// serial port knows no size.
    ///
    /// ```
    /// use instance_core::console::{Console, ConsoleSize};
    ///
    /// let console = Console::new();
    /// assert_eq!(console.port().size(), ConsoleSize { columns: 80, rows: 25 });
    /// console.resize(ConsoleSize { columns: 132, rows: 43 });
    /// assert_eq!(console.port().size().columns, 132);
    /// ```
    pub fn resize(&self, size: ConsoleSize) {
        let notifier = {
            let mut state = self.0.lock();
            let changed = std::mem::replace(&mut state.size, size) != size;
            state.resize_notifier.clone().filter(|_| changed)
        };
        if let Some(notify) = notifier {
            notify();
        }
    }

    /// Types `bytes` at the guest, waiting while [`INPUT_KEPT`] bytes stand unread.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if the guest did not take them by the deadline; part of
    /// them may then have been typed.
    pub fn write_all(&self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            let room_made = self.0.input_shrank.listen();
            let (taken, notifier) = {
                let mut state = self.0.lock();
                let taken = bytes.len().min(INPUT_KEPT - state.input.len());
                state.input.extend(&bytes[..taken]);
                (taken, state.notifier.clone())
            };
            bytes = &bytes[taken..];
            if taken > 0 {
                if let Some(notify) = notifier {
                    notify();
                }
            } else if room_made.wait_deadline(deadline).is_none() {
                return Err(timed_out("the guest does not read its console"));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("written", &self.written()).finish_non_exhaustive()
    }
}

/// The machine's side of a console: its port writes output here and reads input here. A console is of one port.
///
/// ```
/// use std::sync::{Arc, mpsc};
/// use std::time::Instant;
/// use instance_core::console::Console;
///
/// // An echo, as a machine's serial port would be wired.
/// let console = Console::new();
/// let port = console.port();
/// let (typed, wakes) = mpsc::channel();
/// port.set_input_notifier(Some(Arc::new(move || drop(typed.send(())))));
/// console.write_all(b"hello", Instant::now())?;
/// wakes.recv()?;
/// assert_eq!(port.input_waiting(), 5);
/// let mut line = [0; 80];
/// let len = port.read_input(&mut line);
/// port.write_output(&line[..len]);
/// assert_eq!(console.output(), b"hello");
/// port.set_input_notifier(None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct ConsolePort(Arc<Shared>);

impl ConsolePort {
    /// What the guest wrote. Never blocks: what nobody reads is forgotten, oldest first.
    pub fn write_output(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let shown = {
            let mut state = self.0.lock();
            state.written += bytes.len() as u64;
            state.output.extend(bytes);
            let surplus = state.output.len().saturating_sub(OUTPUT_KEPT);
            state.output.drain(..surplus);
            let has_shown = state.host_keys.hear(bytes);
            state.host_keys_notifier.clone().filter(|_| has_shown)
        };
        self.0.output_grew.notify(usize::MAX);
        if let Some(notify) = shown {
            notify();
        }
    }

    /// Takes up to `buf.len()` bytes of waiting input without blocking; returns how many.
    pub fn read_input(&self, buf: &mut [u8]) -> usize {
        let taken = {
            let mut state = self.0.lock();
            let taken = buf.len().min(state.input.len());
            for (to, from) in buf.iter_mut().zip(state.input.drain(..taken)) {
                *to = from;
            }
            taken
        };
        if taken > 0 {
            self.0.input_shrank.notify(usize::MAX);
        }
        taken
    }

    /// How many bytes of input are waiting.
    pub fn input_waiting(&self) -> usize {
        self.0.lock().input.len()
    }

    /// Has `notify` called, in the thread that types, whenever there is new input. A machine sets it
    /// when it starts and takes it back (`None`) when it ends; it must be quick and must not block.
    pub fn set_input_notifier(&self, notify: Option<Arc<dyn Fn() + Send + Sync>>) {
        self.0.lock().notifier = notify;
    }

    /// How large the terminal is.
    pub fn size(&self) -> ConsoleSize {
        self.0.lock().size
    }

    /// The same as [`set_input_notifier`](Self::set_input_notifier) for changes of the terminal's
    /// [`size`](Self::size), of which a machine is told that can tell its guest.
    pub fn set_resize_notifier(&self, notify: Option<Arc<dyn Fn() + Send + Sync>>) {
        self.0.lock().resize_notifier = notify;
    }
}

impl fmt::Debug for ConsolePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsolePort").finish_non_exhaustive()
    }
}

//! The lab's pulse: keeps the emulator from losing an interrupt for good, and tells when it did.
//!
//! QEMU changes the set of interrupts that wait for an emulated processor without a lock when a guest in
//! the lab is entered and left (`helper_vmrun` and `do_vmexit` of version 7.2), while another thread adds the
//! lab's own timer to it. That one may get lost, and as the lab's kernel sets its timer anew only when it has
//! gone off, the lab would stand still for ever, as one has been seen to. Any further interrupt has all that
//! wait looked at again. So there is one ten times a second: a byte at a port, which the lab sends
//! back. When nothing has come back for long, the lab stands still for another reason.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::machine::Port;

/// From one beat to the next.
const BEAT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a lab on a busy machine may be without an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps the pulse until QEMU closes the port, and shuts `alive` down if the lab stands still before that.
pub(super) fn feel(port: &Port, alive: &UnixStream) -> io::Result<()> {
    feel_for(PATIENCE, port, alive)
}

fn feel_for(patience: Duration, port: &Port, alive: &UnixStream) -> io::Result<()> {
    let (mut stream, _) = port.listener.accept()?;
    stream.set_nonblocking(true)?;
    let (mut heard, mut answer) = (None, [0; 256]);
    // An answer is no reason to wake: only the port's end is.
    while poll(&mut [PollFd::new(&stream, PollFlags::empty())], Some(&BEAT)).map_or(true, |ended| ended == 0)
    {
        match stream.read(&mut answer) {
            Ok(0) => return Ok(()),
            Ok(_) => heard = Some(Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if heard.is_some_and(|heard| heard.elapsed() > patience) {
            return alive.shutdown(Shutdown::Both);
        }
        match stream.write(b".") {
            // Many beats are under way already.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => drop(written?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Whether a lab that answers so many beats and then hangs or ends is found to stand still.
    fn stands_still(answers: usize, hangs: bool) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let port = Port::listen(dir.path(), "pulse").unwrap();
        let mut lab = UnixStream::connect(dir.path().join("pulse")).unwrap();
        let (mut still, alive) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let pulse = scope.spawn(|| feel_for(Duration::from_millis(200), &port, &alive));
            let mut beat = [0];
            for _ in 0..answers {
                lab.read_exact(&mut beat).unwrap();
                lab.write_all(&beat).unwrap();
            }
            if !hangs {
                drop(lab);
            }
            pulse.join().unwrap().unwrap();
        });
        still.set_nonblocking(true).unwrap();
        matches!(still.read(&mut [0]), Ok(0))
    }

    #[test]
    fn a_lab_that_answers_no_more_stands_still() {
        assert!(stands_still(3, true));
        assert!(!stands_still(5, false));
    }
}

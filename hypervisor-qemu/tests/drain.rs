//! A machine that has paused or ended writes to its disks no more.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::{linux, qemu, soon, spec};
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, Hypervisor, Machine, MachineState};
use storage_block::{BlockBackend, Disk, MemoryDisk, Result};

/// A disk that can hold writes up.
#[derive(Debug)]
struct Gated {
    inner: Disk,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    held: usize,
    done: usize,
}

impl Gate {
    fn set_closed(&self, closed: bool) {
        self.state.lock().unwrap().closed = closed;
        self.changed.notify_all();
    }

    fn wait_until_held(&self) {
        let state = self.state.lock().unwrap();
        let (state, _) =
            self.changed.wait_timeout_while(state, Duration::from_secs(60), |s| s.held == 0).unwrap();
        assert!(state.held > 0, "the guest's write never came");
    }

    fn done(&self) -> usize {
        self.state.lock().unwrap().done
    }
}

impl BlockBackend for Gated {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut state = self.gate.state.lock().unwrap();
        state.held += 1;
        self.gate.changed.notify_all();
        state = self.gate.changed.wait_while(state, |s| s.closed).unwrap();
        state.held -= 1;
        state.done += 1;
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.write_zeroes(offset, len)
    }
}

/// While a write of the guest is held up, `stop` must not bring the machine into a state that `ended`
/// accepts; as soon as it goes on, it must.
fn check(stop: fn(&dyn Machine), ended: fn(&MachineState) -> bool) {
    let (Some(qemu), Some(boot)) = (qemu(), linux()) else { return };
    let gate = Arc::<Gate>::default();
    let disk = Gated { inner: MemoryDisk::new(1 << 20).unwrap().into_disk(), gate: gate.clone() };
    let console = Console::new();
    let mut spec = spec(boot, &console);
    spec.memory_mib = spec.memory_mib.saturating_add(128);
    spec.disks.push(DiskSpec::new(Disk::new(disk).unwrap(), "gated"));
    let runtime_dir = tempfile::tempdir().unwrap();
    spec.runtime_dir = runtime_dir.path().to_owned();
    let machine = qemu.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY", soon()).unwrap();

    gate.set_closed(true);
    console.write_all(b"write 0 5 late\n", soon()).unwrap();
    gate.wait_until_held();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| stop(&*machine));
        // Long enough for one that does not wait for the disk.
        let early = machine.state().wait(Instant::now() + Duration::from_millis(500), ended);
        let (was_done, finished) = (gate.done(), stopping.is_finished());
        gate.set_closed(false);
        assert!(early.is_err(), "{early:?} while a write is under way");
        assert_eq!((was_done, finished), (0, false));
        machine.state().wait(soon(), ended).unwrap();
        assert_eq!(gate.done(), 1);
    });
}

#[test]
fn pausing_waits_for_requests_under_way() {
    check(|machine| machine.pause().unwrap(), |state| *state == MachineState::Paused);
}

#[test]
fn killing_waits_for_requests_under_way() {
    check(|machine| machine.kill(), |state| *state == MachineState::Exited(ExitCause::Killed));
}

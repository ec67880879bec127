//! How a machine ends, whichever of its threads is the last to leave.

use std::io::{Seek, Write};
use std::mem;
use std::sync::mpsc::channel;
use std::time::Duration;

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{Boot, BootFile};

use super::*;
use crate::kernel::tests::{elf, note};

/// A machine that nobody has started.
fn machine(kvm: &Kvm) -> KvmMachine {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&elf(&note(18, 0x10_0000))).unwrap();
    kernel.rewind().unwrap();
    let boot = Boot::new(BootFile::new(kernel).unwrap(), None, "");
    let spec = MachineSpec::new("ends", Architecture::X86_64, boot, Console::new().port());
    KvmMachine::create(kvm, &spec).unwrap()
}

/// As that of a device which somebody waits for when the guest has ejected it, or that is not in its place yet.
#[test]
fn a_hook_may_kill_also_in_a_thread_that_is_in_no_place() {
    let Ok(kvm) = Kvm::open() else { return eprintln!("SKIPPED: there is no KVM") };
    let machine = Arc::new(machine(&kvm));
    let (let_go, held) = channel::<()>();
    machine.shared.gate.join();
    let thread = machine.shared.spawn("held", None, || (), move |_| _ = held.recv()).unwrap();
    let (tell, told) = channel();
    let in_hook = Arc::downgrade(&machine);
    machine.state().subscribe(move |state| {
        in_hook.upgrade().unwrap().kill();
        tell.send(state.clone()).unwrap();
    });
    machine.shared.end(ExitCause::PowerOff);
    let processors = mem::take(&mut machine.shared.threads().vcpus);
    processors.into_iter().for_each(Thread::join);
    assert_eq!(machine.state().get(), MachineState::Created, "one has not left");
    drop(let_go);
    let said = told.recv_timeout(Duration::from_secs(20)).expect("the thread waits for itself");
    assert_eq!(said, MachineState::Exited(ExitCause::PowerOff));
    thread.join();
}

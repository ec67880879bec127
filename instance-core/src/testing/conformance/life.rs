//! How machines live and end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disks::Probe;
use super::{Guest, TestBed, disk, own_dir, word_at};
use crate::console::Console;
use crate::machine::{DiskSpec, ExitCause, MachineErrorKind, MachineState};

pub(super) fn walks_the_states_of_its_life(bed: &TestBed<'_>) {
    let runtime_dir = tempfile::tempdir().expect("a temporary directory");
    let console = Console::new();
    let machine = bed.hypervisor.create(bed.spec(&console, Vec::new(), runtime_dir.path())).expect("made");
    let state = machine.state();
    let wrong = |done: Result<(), crate::machine::MachineError>| {
        let refused = done.expect_err("not in this state");
        assert_eq!(refused.kind(), MachineErrorKind::WrongState, "{refused}");
    };

    assert_eq!(state.get(), MachineState::Created);
    wrong(machine.pause());
    wrong(machine.resume());
    wrong(machine.reset());
    machine.start().expect("starts");
    assert_eq!(state.get(), MachineState::Running);
    wrong(machine.start());
    wrong(machine.resume());
    machine.pause().expect("pauses");
    assert_eq!(state.get(), MachineState::Paused);
    wrong(machine.pause());
    machine.resume().expect("resumes");
    assert_eq!(state.get(), MachineState::Running);
    machine.kill();
    assert_eq!(state.get(), MachineState::Exited(ExitCause::Killed));
    machine.kill();
    wrong(machine.start());
    wrong(machine.pause());
    wrong(machine.reset());
    assert_eq!(state.get(), MachineState::Exited(ExitCause::Killed));
    drop(machine);

    // One that never started ends as well, and tells its watchers.
    let machine = bed.hypervisor.create(bed.spec(&console, Vec::new(), runtime_dir.path())).expect("made");
    let state = machine.state();
    drop(machine);
    assert_eq!(state.get(), MachineState::Exited(ExitCause::Killed));
}

pub(super) fn sees_a_power_off(bed: &TestBed<'_>) {
    let guest = bed.up(Vec::new());
    guest.tell("poweroff");
    assert_eq!(guest.expect_exit(), ExitCause::PowerOff);
}

pub(super) fn sees_a_reboot(bed: &TestBed<'_>) {
    let guest = bed.up(Vec::new());
    guest.tell("reboot");
    assert_eq!(guest.expect_exit(), ExitCause::Reset);
}

pub(super) fn sees_a_triple_fault(bed: &TestBed<'_>) {
    match how_it_ends(bed, "crash") {
        Some(cause) => assert!(matches!(cause, ExitCause::TripleFault(_)), "{cause:?}"),
        None => println!("the guest cannot crash its processor: not checked"),
    }
}

pub(super) fn sees_a_panic(bed: &TestBed<'_>) {
    match how_it_ends(bed, "panic") {
        Some(cause) => assert_eq!(cause, ExitCause::Panic),
        None => println!("the guest cannot say that it panicked: not checked"),
    }
}

/// How the machine of a guest that is told so ends. None if the guest says that it cannot do it.
fn how_it_ends(bed: &TestBed<'_>, command: &str) -> Option<ExitCause> {
    let mut guest = bed.up(Vec::new());
    // The end of the machine as a line on the console, so that there is one thing to wait for.
    let port = guest.console.port();
    guest.machine.state().subscribe(move |state| {
        if state.exit_cause().is_some() {
            port.write_output(b"\nmachine ended\n");
        }
    });
    guest.tell(command);
    loop {
        let line = guest.hear("\n");
        if line.contains("machine ended") {
            return Some(guest.expect_exit());
        }
        if line.contains("unsupported") {
            return None;
        }
    }
}

pub(super) fn kills_a_guest_that_spins(bed: &TestBed<'_>) {
    let mut guest = bed.up(Vec::new());
    guest.tell("spin");
    guest.hear("spinning");
    let begun = Instant::now();
    guest.machine.kill();
    let took = begun.elapsed();
    assert_eq!(guest.machine.state().get(), MachineState::Exited(ExitCause::Killed));
    assert!(took <= bed.kill_within, "killing took {took:?}");
}

pub(super) fn resets_a_guest_that_spins(bed: &TestBed<'_>) {
    let mut guest = bed.up(Vec::new());
    guest.tell("spin");
    guest.hear("spinning");
    let begun = Instant::now();
    guest.machine.reset().expect("resets");
    let took = begun.elapsed();
    assert_eq!(guest.machine.state().get(), MachineState::Exited(ExitCause::Reset));
    assert!(took <= bed.kill_within, "resetting took {took:?}");
    // Too late to be of another cause.
    guest.machine.kill();
    assert_eq!(guest.machine.state().get(), MachineState::Exited(ExitCause::Reset));
}

/// What it was told while it stood still it never does.
pub(super) fn resets_a_guest_that_is_paused(bed: &TestBed<'_>) {
    let root = disk(2048);
    let guest = bed.up(vec![DiskSpec::new(root.clone(), "root")]);
    guest.machine.pause().expect("pauses");
    guest.tell("write 0 1 late");
    guest.machine.reset().expect("resets");
    assert_eq!(guest.machine.state().get(), MachineState::Exited(ExitCause::Reset));
    assert_eq!(word_at(&root, 1), "", "a guest that was reset wrote to its disk");
}

pub(super) fn stands_still_while_paused(bed: &TestBed<'_>) {
    let (first, second) = (disk(2048), disk(2048));
    let mut guest = bed.up(vec![DiskSpec::new(first.clone(), "first"), DiskSpec::new(second, "second")]);
    guest.machine.pause().expect("pauses");
    let before = guest.console.written();
    guest.tell("write 0 1 late");
    // Long enough for a guest that is not paused to have answered many times over.
    assert!(guest.reader.read(Instant::now() + Duration::from_millis(300)).is_err(), "a paused guest spoke");
    assert_eq!(guest.console.written(), before);
    assert_eq!(word_at(&first, 1), "", "a paused guest wrote to its disk");
    guest.machine.resume().expect("resumes");
    guest.hear("wrote");
    assert_eq!(word_at(&first, 1), "late");
}

pub(super) fn delivers_the_power_button(bed: &TestBed<'_>) {
    let guest = bed.up(Vec::new());
    let pressed = guest.machine.power_button();
    if bed.hypervisor.capabilities().power_button {
        pressed.expect("pressed");
        assert_eq!(guest.expect_exit(), ExitCause::PowerOff);
    } else {
        assert_eq!(pressed.expect_err("it has none").kind(), MachineErrorKind::Unsupported);
    }
}

pub(super) fn runs_two_machines_side_by_side(bed: &TestBed<'_>) {
    let (one_disk, two_disk) = (disk(2048), disk(2048));
    let mut one = bed.up(vec![DiskSpec::new(one_disk.clone(), "one")]);
    let mut two = bed.up(vec![DiskSpec::new(two_disk.clone(), "two")]);
    one.expect_answer("write 0 0 one", "wrote");
    two.expect_answer("write 0 0 two", "wrote");
    one.expect_answer("read 0 0", "data one");
    drop(one);
    two.expect_answer("read 0 0", "data two");
    assert_eq!((word_at(&one_disk, 0), word_at(&two_disk, 0)), ("one".to_owned(), "two".to_owned()));
}

pub(super) fn gives_everything_back(bed: &TestBed<'_>) {
    // The first machine may load what the process then keeps, such as the thread-local storage of libraries.
    drop(bed.up(Vec::new()));
    let before = Held::now();
    let (spec, log, inner) = Probe::disk(false);
    let guest = bed.up(vec![spec]);
    let Guest { machine, console, runtime_dir, .. } = guest;
    drop(machine);
    assert_eq!(Arc::strong_count(&log), 1, "the machine still holds its disk");
    let left: Vec<_> = std::fs::read_dir(own_dir(runtime_dir.path())).into_iter().flatten().collect();
    assert!(left.is_empty(), "the machine left files: {left:?}");
    drop((console, inner, runtime_dir));
    assert_eq!(Held::now(), before, "threads, descriptors or children are left");
}

/// What this process holds.
#[derive(Debug, PartialEq)]
pub(super) struct Held {
    threads: usize,
    descriptors: usize,
    children: String,
}

impl Held {
    pub(super) fn now() -> Self {
        let count = |dir| std::fs::read_dir(dir).expect("Linux's /proc").count();
        let children = std::fs::read_dir("/proc/self/task")
            .expect("Linux's /proc")
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok())
            .collect();
        Self { threads: count("/proc/self/task"), descriptors: count("/proc/self/fd"), children }
    }
}

//! What agents do to who asks them: it costs little time and memory, and their guests go on in every case.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::*;
use crate::console::Console;
use crate::machine::{Boot, Hypervisor, Machine, MachineSpec};
use crate::testing::{AgentSays, FakeAgent, FakeHypervisor, fake_kernel};
use crate::vsock::{self, VsockSpec};

const PORT: u32 = 9999;
const SYNC: &str = "guest-sync-delimited";
const FREEZE_NAME: &str = "guest-fsfreeze-freeze";
const STATUS_NAME: &str = "guest-fsfreeze-status";
const THAW_NAME: &str = "guest-fsfreeze-thaw";

/// A guest with this agent. It ends with the machine.
fn guest(agent: &FakeAgent) -> (Box<dyn Machine>, Vsock, Arc<Turns>) {
    let agent = agent.clone();
    let hypervisor = FakeHypervisor::new().on_streams(move |port| agent.serve(port));
    let boot = Boot::new(fake_kernel("").unwrap(), None, "");
    let mut spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
    let (port, vsock) = vsock::cable();
    spec.vsock = Some(VsockSpec::new(port));
    let machine = hypervisor.create(spec).unwrap();
    machine.start().unwrap();
    (machine, vsock, Arc::default())
}

fn freeze<'t>(turns: &'t Arc<Turns>, vsock: &Vsock) -> io::Result<Frozen<'t>> {
    super::freeze(Turn::take(turns), vsock, PORT)
}

/// An agent that says this to a command.
fn saying(command: &'static str, says: AgentSays) -> FakeAgent {
    FakeAgent::behaving(PORT, move |name| (name == command).then(|| says.clone()))
}

fn bytes(text: &str) -> AgentSays {
    AgentSays::Bytes(text.as_bytes().to_vec())
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn file_systems_stand_still_until_they_are_let_go() {
    let agent = FakeAgent::new(PORT);
    let (_machine, vsock, turns) = guest(&agent);
    for _ in 0..2 {
        let frozen = freeze(&turns, &vsock).unwrap();
        assert_eq!(agent.frozen(), 2);
        assert!(frozen.thaw());
        assert_eq!(agent.frozen(), 0);
    }
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, THAW_NAME].repeat(2));
    drop(freeze(&turns, &vsock).unwrap());
    assert_eq!(agent.frozen(), 0, "whoever forgets it lets them go");
    let panicking = thread::spawn(move || {
        let _frozen = freeze(&turns, &vsock).unwrap();
        panic!("while they stand still");
    });
    assert!(panicking.join().is_err());
    assert_eq!((agent.frozen(), agent.asked().get().len()), (0, 12));
}

#[test]
fn nobody_waits_long_for_an_agent_that_is_not_there() {
    let (machine, vsock, turns) = guest(&FakeAgent::new(PORT + 1));
    assert_eq!(freeze(&turns, &vsock).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    machine.pause().unwrap();
    assert_eq!(freeze(&turns, &vsock).unwrap_err().kind(), ErrorKind::TimedOut, "one that is booting");
    drop(machine);
    assert_eq!(freeze(&turns, &vsock).unwrap_err().kind(), ErrorKind::NotConnected);
}

/// A command, what the agent says to it, the kind of the error and what that says, and what the agent is asked for.
type Case = (&'static str, AgentSays, ErrorKind, &'static str, &'static [&'static str]);

#[test]
fn whatever_an_agent_says_its_guest_goes_on() {
    let endless = |byte| AgentSays::WithoutEnd(vec![byte; 60_000]);
    // What comes after has it begin anew, or not, as much of that as it says meanwhile.
    let anyhow: &[&str] = &[];
    let again: &[&str] = &[SYNC, FREEZE_NAME, THAW_NAME, SYNC];
    let refused: &[&str] = &[SYNC, FREEZE_NAME, STATUS_NAME, THAW_NAME];
    let check = |(command, says, kind, part, asked): Case| {
        let mut what = format!("{command}: {says:?}");
        what.truncate(100);
        let agent = saying(command, says);
        let (_machine, vsock, turns) = guest(&agent);
        let begun = Instant::now();
        let refused = freeze(&turns, &vsock).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(15), "{what}: it took {:?}", begun.elapsed());
        assert_eq!(refused.kind(), kind, "{what}: {refused}");
        assert!(refused.to_string().contains(part), "{what}: {refused}");
        assert_eq!(agent.frozen(), 0, "{what}");
        let heard = agent.asked().get();
        assert!(
            heard == asked || asked.is_empty() && heard.contains(&THAW_NAME.to_owned()),
            "{what}: {heard:?}"
        );
    };
    let cases: &[Case] = &[
        (SYNC, AgentSays::Nothing, ErrorKind::TimedOut, "in time", &[SYNC]),
        (SYNC, bytes("{\"return\": 1}\n"), ErrorKind::TimedOut, "in time", &[SYNC]),
        (SYNC, AgentSays::HangUp, ErrorKind::ConnectionReset, "broke", &[SYNC]),
        (SYNC, endless(b'x'), ErrorKind::InvalidData, "does not answer", &[SYNC]),
        (SYNC, endless(0xff), ErrorKind::InvalidData, "too long", &[SYNC]),
        (FREEZE_NAME, AgentSays::Nothing, ErrorKind::TimedOut, "in time", again),
        (
            FREEZE_NAME,
            AgentSays::HangUp,
            ErrorKind::ConnectionReset,
            "broke",
            &[SYNC, FREEZE_NAME, SYNC, THAW_NAME],
        ),
        (FREEZE_NAME, bytes("{\"return\": 0}\n"), ErrorKind::Other, "no file system", again),
        (
            FREEZE_NAME,
            bytes("{\"error\": {\"desc\": \"ro\\u001b\"}}\n"),
            ErrorKind::Other,
            "cannot: \"ro\\u{1b}\"",
            refused,
        ),
        (FREEZE_NAME, bytes("{\"return\": 99999999999999999999}\n"), ErrorKind::InvalidData, "none", again),
        (FREEZE_NAME, bytes("hello\n"), ErrorKind::InvalidData, "none", again),
        (FREEZE_NAME, bytes("hello"), ErrorKind::TimedOut, "in time", again),
        (FREEZE_NAME, bytes("{\"return\": \"frozen\"}\n"), ErrorKind::InvalidData, "no number", again),
        (FREEZE_NAME, endless(b'['), ErrorKind::InvalidData, "too long", anyhow),
        (FREEZE_NAME, endless(b' '), ErrorKind::InvalidData, "too long", anyhow),
        (FREEZE_NAME, endless(b'\n'), ErrorKind::InvalidData, "does not answer", anyhow),
    ];
    // Most of them wait.
    thread::scope(|scope| {
        cases.iter().for_each(|case| drop(scope.spawn(|| check(case.clone()))));
    });
}

#[test]
fn what_stood_still_for_less_is_not_said_to_have() {
    let thawed = |says: AgentSays| {
        let agent = saying(THAW_NAME, says);
        let (_machine, vsock, turns) = guest(&agent);
        let frozen = freeze(&turns, &vsock).unwrap();
        (frozen.thaw(), agent.frozen())
    };
    assert_eq!(thawed(bytes("{\"return\": 2}\n")), (true, 0));
    // Somebody has had some of them go on.
    assert_eq!(thawed(bytes("{\"return\": 1}\n")), (false, 0));
    assert_eq!(thawed(bytes("{\"return\": 3}\n")), (false, 0));
    assert_eq!(thawed(AgentSays::Nothing), (false, 0));
    assert_eq!(thawed(bytes("what?\n")), (false, 0));
    for byte in [b' ', b'\n'] {
        assert_eq!(thawed(AgentSays::WithoutEnd(vec![byte; 60_000])), (false, 0));
    }
}

#[test]
fn a_stream_that_breaks_off_is_no_reason_to_stand_still() {
    let times = AtomicUsize::new(0);
    let agent = FakeAgent::behaving(PORT, move |name| {
        (name == THAW_NAME && times.fetch_add(1, SeqCst) == 0).then_some(AgentSays::HangUp)
    });
    let (_machine, vsock, turns) = guest(&agent);
    assert!(freeze(&turns, &vsock).unwrap().thaw());
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, THAW_NAME, SYNC, THAW_NAME]);
    assert_eq!(agent.frozen(), 0);
}

#[test]
fn file_systems_do_not_stand_still_for_as_long_as_the_host_takes() {
    let agent = FakeAgent::new(PORT);
    let (_machine, vsock, turns) = guest(&agent);
    let frozen = freeze(&turns, &vsock).unwrap();
    let thawed = |asked: &Vec<String>| asked.iter().any(|name| name == THAW_NAME);
    assert!(agent.asked().wait(soon(), thawed).is_ok());
    assert!(!frozen.thaw(), "they stood still for less than it took");
}

#[test]
fn the_time_that_flushing_takes_is_part_of_that() {
    let agent = FakeAgent::behaving(PORT, |name| {
        if name == FREEZE_NAME {
            thread::sleep(HELD * 2 / 3);
        }
        None
    });
    let (_machine, vsock, turns) = guest(&agent);
    let _frozen = freeze(&turns, &vsock).unwrap();
    let begun = Instant::now();
    let thawed = |asked: &Vec<String>| asked.iter().any(|name| name == THAW_NAME);
    assert!(agent.asked().wait(soon(), thawed).is_ok());
    assert!(begun.elapsed() < HELD, "they stood still for {:?} more", begun.elapsed());
}

/// There are always some bytes to read, and few enough not to be too many.
#[test]
fn who_always_says_something_is_listened_to_until_the_deadline() {
    struct Slow;
    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            buf[0] = b' ';
            Ok(1)
        }
    }
    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut agent = Agent::new(Slow);
    agent.deadline = Some(Instant::now());
    assert_eq!(agent.freeze().unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(agent.synchronise(7).unwrap_err().kind(), ErrorKind::TimedOut);
}

#[test]
fn an_agent_that_was_killed_is_told_when_it_is_back() {
    let times = AtomicUsize::new(0);
    let agent = FakeAgent::behaving(PORT, move |name| {
        (name == THAW_NAME && times.fetch_add(1, SeqCst) == 0).then_some(AgentSays::HangUp)
    });
    let (_machine, vsock, turns) = guest(&agent);
    let frozen = freeze(&turns, &vsock).unwrap();
    agent.refuse_next(3);
    assert!(!frozen.thaw(), "nobody waits for it");
    let thawed = |asked: &Vec<String>| asked.iter().filter(|name| *name == THAW_NAME).count() == 2;
    assert!(agent.asked().wait(soon(), thawed).is_ok(), "{:?}", agent.asked().get());
    assert_eq!(agent.frozen(), 0);
    assert!(freeze(&turns, &vsock).unwrap().thaw());
    assert_eq!((agent.frozen(), turns.owes(&vsock)), (0, None));
}

/// The agent gives nobody a chance to have it thaw but who wants to freeze next.
#[test]
fn what_stands_still_from_another_time_goes_on_before_anything_else() {
    let agent = FakeAgent::new(PORT);
    let (machine, vsock, turns) = guest(&agent);
    Agent::greet(&vsock, PORT).unwrap().freeze().unwrap();
    turns.owe(&vsock, PORT);
    assert!(freeze(&turns, &vsock).unwrap().thaw());
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, SYNC, THAW_NAME, FREEZE_NAME, THAW_NAME]);
    assert_eq!((agent.frozen(), turns.owes(&vsock)), (0, None));
    // Of a machine that is gone nothing stands still.
    turns.owe(&vsock, PORT);
    turns.thaw_owed(&vsock).unwrap();
    drop(machine);
    assert!(vsock.ends_by(soon()));
    assert_eq!(freeze(&turns, &vsock).unwrap_err().kind(), ErrorKind::NotConnected);
    let (_machine, other, _) = guest(&agent);
    assert_eq!(turns.owes(&other), None);
}

#[test]
fn what_somebody_else_has_stand_still_is_left_to_them() {
    let agent = FakeAgent::new(PORT);
    let (_machine, vsock, turns) = guest(&agent);
    let mut other = Agent::greet(&vsock, PORT).unwrap();
    other.freeze().unwrap();
    let refused = freeze(&turns, &vsock).unwrap_err();
    assert!(refused.to_string().contains("cannot"), "{refused}");
    assert_eq!((agent.frozen(), turns.owes(&vsock)), (2, None));
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, SYNC, FREEZE_NAME, STATUS_NAME]);
    assert_eq!(other.thaw().unwrap(), 2);
    assert!(freeze(&turns, &vsock).unwrap().thaw());
}

/// Freezing takes its time, and is over when nobody waits for it any more.
#[test]
fn what_is_frozen_too_late_is_thawed() {
    let both = b"{\"return\": 2}\n{\"return\": 2}\n".to_vec();
    let agent = FakeAgent::behaving(PORT, move |name| match name {
        FREEZE_NAME => Some(AgentSays::Nothing),
        THAW_NAME => Some(AgentSays::Bytes(both.clone())),
        _ => None,
    });
    let (_machine, vsock, turns) = guest(&agent);
    assert_eq!(freeze(&turns, &vsock).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(
        (agent.frozen(), agent.asked().get()),
        (0, [SYNC, FREEZE_NAME, THAW_NAME, SYNC].map(str::to_owned).to_vec())
    );
    let begun = Instant::now();
    drop(vsock);
    assert!(begun.elapsed() < THAW);
}

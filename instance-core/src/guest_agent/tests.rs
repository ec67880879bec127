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
const THAW_NAME: &str = "guest-fsfreeze-thaw";

/// A guest with this agent. It ends with the machine.
fn guest(agent: &FakeAgent) -> (Box<dyn Machine>, Vsock) {
    let agent = agent.clone();
    let hypervisor = FakeHypervisor::new().on_streams(move |port| agent.serve(port));
    let boot = Boot::new(fake_kernel("").unwrap(), None, "");
    let mut spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
    let (port, vsock) = vsock::cable();
    spec.vsock = Some(VsockSpec::new(port));
    let machine = hypervisor.create(spec).unwrap();
    machine.start().unwrap();
    (machine, vsock)
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
    let (_machine, vsock) = guest(&agent);
    for _ in 0..2 {
        let frozen = freeze(&vsock, PORT).unwrap();
        assert_eq!(agent.frozen(), 2);
        assert!(frozen.thaw());
        assert_eq!(agent.frozen(), 0);
    }
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, THAW_NAME].repeat(2));
    drop(freeze(&vsock, PORT).unwrap());
    assert_eq!(agent.frozen(), 0, "whoever forgets it lets them go");
    let panicking = thread::spawn(move || {
        let _frozen = freeze(&vsock, PORT).unwrap();
        panic!("while they stand still");
    });
    assert!(panicking.join().is_err());
    assert_eq!((agent.frozen(), agent.asked().get().len()), (0, 12));
}

#[test]
fn nobody_waits_long_for_an_agent_that_is_not_there() {
    let (machine, vsock) = guest(&FakeAgent::new(PORT + 1));
    assert_eq!(freeze(&vsock, PORT).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    machine.pause().unwrap();
    assert_eq!(freeze(&vsock, PORT).unwrap_err().kind(), ErrorKind::TimedOut, "one that is booting");
    drop(machine);
    assert_eq!(freeze(&vsock, PORT).unwrap_err().kind(), ErrorKind::NotConnected);
}

/// A command, what the agent says to it, the kind of the error and what that says, and what the agent is asked for.
type Case = (&'static str, AgentSays, ErrorKind, &'static str, &'static [&'static str]);

#[test]
fn whatever_an_agent_says_its_guest_goes_on() {
    let endless = |byte| AgentSays::WithoutEnd(vec![byte; 60_000]);
    // It may break the rules of the stream before it has heard the rest.
    let anyhow: &[&str] = &[];
    let again: &[&str] = &[SYNC, FREEZE_NAME, THAW_NAME, SYNC];
    let check = |(command, says, kind, part, asked): Case| {
        let what = format!("{command}: {says:.60?}");
        let agent = saying(command, says);
        let (_machine, vsock) = guest(&agent);
        let begun = Instant::now();
        let refused = freeze(&vsock, PORT).unwrap_err();
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
            again,
        ),
        (FREEZE_NAME, bytes("{\"return\": 99999999999999999999}\n"), ErrorKind::InvalidData, "none", again),
        (FREEZE_NAME, bytes("hello\n"), ErrorKind::InvalidData, "none", again),
        (FREEZE_NAME, bytes("hello"), ErrorKind::TimedOut, "in time", again),
        (FREEZE_NAME, endless(b'['), ErrorKind::InvalidData, "too long", anyhow),
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
        let (_machine, vsock) = guest(&agent);
        let frozen = freeze(&vsock, PORT).unwrap();
        (frozen.thaw(), agent.frozen())
    };
    assert_eq!(thawed(bytes("{\"return\": 2}\n")), (true, 0));
    // Somebody has had some of them go on.
    assert_eq!(thawed(bytes("{\"return\": 1}\n")), (false, 0));
    assert_eq!(thawed(bytes("{\"return\": 3}\n")), (false, 0));
    assert_eq!(thawed(AgentSays::Nothing), (false, 0));
    assert_eq!(thawed(bytes("what?\n")), (false, 0));
}

#[test]
fn a_stream_that_breaks_off_is_no_reason_to_stand_still() {
    let times = AtomicUsize::new(0);
    let agent = FakeAgent::behaving(PORT, move |name| {
        (name == THAW_NAME && times.fetch_add(1, SeqCst) == 0).then_some(AgentSays::HangUp)
    });
    let (_machine, vsock) = guest(&agent);
    assert!(freeze(&vsock, PORT).unwrap().thaw());
    assert_eq!(agent.asked().get(), [SYNC, FREEZE_NAME, THAW_NAME, SYNC, THAW_NAME]);
    assert_eq!(agent.frozen(), 0);
}

#[test]
fn file_systems_do_not_stand_still_for_as_long_as_the_host_takes() {
    let agent = FakeAgent::new(PORT);
    let (_machine, vsock) = guest(&agent);
    let frozen = freeze(&vsock, PORT).unwrap();
    let thawed = |asked: &Vec<String>| asked.iter().any(|name| name == THAW_NAME);
    assert!(agent.asked().wait(soon(), thawed).is_ok());
    assert!(!frozen.thaw(), "they stood still for less than it took");
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
    let (_machine, vsock) = guest(&agent);
    assert_eq!(freeze(&vsock, PORT).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(
        (agent.frozen(), agent.asked().get()),
        (0, [SYNC, FREEZE_NAME, THAW_NAME, SYNC].map(str::to_owned).to_vec())
    );
    let begun = Instant::now();
    drop(vsock);
    assert!(begun.elapsed() < THAW);
}

//! What a guest sees of the devices that are not disks or network ports.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant, SystemTime};

use ami_core::Architecture;
use common::held::private_bytes;
use common::soon;
use hypervisor_kvm::Kvm;
use instance_core::console::{Console, ConsoleReader, ConsoleSize};
use instance_core::machine::{
    ExitCause, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, RestoreSpec, SavedMachine,
};
use instance_core::vsock::{self, VsockSpec};

/// A guest that is up, and its console.
struct Guest {
    machine: Box<dyn Machine>,
    console: Console,
    reader: ConsoleReader,
}

impl Guest {
    fn with(kvm: &Kvm, change: impl FnOnce(&mut MachineSpec)) -> Self {
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("devices", Architecture::X86_64, boot, console.port());
        change(&mut spec);
        let machine = kvm.create(spec).unwrap();
        machine.start().unwrap();
        let mut guest = Self { machine, reader: console.reader(), console };
        guest.reader.wait_for("GUEST READY\n", soon()).unwrap();
        guest
    }

    fn say(&self, line: &str) {
        self.console.write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    }

    /// The number that it answers, behind the word that it was asked with.
    fn number(&mut self, word: &str) -> u64 {
        self.say(word);
        let answer = self.reader.wait_for("\n", soon()).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        answer.trim().strip_prefix(word.split(' ').next().unwrap()).unwrap().trim().parse().unwrap()
    }

    /// Asks until this is the answer.
    #[track_caller]
    fn until(&mut self, word: &str, wanted: u64) {
        let deadline = soon();
        while self.number(word) != wanted {
            assert!(Instant::now() < deadline, "{word} is {}, not {wanted}", self.number(word));
        }
    }

    fn end(&self) -> ExitCause {
        let end = self.machine.state().wait(soon(), |state| state.exit_cause().is_some()).unwrap();
        end.exit_cause().unwrap().clone()
    }
}

#[test]
fn a_panic_is_the_end_of_a_machine() {
    let Some(kvm) = common::kvm() else { return };
    let guest = Guest::with(&kvm, |_| ());
    guest.say("panic");
    assert_eq!(guest.end(), ExitCause::Panic);
}

#[test]
fn the_clock_has_the_hosts_time() {
    let Some(kvm) = common::kvm() else { return };
    let mut guest = Guest::with(&kvm, |_| ());
    let before = SystemTime::now();
    let told = guest.number("clock");
    let after = SystemTime::now();
    let digits = |time: SystemTime| {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let time = time::OffsetDateTime::from_unix_timestamp(seconds as i64).unwrap();
        let date = [i64::from(time.year()), time.month() as i64, time.day().into()];
        let clock = [time.hour(), time.minute(), time.second()].map(i64::from);
        date.into_iter().chain(clock).fold(0, |all, digits| all * 100 + digits) as u64
    };
    assert!((digits(before)..=digits(after)).contains(&told), "{told}");
}

#[test]
fn host_and_guest_talk_on_streams() {
    let Some(kvm) = common::kvm() else { return };
    let (port, host) = vsock::cable();
    let mut guest = Guest::with(&kvm, |spec| {
        let mut vsock = VsockSpec::new(port);
        vsock.cid = 77;
        spec.vsock = Some(vsock);
    });
    assert_eq!(guest.number("cid"), 77);
    let echo = |mut stream: vsock::Stream, len: u32| {
        let all: Vec<u8> = (0..len).map(|n| (n % 253) as u8).collect();
        stream.set_deadline(Some(soon()));
        let (mut writer, sent) = (stream.clone(), all.clone());
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        let mut got = vec![0; all.len()];
        stream.read_exact(&mut got).unwrap();
        writing.join().unwrap().unwrap();
        assert!(got == all);
    };
    // More than both sides have room for.
    echo(host.connect(7, soon()).unwrap(), 200_000);
    assert_eq!(host.connect(8, soon()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(guest.number("connect 5000"), 0, "nobody listens");
    let listener = host.listen(5000).unwrap();
    assert_eq!(guest.number("connect 5000"), 1);
    let mut stream = listener.accept(soon()).unwrap();
    echo(stream.clone(), 1000);
    // Not while it is paused.
    guest.machine.pause().unwrap();
    stream.write_all(b"now").unwrap();
    stream.set_deadline(Some(Instant::now() + Duration::from_millis(100)));
    assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::TimedOut);
    guest.machine.resume().unwrap();
    stream.set_deadline(Some(soon()));
    stream.read_exact(&mut [0; 3]).unwrap();
    guest.machine.kill();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_machine_without_streams_has_no_device_for_them() {
    let Some(kvm) = common::kvm() else { return };
    let mut guest = Guest::with(&kvm, |_| ());
    assert_eq!(guest.number("cid"), 0);
    for cid in [0, 2, u32::MAX] {
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("bad", Architecture::X86_64, boot, Console::new().port());
        let (port, _host) = vsock::cable();
        let mut vsock = VsockSpec::new(port);
        vsock.cid = cid;
        spec.vsock = Some(vsock);
        assert_eq!(kvm.create(spec).unwrap_err().kind(), MachineErrorKind::Unsupported, "{cid}");
    }
}

#[test]
fn the_balloon_gives_memory_back_to_the_host() {
    let Some(kvm) = common::kvm() else { return };
    const MIB: u64 = 1 << 20;
    const MEMORY: u32 = 512;
    // 32 MiB from 48 MiB on, in pages of 4 KiB.
    const PAGES: &str = "12288 8192";
    let mut guest = Guest::with(&kvm, |spec| spec.memory_mib = MEMORY.try_into().unwrap());
    assert_eq!(guest.number("target"), 0);
    guest.machine.set_balloon(32).unwrap();
    assert_eq!(guest.number("target"), 8192);
    assert_eq!(guest.number(&format!("touch {PAGES}")), 0);
    let full = private_bytes(u64::from(MEMORY) * MIB);
    assert_eq!(guest.number(&format!("touch {PAGES}")), 8192);
    assert_eq!(guest.machine.balloon().unwrap(), 0);
    assert_eq!(guest.number(&format!("inflate {PAGES}")), 1);
    let left = private_bytes(u64::from(MEMORY) * MIB);
    assert!(full - left >= 31 * MIB, "{full} bytes before, {left} after");
    assert_eq!(guest.machine.balloon().unwrap(), 32);
    // They are there again when they are used, and forgotten.
    assert_eq!(guest.number(&format!("touch {PAGES}")), 0);
    // Those of which the guest says that they are free go back as well, and stay its own.
    let full = private_bytes(u64::from(MEMORY) * MIB);
    assert_eq!(guest.number(&format!("report {PAGES}")), 1);
    let left = private_bytes(u64::from(MEMORY) * MIB);
    assert!(full - left >= 31 * MIB, "{full} bytes before, {left} after");
    assert_eq!(guest.machine.balloon().unwrap(), 32);
    assert_eq!(guest.number(&format!("touch {PAGES}")), 0);
    assert_eq!(guest.number(&format!("touch {PAGES}")), 8192);
    // A page that is none stops the balloon, and nothing else.
    guest.say("inflate 4294967295 1");
    assert_eq!(guest.machine.set_balloon(MEMORY).unwrap_err().kind(), MachineErrorKind::Unsupported);
    guest.machine.kill();
    assert_eq!(guest.machine.set_balloon(1).unwrap_err().kind(), MachineErrorKind::WrongState);
}

/// A list of pages in one buffer, longer than what is done at a time, and of which nothing more is told.
#[test]
fn a_long_list_of_pages_is_done_to_its_end() {
    let Some(kvm) = common::kvm() else { return };
    let guest = Guest::with(&kvm, |spec| spec.memory_mib = 128.try_into().unwrap());
    let begin = || {
        let mut reader = guest.console.reader_from_now();
        guest.say("long 300000");
        reader.wait_for("begun\n", soon()).unwrap();
        reader
    };
    begin().wait_for("long 1\n", soon()).unwrap();
    // Also where the machine stands still in between.
    let mut reader = begin();
    for _ in 0..5 {
        guest.machine.pause().unwrap();
        guest.machine.resume().unwrap();
    }
    reader.wait_for("long 1\n", soon()).unwrap();
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    // In the middle, of which the host may have been kept by others.
    loop {
        let mut reader = begin();
        guest.machine.pause().unwrap();
        if reader.wait_for("l", Instant::now()).is_err() {
            break;
        }
        guest.machine.resume().unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    guest.machine.save(&file).unwrap();
    let console = Console::new();
    let spec = RestoreSpec::new("restored", SavedMachine::new(file).unwrap(), console.port());
    let machine = kvm.restore(spec).unwrap();
    machine.resume().unwrap();
    console.reader().wait_for("long 1\n", soon()).unwrap();
}

#[test]
fn a_restored_machine_has_new_streams_and_an_empty_balloon() {
    let Some(kvm) = common::kvm() else { return };
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    let (port, host) = vsock::cable();
    let mut guest = Guest::with(&kvm, |spec| spec.vsock = Some(VsockSpec::new(port)));
    assert_eq!((guest.number("cid"), guest.number("target")), (3, 0));
    guest.machine.set_balloon(16).unwrap();
    guest.number("inflate 12288 4096");
    let mut before = host.connect(7, soon()).unwrap();
    before.write_all(b"x").unwrap();
    guest.machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    guest.machine.save(&file).unwrap();

    let restore = |vsock: Option<VsockSpec>, console: &Console| {
        let saved = SavedMachine::new(file.try_clone().unwrap()).unwrap();
        let mut spec = RestoreSpec::new("restored", saved, console.port());
        spec.vsock = vsock;
        kvm.restore(spec)
    };
    assert_eq!(restore(None, &Console::new()).unwrap_err().kind(), MachineErrorKind::Saved);
    let (port, host) = vsock::cable();
    let console = Console::new();
    let machine = restore(Some(VsockSpec::new(port)), &console).unwrap();
    machine.resume().unwrap();
    let mut restored = Guest { machine, reader: console.reader(), console };
    let mut stream = host.connect(7, soon()).unwrap();
    stream.write_all(b"new").unwrap();
    stream.set_deadline(Some(soon()));
    let mut echo = [0; 3];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"new");
    assert_eq!(restored.machine.balloon().unwrap(), 16, "its guest has not taken it back yet");
    assert_eq!(restored.number("target"), 0, "nobody has asked this one for memory");
    restored.machine.set_balloon(8).unwrap();
    assert_eq!(restored.number("target"), 2048);
}

/// Types at a terminal whose guest writes back in capitals.
#[track_caller]
fn talk(terminal: &Console, typed: &str) {
    let mut reader = terminal.reader_from_now();
    terminal.write_all(typed.as_bytes(), soon()).unwrap();
    reader.wait_for(&typed.to_uppercase(), soon()).unwrap();
}

#[test]
fn a_virtio_console_is_a_terminal_of_its_own() {
    let Some(kvm) = common::kvm() else { return };
    let mut bare = Guest::with(&kvm, |_| ());
    assert_eq!(bare.number("terminal"), 0, "a machine has none that is not asked for");
    drop(bare);
    let terminal = Console::new();
    terminal.resize(ConsoleSize { columns: 132, rows: 43 });
    let mut guest = Guest::with(&kvm, |spec| spec.virtio_console = Some(terminal.port()));
    // Before its driver is there it waits.
    terminal.write_all(b"early ", soon()).unwrap();
    assert_eq!(guest.number("terminal"), 132_043);
    terminal.reader().wait_for("EARLY ", soon()).unwrap();
    // More than there are buffers for.
    talk(&terminal, &"the quick brown fox ".repeat(500));
    assert!(!String::from_utf8_lossy(&guest.console.output()).contains("QUICK"), "it is another console");
    terminal.resize(ConsoleSize { columns: 90, rows: 30 });
    guest.until("terminal", 90_030);
    guest.machine.pause().unwrap();
    let mut reader = terminal.reader_from_now();
    terminal.write_all(b"now", soon()).unwrap();
    let nothing = reader.read(Instant::now() + Duration::from_millis(100));
    assert_eq!(nothing.unwrap_err().kind(), ErrorKind::TimedOut, "it is paused");
    guest.machine.resume().unwrap();
    reader.wait_for("NOW", soon()).unwrap();
    guest.machine.kill();
    // Nobody reads there any more, and nobody is waited for.
    terminal.write_all(b"x", soon()).unwrap();
    terminal.resize(ConsoleSize { columns: 1, rows: 1 });
    assert_eq!(terminal.port().input_waiting(), 1);
}

#[test]
fn a_virtio_console_goes_on_at_another_terminal() {
    let Some(kvm) = common::kvm() else { return };
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    let terminal = Console::new();
    let mut guest = Guest::with(&kvm, |spec| spec.virtio_console = Some(terminal.port()));
    assert_eq!(guest.number("terminal"), 80_025);
    talk(&terminal, "first");
    guest.machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    guest.machine.save(&file).unwrap();
    let restore = |virtio_console| {
        let console = Console::new();
        let saved = SavedMachine::new(file.try_clone().unwrap()).unwrap();
        let mut spec = RestoreSpec::new("restored", saved, console.port());
        spec.virtio_console = virtio_console;
        let machine = kvm.restore(spec)?;
        Ok(Guest { machine, reader: console.reader(), console })
    };
    assert_eq!(restore(None).err().map(|e: MachineError| e.kind()), Some(MachineErrorKind::Saved));
    let other = Console::new();
    other.resize(ConsoleSize { columns: 200, rows: 60 });
    let mut restored = restore(Some(other.port())).unwrap();
    restored.machine.resume().unwrap();
    talk(&other, "second");
    restored.until("terminal", 200_060);
    drop(restored);
    guest.machine.resume().unwrap();
    talk(&terminal, "third");
}

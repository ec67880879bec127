//! What QEMU adds to the contract: how machines end, what a broken QEMU does, what stays behind. The
//! guests are a few instructions long; the suite in `conformance.rs` boots Linux.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Tiny, boot_file, qemu, soon, spec, tiny};
use hypervisor_qemu::Qemu;
use instance_core::console::Console;
use instance_core::machine::{
    Boot, DiskSpec, ExitCause, Hypervisor, Machine, MachineError, MachineErrorKind, MachineState,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use storage_block::MemoryDisk;

/// A running tiny guest that has said that it is up.
fn up(qemu: &Qemu, what: Tiny) -> (Box<dyn Machine>, Console) {
    let console = Console::new();
    let machine = qemu.create(spec(tiny(what), &console)).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("up\n", soon()).unwrap();
    (machine, console)
}

fn exit(machine: &dyn Machine) -> ExitCause {
    let end = machine.state().wait(soon(), |s| s.exit_cause().is_some()).unwrap();
    end.exit_cause().unwrap().clone()
}

/// The QEMU that is this process's child and whose guest has this name.
fn child_named(guest: &str) -> Option<Pid> {
    let wanted = format!("guest={guest}\0");
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let dir = entry.unwrap().path();
        let line = fs::read_to_string(dir.join("cmdline")).ok()?;
        line.contains(&wanted).then(|| Pid::from_raw(dir.file_name()?.to_str()?.parse().ok()?))?
    })
}

#[test]
fn ends_are_told_apart() {
    let Some(qemu) = qemu() else { return };
    let table = [
        (Tiny::PowerOff, ExitCause::PowerOff),
        (Tiny::Reset, ExitCause::Reset),
        (Tiny::TripleFault, ExitCause::TripleFault(None)),
        (Tiny::Panic, ExitCause::Panic),
    ];
    for (what, expect) in table {
        let (machine, console) = up(&qemu, what);
        assert_eq!(exit(&*machine), expect, "{what:?}");
        assert_eq!(console.output(), b"up\n", "all output is there when the machine has ended");
        assert_eq!(machine.pause().unwrap_err().kind(), MachineErrorKind::WrongState);
        machine.kill();
        assert_eq!(exit(&*machine), expect, "killing changes nothing");
    }
}

#[test]
fn guests_that_do_not_listen_die_at_once() {
    let Some(qemu) = qemu() else { return };
    for what in [Tiny::Spin, Tiny::Flood] {
        for paused in [false, true] {
            let (machine, _console) = up(&qemu, what);
            machine.power_button().unwrap();
            if paused {
                machine.pause().unwrap();
            }
            let begun = Instant::now();
            machine.kill();
            assert_eq!(machine.state().get(), MachineState::Exited(ExitCause::Killed));
            assert!(begun.elapsed() < Duration::from_secs(1), "{what:?} took {:?}", begun.elapsed());
        }
    }
}

#[test]
fn input_reaches_a_guest_in_order_and_waits_for_one_that_is_slow() {
    let Some(qemu) = qemu() else { return };
    let console = Console::new();
    let machine = qemu.create(spec(tiny(Tiny::Echo), &console)).unwrap();
    // Typed before there is anyone to read it.
    console.write_all(b"early;", soon()).unwrap();
    machine.start().unwrap();
    let mut reader = console.reader();
    reader.wait_for("up\n", soon()).unwrap();
    let text: String = (0..2000).map(|n| format!("{n} ")).collect();
    console.write_all(text.as_bytes(), soon()).unwrap();
    console.write_all(b"end", soon()).unwrap();
    let heard = reader.wait_for("end", soon()).unwrap();
    assert_eq!(String::from_utf8(heard).unwrap(), format!("early;{text}end"));

    machine.pause().unwrap();
    let begun = Instant::now();
    // More than the console, the sockets and the serial port take together.
    let soon_full = begun + Duration::from_millis(200);
    let refused = console.write_all(&vec![b'x'; 4 << 20], soon_full).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn kernels_that_do_not_load_are_refused_with_the_reason() {
    let Some(qemu) = qemu() else { return };
    let good = tiny(Tiny::Spin).kernel.read().unwrap();
    let mut foreign = good.clone();
    foreign[18] = 183;
    let mut no_note = good.clone();
    no_note[84] = 0; // the second program header's type
    let cut = good[..60].to_vec();
    let table = [
        (b"#!/bin/sh\n# not a kernel\n".to_vec(), "not an ELF file"),
        (b"\x7fELF".to_vec(), "shorter than any ELF file"),
        (foreign, "machine 183"),
        (no_note, "ELF Note"),
        (cut, "ELF"),
    ];
    for (bytes, why) in table {
        let boot = Boot::new(boot_file(&bytes), None, "");
        let error = qemu.create(spec(boot, &Console::new())).unwrap_err();
        assert_eq!(error.kind(), MachineErrorKind::Boot, "{why}: {error}");
        assert!(error.to_string().to_lowercase().contains(&why.to_lowercase()), "{why}: {error}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(qemu) = qemu() else { return };
    let disk = || MemoryDisk::new(512).unwrap().into_disk();
    let refused = |disks: Vec<DiskSpec>, command_line: &str| {
        let mut spec = spec(tiny(Tiny::Spin), &Console::new());
        spec.disks = disks;
        spec.boot.command_line = command_line.to_owned();
        let error = qemu.create(spec).unwrap_err();
        assert_eq!(error.kind(), MachineErrorKind::Unsupported, "{error}");
    };
    refused(vec![DiskSpec::new(disk(), "a serial of 21 bytes!")], "");
    refused((0..31).map(|n| DiskSpec::new(disk(), format!("{n}"))).collect(), "");
    refused(Vec::new(), "zero\0byte");
}

#[test]
fn as_many_disks_as_promised_and_a_deep_directory() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
    fs::create_dir_all(&deep).unwrap();
    let console = Console::new();
    let mut spec = spec(tiny(Tiny::Spin), &console);
    let disk = || MemoryDisk::new(1 << 20).unwrap().into_disk();
    // Names that would mean something on a command line.
    spec.name = "a,b=c \"d\" -S".to_owned();
    spec.disks = (0..30).map(|n| DiskSpec::new(disk(), format!("a,\"b\",c={n}"))).collect();
    spec.runtime_dir.clone_from(&deep);
    let machine = qemu.create(spec).unwrap();
    machine.start().unwrap();
    assert!(fs::read_dir(&deep).unwrap().next().is_none(), "nothing lies there while it runs");
    console.reader().wait_for("up\n", soon()).unwrap();
    drop(machine);
    assert!(fs::read_dir(&deep).unwrap().next().is_none());
}

#[test]
fn a_qemu_that_is_killed_from_outside_is_a_host_failure() {
    let Some(qemu) = qemu() else { return };
    for (signal, text) in [(Signal::KILL, "SIGKILL"), (Signal::TERM, "host-signal")] {
        let console = Console::new();
        let mut spec = spec(tiny(Tiny::Spin), &console);
        spec.name = format!("outside-{}-{}", std::process::id(), signal.as_raw());
        let name = spec.name.clone();
        let machine = qemu.create(spec).unwrap();
        machine.start().unwrap();
        kill_process(child_named(&name).unwrap(), signal).unwrap();
        match exit(&*machine) {
            ExitCause::HostFailure(why) => assert!(why.contains(text), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_hook_may_kill_the_machine_that_calls_it() {
    let Some(qemu) = qemu() else { return };
    let console = Console::new();
    let machine: std::sync::Arc<dyn Machine> = qemu.create(spec(tiny(Tiny::Spin), &console)).unwrap().into();
    let weak = std::sync::Arc::downgrade(&machine);
    machine.state().subscribe(move |state| {
        if let (MachineState::Running, Some(machine)) = (state, weak.upgrade()) {
            machine.kill();
        }
    });
    // The machine may be gone before QEMU has answered.
    let _ = machine.start();
    assert_eq!(exit(&*machine), ExitCause::Killed);
}

// A QEMU that is none.

/// A program that says it is QEMU 7.2 and then does what `body` says.
fn fake(dir: &Path, body: &str) -> PathBuf {
    let path = dir.join("qemu-system-x86_64");
    let script = format!(
        "#!/bin/bash\nif [ \"$1\" = --version ]; then echo 'QEMU emulator version 7.2.0'; exit; fi\n\
         for a; do case $a in *id=qmp,fd=*) qmp=${{a##*fd=}} ;; esac; done\n{body}\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn create_with(body: &str) -> (Duration, MachineError) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tempfile::tempdir().unwrap();
    let limit = Duration::from_millis(500);
    let qemu = Qemu::with_binary(fake(dir.path(), body)).unwrap().start_within(limit);
    let mut spec = spec(tiny(Tiny::Spin), &Console::new());
    spec.disks.push(DiskSpec::new(MemoryDisk::new(512).unwrap().into_disk(), "d"));
    spec.runtime_dir = runtime.path().to_owned();
    let begun = Instant::now();
    let error = qemu.create(spec).unwrap_err();
    assert!(fs::read_dir(runtime.path()).unwrap().next().is_none(), "{body}: files are left");
    (begun.elapsed(), error)
}

#[test]
fn a_qemu_that_does_not_work_is_an_error_and_no_hang() {
    let greeting = r#"{"QMP":{"version":{},"capabilities":[]}}"#;
    let table: &[(String, &str)] = &[
        ("echo 'no such machine' >&2; exit 1".into(), "exit status: 1: no such machine"),
        ("kill -SEGV $$".into(), "SIGSEGV"),
        ("exec sleep 1000".into(), "took no commands within 500ms"),
        ("trap '' TERM INT HUP; while :; do :; done".into(), "took no commands within 500ms"),
        (format!("echo '{greeting}' >&$qmp; exec sleep 1000"), "took no commands within 500ms"),
        ("echo hello >&$qmp; exec sleep 1000".into(), "what is not QMP"),
        ("head -c 100000 /dev/zero | tr '\\0' x >&$qmp; exec sleep 1000".into(), "more than 65536 bytes"),
        (
            format!(
                r#"echo '{greeting}' >&$qmp; echo '{{"id":1,"error":{{"desc":"go away"}}}}' >&$qmp; exit 3"#
            ),
            "exit status: 3",
        ),
        ("yes >&2".into(), "took no commands within 500ms"),
    ];
    for (body, expect) in table {
        let (took, error) = create_with(body);
        assert_eq!(error.kind(), MachineErrorKind::Host, "{body}: {error}");
        assert!(error.to_string().contains(expect), "{body}: {error}");
        assert!(took < Duration::from_secs(5), "{body} took {took:?}");
    }
}

/// A machine of a fake that takes commands and answers each line with what `cases` of a shell say.
fn scripted(cases: &str) -> (tempfile::TempDir, Box<dyn Machine>) {
    scripted_within(Duration::from_secs(30), cases)
}

fn scripted_within(limit: Duration, cases: &str) -> (tempfile::TempDir, Box<dyn Machine>) {
    let body = format!(
        r#"say() {{ echo "$1" >&$qmp; }}
        ok() {{ say '{{"return":{{}},"id":'"$id"'}}'; }}
        say '{{"QMP":{{}}}}'
        while read -r line <&$qmp; do
            id=${{line##*:}}; id=${{id%\}}}}
            case $line in *qmp_capabilities*) ok ;; {cases} esac
        done"#
    );
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::with_binary(fake(dir.path(), &body)).unwrap().answer_within(limit);
    let machine = qemu.create(spec(tiny(Tiny::Spin), &Console::new())).unwrap();
    (dir, machine)
}

#[test]
fn a_processor_that_qemu_cannot_run_on_ends_the_machine() {
    let (_dir, machine) = scripted(
        r#"*cont*) say '{"event":"RESUME"}'; ok; say '{"event":"STOP"}' ;;
        *query-status*) say '{"return":{"status":"internal-error"},"id":'"$id"'}' ;;"#,
    );
    machine.start().unwrap();
    match exit(&*machine) {
        ExitCause::HostFailure(why) => assert!(why.contains("could not go on"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_refusal_is_an_error_and_changes_nothing() {
    let (_dir, machine) = scripted(
        r#"*cont*) say '{"event":"RESUME"}'; ok ;;
        *stop*) say '{"error":{"desc":"not now"},"id":'"$id"'}' ;;"#,
    );
    machine.start().unwrap();
    let error = machine.pause().unwrap_err();
    assert_eq!(error.kind(), MachineErrorKind::Host);
    assert_eq!(error.to_string(), "QEMU refused `stop`: not now");
    assert_eq!(machine.state().get(), MachineState::Running);
}

#[test]
fn a_pause_that_comes_too_late_is_taken_back() {
    // It stops when it is told the next thing, by which time nobody waits for that any more.
    let (_dir, machine) = scripted_within(
        Duration::from_secs(1),
        r#"*cont*) say '{"event":"RESUME"}'; ok ;; *stop*) late=$id ;;
        *powerdown*) ok; id=$late; say '{"event":"STOP"}'; ok ;;"#,
    );
    machine.start().unwrap();
    let (sender, states) = mpsc::channel();
    machine.state().subscribe(move |state| drop(sender.send(state.clone())));
    let error = machine.pause().unwrap_err();
    assert_eq!(error.to_string(), "QEMU did not answer `stop` within 1s");
    let error = machine.pause().unwrap_err();
    assert_eq!(error.to_string(), "QEMU has not answered the last `stop` yet");
    machine.power_button().unwrap();
    for expected in [MachineState::Paused, MachineState::Running] {
        assert_eq!(states.recv_timeout(Duration::from_secs(30)), Ok(expected));
    }
}

#[test]
fn a_kill_frees_those_who_wait_for_a_qemu_that_does_not_answer() {
    let (_dir, machine) =
        scripted(r#"*cont*) ok ;; *stop*) say '{"event":"STOP"}' ;; *query*) say '{"event":"ASKED"}' ;;"#);
    machine.start().unwrap();
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| machine.pause());
        machine.kill();
        let error = pausing.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), MachineErrorKind::WrongState, "{error}");
    });
    assert_eq!(machine.state().get(), MachineState::Exited(ExitCause::Killed));
}

#[test]
fn a_qemu_that_hangs_up_but_stays_is_ended() {
    let (_dir, machine) = scripted("*cont*) ok; eval \"exec $qmp>&-\"; exec sleep 1000 ;;");
    machine.start().unwrap();
    match exit(&*machine) {
        ExitCause::HostFailure(why) => assert!(why.contains("closed its control channel"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_or_foreign_program_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let check = |path: &Path, kind, text: &str| {
        let error = Qemu::with_binary(path).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    };
    check(&dir.path().join("nowhere"), MachineErrorKind::Missing, "apt-get install qemu-system-x86");
    check(Path::new("/bin/true"), MachineErrorKind::Host, "does not say what QEMU says");
    let old = dir.path().join("old");
    fs::write(&old, "#!/bin/sh\necho QEMU emulator version 5.2.0\n").unwrap();
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).unwrap();
    check(&old, MachineErrorKind::Missing, "QEMU 5.2; 6.2 is needed");
}

// The death of the embedder.

/// Not a test of its own: what the next one runs in a process of its own.
#[test]
#[ignore = "run by `a_child_dies_with_its_parent`"]
fn parent_to_be_killed() {
    let console = Console::new();
    let mut spec = spec(tiny(Tiny::Flood), &console);
    spec.name = format!("orphan-{}", std::process::id());
    let name = spec.name.clone();
    let machine = Qemu::find().unwrap().create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("up\n", soon()).unwrap();
    println!("\nchild {}", child_named(&name).unwrap().as_raw_nonzero());
    std::io::stdout().flush().unwrap();
    // Until it is killed.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_child_dies_with_its_parent() {
    if qemu().is_none() {
        return;
    }
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parent_to_be_killed", "--ignored", "--nocapture", "--test-threads=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let pid = lines.map_while(Result::ok).find_map(|l| l.strip_prefix("child ")?.parse().ok()).unwrap();
    let child = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    let gone = poll(&mut [PollFd::new(&child, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(gone, 1, "QEMU outlives the process that started it");
}

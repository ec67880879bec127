//! The lab, run for real on small commands.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

/// A place on the host for one test: the files it brings in and out, and what the lab itself makes.
struct Host {
    dir: TempDir,
}

impl Host {
    /// `None` where there is no QEMU; under CI that is a failure.
    fn new() -> Option<Self> {
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        if let Err(error) = qemu {
            assert!(std::env::var_os("CI").is_none(), "no QEMU for the lab: {error}");
            eprintln!("SKIPPED: there is no QEMU for the lab: {error}");
            return None;
        }
        let host = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(host.path("tmp")).unwrap();
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `--exec` of a shell script that needs the lab to be as these arguments say.
    fn exec(&self, arguments: &[&str], script: &str) -> Command {
        let program = self.path("program");
        fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut lab = self.lab(arguments);
        lab.arg("--exec").arg(program);
        lab
    }

    fn lab(&self, arguments: &[&str]) -> Command {
        let mut lab = Command::new(env!("CARGO_BIN_EXE_xtask"));
        lab.arg("lab").args(arguments).current_dir(self.dir.path()).env("TMPDIR", self.path("tmp"));
        lab.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        lab
    }

    /// Runs it to its end and checks that nothing of the lab is left.
    fn run(&self, mut lab: Command) -> Ended {
        let child = lab.spawn().unwrap();
        let id = child.id();
        let output = child.wait_with_output().unwrap();
        self.check_nothing_left(id);
        Ended::of(&output)
    }

    fn check_nothing_left(&self, lab: u32) {
        assert_eq!(fs::read_dir(self.path("tmp")).unwrap().count(), 0, "files are left in TMPDIR");
        let work = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab");
        let own = format!("{lab}-");
        let left = fs::read_dir(work).map(|entries| {
            entries.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().starts_with(&own)).count()
        });
        assert_eq!(left.unwrap_or(0), 0, "files are left in target/lab");
        let sockets = self.path("tmp").to_str().unwrap().to_owned();
        for entry in fs::read_dir("/proc").unwrap() {
            let command = fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            assert!(!command.contains(&sockets), "a process is left: {command}");
        }
    }
}

/// How a lab ended and what it said.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    output: String,
    errors: String,
}

impl Ended {
    fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { status: output.status.code(), output: text(&output.stdout), errors: text(&output.stderr) }
    }
}

#[test]
fn brings_in_runs_and_brings_back() {
    let Some(host) = Host::new() else { return };
    fs::create_dir(host.path("data")).unwrap();
    fs::write(host.path("data/inner"), "from the host\n").unwrap();
    let mut lab = host.exec(
        &["--file", "data", "--file", "data/inner:/etc/other", "--program", "tr", "--env", "WORD=it's one"]
            .into_iter()
            .chain(["--out", "/result:result", "--out", "/tmp/second:second"])
            .collect::<Vec<_>>(),
        r#"
        echo "$# $1 $2, lab $AMI_LAB, $WORD"
        cat data/inner /etc/other
        /lab/bin/tr --version | head -n 1 | cut -c 1-6
        [ -c /dev/kvm ] && ls /sys/module/kvm_amd/parameters/npt
        echo whole >/result; echo too >/tmp/second
        echo aside >&2
        exit 7"#,
    );
    lab.args(["--deadline", "a b"]);
    let ended = host.run(lab);
    assert_eq!(ended.status, Some(7), "{ended:?}");
    let expected = "2 --deadline a b, lab 1, it's one\nfrom the host\nfrom the host\ntr (GN\n\
                    /sys/module/kvm_amd/parameters/npt\n";
    assert_eq!((&*ended.output, &*ended.errors), (expected, "aside\n"));
    assert_eq!(fs::read_to_string(host.path("result")).unwrap(), "whole\n");
    assert_eq!(fs::read_to_string(host.path("second")).unwrap(), "too\n");
}

#[test]
fn is_late_after_the_deadline() {
    let Some(host) = Host::new() else { return };
    let ended = host.run(host.exec(&["--deadline", "10"], "echo begun; sleep 600"));
    assert_eq!((ended.status, &*ended.output), (Some(124), "begun\n"), "{ended:?}");
    assert_eq!(ended.errors, "error: the command was not done by its deadline\n");
}

#[test]
fn says_why_it_cannot_do_its_work() {
    let Some(host) = Host::new() else { return };
    let refused = |lab: Command, why: &str| {
        let ended = host.run(lab);
        assert_eq!((ended.status, &*ended.output), (Some(125), ""), "{ended:?}");
        assert!(ended.errors.starts_with("error: ") && ended.errors.contains(why), "{ended:?}");
    };
    refused(host.lab(&["--exec", "no-such-program"]), "there is no program no-such-program on PATH");
    refused(host.lab(&["--exec", "./absent"]), "cannot bring ./absent into the lab");
    refused(host.exec(&["--file", "absent"], ""), "cannot bring absent into the lab");
    refused(host.exec(&["--file", "program:../etc"], ""), "../etc is no absolute path in the lab");
    refused(host.exec(&["--out", "/absent:absent"], "exit 0"), "the command left no file /absent");
    assert!(!host.path("absent").exists());
}

#[test]
fn dies_with_the_process_that_runs_it() {
    let Some(host) = Host::new() else { return };
    let mut lab = host.exec(&[], "echo begun; sleep 600").spawn().unwrap();
    let mut line = String::new();
    BufReader::new(lab.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    let qemu = child_of(&lab);
    lab.kill().unwrap();
    lab.wait().unwrap();
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&qemu, PollFlags::IN)], Some(&patience)).unwrap();
    assert_eq!(ended, 1, "QEMU outlives the lab");
    host.check_nothing_left(lab.id());
}

/// A handle of the one process that `parent` has started.
fn child_of(parent: &Child) -> std::os::fd::OwnedFd {
    let parent = parent.id();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let pid = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    pidfd_open(pid, PidfdFlags::empty()).unwrap()
}

#[test]
fn counted_instructions_repeat() {
    let Some(host) = Host::new() else { return };
    let script = r#"
        now() { /lab/bin/date +%s%N; }
        now >/dev/null
        begun=$(now)
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done
        echo $(($(now) - begun))"#;
    let labs = [(); 2].map(|()| host.exec(&["--icount", "--program", "date"], script).spawn().unwrap());
    let waiting = labs.map(|lab| thread::spawn(move || Ended::of(&lab.wait_with_output().unwrap())));
    let [one, two] = waiting.map(|lab| {
        let ended = lab.join().unwrap();
        ended.output.trim().parse::<f64>().unwrap_or_else(|_| panic!("{ended:?}"))
    });
    assert!((one - two).abs() < one / 100.0, "{one} and {two} ns for the same work");
    // Far more than it takes, and far less than a clock that ran on while the host did other work.
    assert!((20e6..2e9).contains(&one), "{one} ns for 20000 turns of a loop");
}

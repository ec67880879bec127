//! What is missing on a host is asked for once and completely, before any work.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::process::{Command, Stdio};

/// What the command says on a host that has none of the programs in `/usr/bin`, apt-get among them.
fn asked_for(command: &[&str]) -> String {
    let empty = tempfile::tempdir().unwrap();
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.args(command).current_dir(empty.path()).stdin(Stdio::null());
    xtask.env("PATH", empty.path()).env("AMI_GUEST_DIR", empty.path().join("guest"));
    let output = xtask.output().unwrap();
    assert!(!output.status.success(), "{command:?} did all of its work");
    assert!(!empty.path().join("guest").exists(), "{command:?} began its work");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_command_asks_for_all_it_needs_at_once() {
    let lab = "apt dpkg fakeroot libc-bin qemu-system-x86 util-linux";
    for (command, packages) in [
        (&["quickstart", "--hypervisor", "qemu"][..], "apt dpkg fakeroot qemu-system-x86"),
        (&["guest"], "apt dpkg fakeroot"),
        (&["lab", "--exec", "/bin/sh"], lab),
        (&["test"], &format!("{lab} fio libnbd-bin lz4 qemu-utils xz-utils")),
    ] {
        let said = asked_for(command);
        for package in packages.split(' ') {
            assert!(said.contains(&format!(" {package} ")), "{command:?} does not ask for {package}: {said}");
        }
    }
}

//! The initial RAM disks that tests, benchmarks and the lab boot.

use std::fs;

use ami_core::{Digest, DigestWriter};
use anyhow::Context as _;
use quick_start::{Initrd, Sources};

use crate::{bare_guest, process};

const CONFORMANCE_INIT: &str = include_str!("../../guest/conformance-init.sh");
const CONFORMANCE_BUTTON: &str = include_str!("../../guest/conformance-button.sh");
const LAB_INIT: &str = include_str!("../../guest/lab-init.sh");
/// A program that busybox does not have.
const VSOCK: &str = include_str!("../../guest/vsock.c");

/// The digest of all that decides what they, and the disks of [`others`](super::others), hold, apart from the packages and
/// the C compiler.
pub(crate) fn recipes() -> Digest {
    let mut digest = DigestWriter::new();
    let quick_start = quick_start::made_by().to_hex();
    for text in [
        &*quick_start,
        include_str!("initrds.rs"),
        include_str!("others.rs"),
        CONFORMANCE_INIT,
        CONFORMANCE_BUTTON,
        LAB_INIT,
        VSOCK,
        include_str!("../../../hypervisor-kvm/tests/common/guest.rs"),
    ] {
        digest.update(&(text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    }
    digest.finish()
}

/// The initrd that is the conformance guest.
pub(crate) fn conformance(sources: &Sources) -> anyhow::Result<Vec<u8>> {
    const MODULES: &[&str] = &[
        "virtio_mmio",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_balloon",
        "virtio_console",
        "vmw_vsock_virtio_transport",
        "pvpanic_mmio",
        "button",
        "evdev",
    ];
    const APPLETS: &[&str] = &[
        "acpid",
        "cat",
        "dd",
        "echo",
        "head",
        "ifconfig",
        "insmod",
        "kill",
        "mount",
        "nproc",
        "poweroff",
        "printf",
        "readlink",
        "reboot",
        "rm",
        "run-parts",
        "sh",
        "stty",
        "tr",
        "truncate",
    ];
    let vsock = compile(VSOCK)?;
    let initrd = Initrd::new(CONFORMANCE_INIT)
        .modules(MODULES)
        .applets(APPLETS)
        .program("etc/acpi/PWRF/00000080", CONFORMANCE_BUTTON.as_bytes())
        .program("bin/vsock", &vsock);
    Ok(initrd.build(sources)?)
}

/// The initrd that reboots as soon as it is up.
pub(crate) fn boot(sources: &Sources) -> anyhow::Result<Vec<u8>> {
    Ok(Initrd::new("#!/bin/sh\nexec reboot -f\n").applets(&["reboot", "sh"]).build(sources)?)
}

/// The initrd of the lab.
pub(crate) fn lab(sources: &Sources) -> anyhow::Result<Vec<u8>> {
    const MODULES: &[&str] = &[
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_console",
        "ext4",
        "kvm_amd",
        "tun",
        "bridge",
        "vhost_net",
    ];
    const APPLETS: &[&str] = &[
        "cat", "chmod", "chroot", "echo", "insmod", "ip", "ln", "mkdir", "mount", "poweroff", "sh", "usleep",
    ];
    Ok(Initrd::new(LAB_INIT).modules(MODULES).applets(APPLETS).build(sources)?)
}

/// Compiles a program with the host's C compiler, which is there wherever Rust links programs, as code that every x86
/// guest's kernel runs.
fn compile(source: &str) -> anyhow::Result<Vec<u8>> {
    let dir = tempfile::tempdir().context("cannot make a directory to compile in")?;
    let (text, program) = (dir.path().join("program.c"), dir.path().join("program"));
    fs::write(&text, source).context("cannot write a guest's program")?;
    process::output(process::command("cc").args(bare_guest::FLAGS).arg(&text).arg("-o").arg(&program))
        .context("cannot compile a guest's program")?;
    fs::read(&program).context("cannot read a guest's program")
}

//! The bare-metal guest of `tests/guest`, built from its source with the host's C compiler, which is there
//! wherever Rust links programs. Where it is not, as in the lab, `AMI_BARE_GUEST` names a built one.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use instance_core::machine::{Boot, BootFile};

/// No library, no 64-bit code, no instruction that an emulator may not know.
pub(crate) const FLAGS: &[&str] = &[
    "-m32",
    "-march=i386",
    "-mgeneral-regs-only",
    "-Os",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
];
const SOURCES: &[&str] = &[
    "entry.S",
    "user.S",
    "storm64.S",
    "main.c",
    "cpus.c",
    "time.c",
    "disk.c",
    "net.c",
    "smbios.c",
    "storm.c",
    "pci.c",
    "queue.c",
    "misuse.c",
    "flood.c",
    "vsock.c",
    "balloon.c",
    "console.c",
];

/// The guest as an ELF file, built once in a process.
///
/// # Errors
///
/// Text that says what the compiler said, or that there is none.
pub(crate) fn elf() -> Result<&'static [u8], String> {
    static BUILT: OnceLock<Result<Vec<u8>, String>> = OnceLock::new();
    BUILT.get_or_init(build).as_deref().map_err(Clone::clone)
}

/// The guest as what a machine boots.
///
/// # Errors
///
/// As [`elf`].
pub(crate) fn boot() -> Result<Boot, String> {
    let in_file = |elf: &[u8]| -> std::io::Result<File> {
        let mut file = tempfile::tempfile()?;
        file.write_all(elf)?;
        file.rewind()?;
        Ok(file)
    };
    let kernel = in_file(elf()?).and_then(BootFile::new);
    Ok(Boot::new(kernel.map_err(unreadable)?, None, ""))
}

/// The guest as a 64-bit ELF file, which is what an image for 64-bit x86 may carry. Its code is the same.
///
/// # Errors
///
/// As [`elf`], with `objcopy` of the binutils.
pub(crate) fn elf64() -> Result<Vec<u8>, String> {
    let dir = directory()?;
    let [narrow, wide] = ["narrow", "wide"].map(|name| dir.path().join(name));
    std::fs::write(&narrow, elf()?).map_err(unreadable)?;
    run(Command::new("objcopy").args(["-I", "elf32-i386", "-O", "elf64-x86-64"]).args([&narrow, &wide]))?;
    std::fs::read(&wide).map_err(unreadable)
}

fn build() -> Result<Vec<u8>, String> {
    if let Some(built) = std::env::var_os("AMI_BARE_GUEST") {
        return std::fs::read(built).map_err(unreadable);
    }
    let dir = directory()?;
    let elf = dir.path().join("guest.elf");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hypervisor-kvm/tests/guest");
    run(Command::new("cc")
        .current_dir(source)
        .args(FLAGS)
        .arg("-Wl,-T,link.ld")
        .arg("-o")
        .arg(&elf)
        .args(SOURCES))?;
    std::fs::read(&elf).map_err(unreadable)
}

fn directory() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|e| format!("cannot make a directory for the bare-metal guest: {e}"))
}

fn unreadable(error: std::io::Error) -> String {
    format!("cannot read or write the bare-metal guest: {error}")
}

/// Runs one of the host's tools for building programs.
fn run(tool: &mut Command) -> Result<(), String> {
    let name = tool.get_program().to_string_lossy().into_owned();
    let done =
        tool.output().map_err(|e| format!("cannot run `{name}` to build the bare-metal guest: {e}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(format!("`{name}` cannot build the bare-metal guest:\n{said}"));
    }
    Ok(())
}

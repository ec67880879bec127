//! The bare-metal guest of `tests/guest`, built from its source with the host's C compiler, which is there
//! wherever Rust links programs. Where it is not, as in the lab, `AMI_BARE_GUEST` names a built one.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use instance_core::machine::{Boot, BootFile};

/// No library, no 64-bit code, no instruction that an emulator may not know.
const FLAGS: &[&str] = &[
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
    "-Wl,-T,link.ld",
];
const SOURCES: &[&str] = &["entry.S", "user.S", "main.c", "cpus.c", "disk.c"];

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
    Ok(Boot::new(kernel.map_err(|e| format!("cannot keep the bare-metal guest: {e}"))?, None, ""))
}

fn build() -> Result<Vec<u8>, String> {
    let unreadable = |e| format!("cannot read the bare-metal guest: {e}");
    if let Some(built) = std::env::var_os("AMI_BARE_GUEST") {
        return std::fs::read(built).map_err(unreadable);
    }
    let dir = tempfile::tempdir().map_err(|e| format!("cannot make a directory: {e}"))?;
    let elf = dir.path().join("guest.elf");
    let compiler = Command::new("cc")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../hypervisor-kvm/tests/guest"))
        .args(FLAGS)
        .arg("-o")
        .arg(&elf)
        .args(SOURCES)
        .output()
        .map_err(|e| format!("cannot run `cc`, the C compiler, to build the bare-metal guest: {e}"))?;
    if !compiler.status.success() {
        let said = String::from_utf8_lossy(&compiler.stderr);
        return Err(format!("`cc` cannot build the bare-metal guest:\n{said}"));
    }
    std::fs::read(&elf).map_err(unreadable)
}

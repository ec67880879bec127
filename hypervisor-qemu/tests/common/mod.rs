//! What the tests share: QEMU, and guests to boot.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test file uses its part"
)]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use hypervisor_qemu::Qemu;
use instance_core::console::Console;
use instance_core::machine::{Boot, BootFile, MachineErrorKind, MachineSpec};

/// Long enough for a guest under emulation on a loaded machine.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// QEMU, or `None` with a loud reason; in CI it must be there.
pub fn qemu() -> Option<Qemu> {
    match Qemu::find() {
        Ok(qemu) => Some(qemu),
        Err(e) if e.kind() == MachineErrorKind::Missing => {
            skip(&e.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Says why a test does nothing. In CI nothing may be skipped.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI, but: {reason}");
    eprintln!("SKIPPED: {reason}");
}

/// The conformance guest that `cargo xtask guest` makes, or `None` with a loud reason.
pub fn linux() -> Option<Boot> {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    let dir = std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from);
    let (kernel, initrd) = (dir.join("amd64/vmlinuz"), dir.join("amd64/conformance.img"));
    let Ok(packed) = std::fs::read(&kernel) else {
        skip(&format!("there is no {}: run `cargo xtask guest`", kernel.display()));
        return None;
    };
    let unpacked = boot_image::unpack_kernel(&packed).unwrap();
    let initrd = BootFile::new(File::open(initrd).unwrap()).unwrap();
    Some(Boot::new(boot_file(&unpacked.image), Some(initrd), "console=ttyS0 quiet panic=-1"))
}

/// A file without a name that holds `bytes`.
pub fn boot_file(bytes: &[u8]) -> BootFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    BootFile::new(file).unwrap()
}

pub fn spec(boot: Boot, console: &Console) -> MachineSpec {
    MachineSpec::new("test", Architecture::X86_64, boot, console.port())
}

/// What a guest of a few instructions does. Flat 32-bit protected mode, interrupts off, no stack.
#[derive(Debug, Clone, Copy)]
pub enum Tiny {
    /// Loops.
    Spin,
    /// Writes sleep type 0 and the enable bit to the ACPI power management register.
    PowerOff,
    /// Asks the chipset for a reset.
    Reset,
    /// Raises an exception without an interrupt table.
    TripleFault,
    /// Says by pvpanic that it panicked.
    Panic,
    /// Writes to the serial port for ever.
    Flood,
    /// Writes back what is typed.
    Echo,
}

/// An ELF kernel with a PVH note that prints `up` and a newline, and then does `what`.
pub fn tiny(what: Tiny) -> Boot {
    let mut code: Vec<u8> = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in *b"up\n" {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    // The ports are those of QEMU's q35.
    code.extend(match what {
        Tiny::Spin => vec![],
        // mov dx, 0x604; mov ax, 0x2000; out dx, ax
        Tiny::PowerOff => vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef],
        // mov dx, 0xcf9; mov al, 6; out dx, al
        Tiny::Reset => vec![0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee],
        // lidt [zeroes]; ud2
        Tiny::TripleFault => vec![0x0f, 0x01, 0x1d, 0x40, 0x00, 0x10, 0x00, 0x0f, 0x0b],
        // mov dx, 0x505; mov al, 1; out dx, al
        Tiny::Panic => vec![0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee],
        Tiny::Flood => vec![0xee, 0xeb, 0xfd], // out dx, al; jmp back
        // mov dl, 0xfd; in al, dx; and al, 0x21; cmp al, 0x21; jne back; mov dl, 0xf8; in al, dx; out dx, al;
        // jmp back. It writes when the port takes another byte: one written before that is lost.
        Tiny::Echo => {
            let ready = [0xb2, 0xfd, 0xec, 0x24, 0x21, 0x3c, 0x21, 0x75, 0xf9];
            [&ready[..], &[0xb2, 0xf8, 0xec, 0xee, 0xeb, 0xf1]].concat()
        }
    });
    code.extend([0xeb, 0xfe]); // jmp self
    Boot::new(boot_file(&elf(&code)), None, "")
}

/// A 32-bit ELF file for i386 whose `code` lies at 1 MiB + 0x80, after 0x80 bytes of zeroes but for the
/// PVH note at their start, which names it as the entry.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const TEXT: u32 = 0x80;
    const HEADERS: u32 = 52 + 2 * 32;
    // Name size, descriptor size, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), "Xen\0", the entry.
    let mut segment: Vec<u8> = words(&[4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE + TEXT]);
    let note_len = segment.len() as u32;
    segment.resize(TEXT as usize, 0);
    segment.extend(code);
    let len = segment.len() as u32;

    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(halves(&[2, 3])); // an executable for i386
    file.extend(words(&[1, BASE + TEXT, 52, 0, 0])); // version, entry, program headers at 52
    file.extend(halves(&[52, 32, 2, 0, 0, 0])); // two of 32 bytes
    file.extend(words(&[1, HEADERS, BASE, BASE, len, len, 7, 4])); // PT_LOAD
    file.extend(words(&[4, HEADERS, BASE, BASE, note_len, note_len, 4, 4])); // PT_NOTE
    file.extend(segment);
    file
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn halves(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

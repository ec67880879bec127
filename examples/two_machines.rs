//! Two machines live and die in one process, on the traits alone: no region, no image, no files but the
//! kernel's. On KVM where it runs kernels on the processor, else on QEMU.
//!
//! `cargo run -p ami-examples --example two_machines -- DIRECTORY` with the guests that
//! `cargo xtask guest` makes.

use std::error::Error;
use std::path::PathBuf;

use ami_core::Architecture;
use ami_examples::{boot, hypervisor, soon};
use instance_core::console::Console;
use instance_core::machine::{Boot, DiskSpec, Hypervisor, Machine, MachineSpec};
use storage_block::{Disk, MemoryDisk};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).map_or_else(|| PathBuf::from("target/guest"), PathBuf::from);
    let hypervisor = hypervisor()?;
    println!("two machines on {}", hypervisor.capabilities().name);
    let boot = boot(&dir.join("amd64"))?;
    let one = Server::new(hypervisor.as_ref(), &boot, "one")?;
    let two = Server::new(hypervisor.as_ref(), &boot, "two")?;
    for server in [&one, &two] {
        server.ask(&format!("write 0 0 {}", server.name), "wrote")?;
        println!("{} wrote {:?} to its disk", server.name, server.first_word()?);
    }

    // Its threads, its memory and its descriptors go with it.
    drop(one);
    two.ask("ping anyone", "pong anyone")?;
    println!("one is gone, two answers");

    two.console.write_all(b"poweroff\n", soon())?;
    let end = two.machine.state().wait(soon(), |state| state.exit_cause().is_some());
    println!("two ended: {:?}", end.map_err(|state| format!("two is still {state:?}"))?);
    Ok(())
}

/// A machine that is up, with all that belongs to it.
struct Server {
    name: &'static str,
    // Dropped before the directory that it uses.
    machine: Box<dyn Machine>,
    console: Console,
    disk: Disk,
    _runtime_dir: tempfile::TempDir,
}

impl Server {
    fn new(hypervisor: &dyn Hypervisor, boot: &Boot, name: &'static str) -> Result<Self, Box<dyn Error>> {
        let (console, disk) = (Console::new(), MemoryDisk::new(1 << 20)?.into_disk());
        let runtime_dir = tempfile::tempdir()?;
        let mut spec = MachineSpec::new(name, Architecture::X86_64, boot.clone(), console.port());
        spec.disks = vec![DiskSpec::new(disk.clone(), name)];
        spec.runtime_dir = runtime_dir.path().to_owned();
        let machine = hypervisor.create(spec)?;
        machine.start()?;
        console.reader().wait_for("GUEST READY", soon())?;
        Ok(Self { name, machine, console, disk, _runtime_dir: runtime_dir })
    }

    fn ask(&self, line: &str, answer: &str) -> Result<(), Box<dyn Error>> {
        let mut reader = self.console.reader_from_now();
        self.console.write_all(format!("{line}\n").as_bytes(), soon())?;
        reader.wait_for(answer, soon())?;
        Ok(())
    }

    /// What the host sees on the disk.
    fn first_word(&self) -> Result<String, Box<dyn Error>> {
        let mut bytes = [0; 16];
        self.disk.read_at(&mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
    }
}

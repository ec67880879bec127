//! The whole of it in thirty lines: a disk becomes an image, the image becomes a server, the server
//! becomes an image, and that becomes its twin.
//!
//! `cargo run -p ami-examples --example embed -- DISK` with a raw disk that boots to a shell on its
//! serial console and says `AMI GUEST READY`, as `cargo xtask guest` makes it.

use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use hypervisor_qemu::Qemu;
use instance_core::shell::Shell;
use instance_core::{ImageSource, LaunchSpec, Region};
use storage_block::RawFile;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "target/guest/amd64/disk.raw".to_owned());
    let dir = tempfile::tempdir()?;
    let region = Region::open(dir.path(), Qemu::find()?)?;
    let disk = RawFile::open(path, true)?.into_disk();
    let base = region.register_image(Ami::<X86_64>::builder("base"), ImageSource::new(&disk))?;
    let soon = || Instant::now() + Duration::from_secs(120);

    let server = region.launch(&base, LaunchSpec::new("t2.nano".parse()?))?;
    server.console().reader().wait_for("AMI GUEST READY", soon())?;
    let mut shell = Shell::connect(&server.console(), soon())?;
    shell.write_file("/root/greeting", b"hello from the first\n", soon())?;

    let child = server.create_image("with-greeting")?;
    println!("{} has {} bytes more than {}", child.ami.id(), child.stored_bytes, base.id());
    let twin = region.launch(&child.ami.typed::<X86_64>()?, LaunchSpec::new("t2.nano".parse()?))?;
    twin.console().reader().wait_for("AMI GUEST READY", soon())?;
    let greeting = Shell::connect(&twin.console(), soon())?.read_file("/root/greeting", soon())?;
    print!("{} says: {}", twin.id(), String::from_utf8_lossy(&greeting));

    server.terminate()?;
    twin.terminate()?;
    Ok(())
}

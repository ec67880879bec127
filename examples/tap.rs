//! A machine in the host's own network: its port is on a TAP device, whose frames the host's kernel routes, and on KVM
//! moves, too, where it has vhost-net. No switch, no firewall, no NAT: who may make network devices decides about them.
//!
//! `cargo run -p ami-examples --example tap -- DIRECTORY` with the guests that `cargo xtask guest` makes; it needs
//! root's rights over the host's network, and iproute2's `ip`.

use std::error::Error;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ami_core::Architecture;
use ami_examples::{boot, hypervisor, soon};
use instance_core::console::Console;
use instance_core::machine::{MachineSpec, NetSpec};
use instance_core::net::Tap;

/// A network for tests alone (RFC 2544), of the host and the guest.
const HOST: &str = "198.18.7.1/24";
const GUEST: [u8; 4] = [198, 18, 7, 2];

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).map_or_else(|| PathBuf::from("target/guest"), PathBuf::from);
    let hypervisor = hypervisor()?;

    // It goes with the machine: whoever wants it to stay makes it with `ip tuntap add mode tap` before.
    let tap = Tap::open("ami-example%d")?;
    let name = tap.name().to_owned();
    ip(&["address", "add", HOST, "dev", &name])?;
    ip(&["link", "set", &name, "up"])?;

    let console = Console::new();
    let runtime_dir = tempfile::tempdir()?;
    let mut spec = MachineSpec::new("tap", Architecture::X86_64, boot(&dir.join("amd64"))?, console.port());
    spec.runtime_dir = runtime_dir.path().to_owned();
    spec.nets = vec![NetSpec::new(tap.into_port(), "02:00:c6:12:07:02".parse()?)];
    let machine = hypervisor.create(spec)?;
    machine.start()?;
    let mut reader = console.reader();
    reader.wait_for("GUEST READY", soon())?;
    let [a, b, c, d] = GUEST;
    console.write_all(format!("up 0 {a}.{b}.{c}.{d}\n").as_bytes(), soon())?;
    reader.wait_for("up", soon())?;
    println!("a machine on {} is at the host's {name}", hypervisor.capabilities().name);

    // Nothing listens there, which the guest's kernel says itself.
    let answer = TcpStream::connect_timeout(&SocketAddr::from((GUEST, 80)), Duration::from_secs(30));
    match answer {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => println!("it answers: {error}"),
        other => return Err(format!("it does not answer as it should: {other:?}").into()),
    }
    drop(machine);
    let is_there = Path::new("/sys/class/net").join(&name).exists();
    println!("its device is {}", if is_there { "still there" } else { "gone with it" });
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let said = Command::new("ip").args(arguments).output().map_err(|e| format!("cannot run `ip`: {e}"))?;
    let why = String::from_utf8_lossy(&said.stderr);
    if said.status.success() { Ok(()) } else { Err(format!("ip {}: {why}", arguments.join(" ")).into()) }
}

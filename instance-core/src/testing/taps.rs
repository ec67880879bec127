//! Cables that lead through the host's kernel, for tests of network ports on TAP devices.
//!
//! A machine's port is on a TAP device, which a bridge of the host's joins with another one, whose frames a thread moves
//! to and from a port of the test's. It takes iproute2's `ip` and the right to make network devices.
//!
//! ```no_run
//! use instance_core::net::Frame;
//! use instance_core::testing::taps;
//!
//! taps::available()?;
//! let link = taps::link();
//! link.network.send(Frame::new(vec![0xff; 60]))?; // to all stations: it will be at `link.machine`
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::conformance::Link;
use crate::net::{self, NetPort, Tap};

/// That such cables can be made here.
///
/// # Errors
///
/// Why not.
pub fn available() -> io::Result<()> {
    Tap::open("ami-try%d")?;
    ip(&["link", "show"])
}

/// A way from a machine's port, which is on a TAP device. All that is made for it goes when the test's end does.
///
/// # Panics
///
/// Where it is not [`available`].
pub fn link() -> Link {
    static BRIDGES: AtomicUsize = AtomicUsize::new(0);
    let open = |name| Tap::open(name).expect("there are TAP devices");
    let (machines, hosts) = (open("ami-m%d"), open("ami-h%d"));
    let number = BRIDGES.fetch_add(1, Ordering::Relaxed);
    let bridge = Bridge(format!("ami-{}-{number}", std::process::id()));
    let ip = |arguments: &[&str]| ip(arguments).expect("the host's devices are what they should be");
    // Nor does a bridge that does not snoop say anything of its own.
    ip(&["link", "add", &bridge.0, "type", "bridge", "mcast_snooping", "0"]);
    for name in [&bridge.0, machines.name(), hosts.name()] {
        // Which has things to say of its own.
        let no_ipv6 = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if Path::new(&no_ipv6).exists() {
            std::fs::write(no_ipv6, "1").expect("devices may go without IPv6");
        }
    }
    for name in [machines.name(), hosts.name()] {
        ip(&["link", "set", name, "master", &bridge.0]);
    }
    for name in [&bridge.0, machines.name(), hosts.name()] {
        ip(&["link", "set", name, "up"]);
    }
    let (near, far) = net::link();
    let hosts = hosts.into_port();
    thread::spawn(move || carry(&hosts, &near, bridge));
    let device = Path::new("/sys/class/net").join(machines.name());
    Link { machine: machines.into_port(), network: far, is_held: Box::new(move || device.exists()) }
}

/// Moves frames between a TAP device and a cable, until that has no other end.
fn carry(device: &NetPort, cable: &NetPort, bridge: Bridge) {
    let woken = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("there are eventfds");
    let woken = Arc::new(woken);
    let wake = woken.clone();
    cable.set_waker(Some(Arc::new(move || _ = rustix::io::write(&wake, &1u64.to_ne_bytes()))));
    let readable = device.descriptor().expect("a TAP device has one");
    while cable.is_connected() && device.is_connected() {
        let waited = [&readable, &woken].map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
        let _ = poll(&mut { waited }, None);
        let _ = rustix::io::read(&woken, &mut [0; 8]);
        std::iter::from_fn(|| device.recv()).for_each(|frame| _ = cable.send(frame));
        std::iter::from_fn(|| cable.recv()).for_each(|frame| _ = device.send(frame));
    }
    drop(bridge);
}

struct Bridge(String);

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Err(error) = ip(&["link", "delete", &self.0]) {
            eprintln!("{error}");
        }
    }
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let said = Command::new("ip").args(arguments).output();
    let said = said.map_err(|error| io::Error::new(error.kind(), format!("cannot run `ip`: {error}")))?;
    if said.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&said.stderr);
    Err(io::Error::other(format!("ip {}: {}", arguments.join(" "), why.trim())))
}

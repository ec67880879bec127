//! What a user has to know to log in to an instance.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use common::PATIENCE;
use common::region::{Idle, image, open, spec};
use instance_core::testing::FakeHypervisor;
use instance_core::{ErrorKind, Region, SshAccess};
use network_vpc::{Direction, Rule};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";
const OTHER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJm";

fn shown(key: &str) -> String {
    format!("-----BEGIN SSH HOST KEY KEYS-----\r\n{key} root@web\r\n-----END SSH HOST KEY KEYS-----\r\n")
}

/// What a copy of a region's directory says that nobody has closed, as a crash leaves it.
fn after_a_crash(dir: &Path) -> Option<SshAccess> {
    let copy = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp").arg("-a").arg(dir.join(".")).arg(copy.path()).status();
    assert!(copied.unwrap().success());
    let (region, _) = open(copy.path(), FakeHypervisor::new());
    region.instances().pop().unwrap().ssh("debian").ok()
}

#[test]
fn the_way_in_and_the_host_keys_stay_with_the_instance() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Idle::new();
    let (region, network) = open(dir.path(), machines.clone());
    let ami = image(&region);
    let group = network.create_security_group(network.default_vpc().unwrap(), "ssh", "").unwrap().id;
    network.authorize(group, Direction::Ingress, Rule::tcp(22, "127.0.0.1/32".parse().unwrap())).unwrap();
    let server = region.launch(&ami, spec().security_group(group)).unwrap();
    let (mut guest, console) = machines.guest();
    for (user, kind) in
        [("debian", ErrorKind::HostKeysUnknown), ("-oProxyCommand=x", ErrorKind::InvalidParameter)]
    {
        assert_eq!(server.ssh(user).unwrap_err().kind(), kind, "{user}");
    }
    let place = server.describe().network.unwrap();
    assert!(network.interface(place.interface_id).unwrap().forwards.is_empty(), "nothing leads in by then");

    console.write_output(shown(KEY).as_bytes());
    let access = server.ssh("debian").unwrap();
    assert_eq!((&*access.user, &*access.host_keys), ("debian", &[KEY.to_owned()][..]));
    assert!(access.at.ip().is_loopback());
    let listener = guest.listen(22);
    let at = access.at;
    let client = thread::spawn(move || {
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(b"SSH-2.0-").unwrap();
        client.read(&mut [0; 1]).unwrap()
    });
    guest.until(|guest| guest.tcp(listener).can_recv().then_some(())).unwrap();
    assert_eq!(guest.hear(listener, 8), b"SSH-2.0-");
    guest.tcp(listener).close();
    guest.until(|guest| (!guest.tcp(listener).is_open()).then_some(()));
    assert_eq!(client.join().unwrap(), 0);

    console.write_output(&b"much that came later\n".repeat(10_000));
    assert_eq!(server.ssh("debian").unwrap(), access);
    let deadline = Instant::now() + PATIENCE;
    while after_a_crash(dir.path()).is_none_or(|found| found.host_keys != access.host_keys) {
        assert!(Instant::now() < deadline, "the keys are not kept");
    }
    drop((guest, console, server, region, network));

    let (region, network) = open(dir.path(), machines.clone());
    let server = region.instances().pop().unwrap();
    assert_eq!(server.ssh("debian").unwrap(), access, "in a region that was opened again");
    server.start().unwrap();
    let (_guest, console) = machines.guest();
    console.write_output(shown(OTHER).as_bytes());
    drop((server, region, network));
    let (region, _network) = open(dir.path(), machines);
    let server = region.instances().pop().unwrap();
    assert_eq!(server.ssh("debian").unwrap().host_keys, [OTHER], "those that were shown last");
    server.terminate().unwrap();
    assert_eq!(server.ssh("debian").unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
}

#[test]
fn without_a_network_nothing_leads_in() {
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let server = region.launch(&image(&region), spec()).unwrap();
    assert_eq!(server.ssh("debian").unwrap_err().kind(), ErrorKind::Unsupported);
}

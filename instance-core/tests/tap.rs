//! TAP devices, where this process may make some.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use instance_core::net::{Frame, Offloads, SendError, Tap};
use instance_core::testing::taps;

/// Else says why. Under CI they can.
fn can_be_made() -> bool {
    let Err(error) = taps::available() else { return true };
    assert!(std::env::var_os("CI").is_none(), "nothing may be skipped under CI, but: {error}");
    eprintln!("SKIPPED: {error}");
    false
}

fn is_there(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

#[test]
fn a_device_goes_with_the_last_that_holds_it() {
    if !can_be_made() {
        return;
    }
    let tap = Tap::open("ami-t%d").unwrap();
    let name = tap.name().to_owned();
    assert!(name.starts_with("ami-t") && is_there(&name));
    let taken = Tap::open(&name).unwrap_err();
    assert!(taken.to_string().contains(&name) && taken.kind() == ErrorKind::ResourceBusy, "{taken}");

    let port = tap.into_port();
    let lent = Tap::from_fd(port.descriptor().unwrap().try_clone().unwrap()).unwrap();
    assert_eq!((lent.name(), port.tap().unwrap().name()), (name.as_str(), name.as_str()));
    drop(port);
    assert!(is_there(&name));
    drop(lent);
    assert!(!is_there(&name));
}

#[test]
fn what_is_none_is_refused() {
    let null = File::open("/dev/null").unwrap();
    assert_eq!(Tap::from_fd(null.into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    if !can_be_made() {
        return;
    }
    for name in ["sixteen-letters-", "a\0b", "a/b"] {
        assert_eq!(Tap::open(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
    }
}

#[test]
fn frames_go_through_the_hosts_kernel_as_they_were_left() {
    if !can_be_made() {
        return;
    }
    let (machine, network) = taps::link();
    assert_eq!((machine.peer_takes(), machine.takes()), (Offloads::ALL, Offloads::NONE));
    machine.set_takes(Offloads::ALL);
    assert_eq!(machine.takes(), Offloads::ALL);
    let mut to_all = vec![0xff; 60];
    to_all[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 0x88, 0xb5]); // for experiments (IEEE 802)
    let (wake, woken) = std::sync::mpsc::channel();
    network.set_waker(Some(std::sync::Arc::new(move || _ = wake.send(()))));
    machine.send(Frame::new(to_all.clone())).unwrap();
    let heard = loop {
        match network.recv() {
            Some(frame) => break frame,
            None => woken.recv_timeout(std::time::Duration::from_secs(20)).unwrap(),
        }
    };
    assert_eq!(heard, Frame::new(to_all));
}

#[test]
fn a_device_that_is_deleted_has_gone() {
    if !can_be_made() {
        return;
    }
    let port = Tap::open("ami-t%d").unwrap().into_port();
    assert!(port.recv().is_none() && port.is_connected());
    // One that is down loses what is sent.
    assert_eq!(port.send(Frame::new(vec![0xff; 60])), Ok(()));
    let deleted = Command::new("ip").args(["link", "delete", port.tap().unwrap().name()]).status();
    assert!(deleted.unwrap().success());
    assert_eq!(port.send(Frame::new(vec![0xff; 60])), Err(SendError::Disconnected));
    assert!(port.recv().is_none() && !port.is_connected());
}

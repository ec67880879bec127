//! What follows the end of one instance's machine keeps no other waiting.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;
#[path = "common/gate.rs"]
mod gates;

use std::path::Path;
use std::sync::{Mutex, mpsc};
use std::thread;

use ami_core::{Ami, X86_64};
use common::{PATIENCE, ask, open, register, soon, spec};
use gates::{Gate, Keeper, gate};
use instance_core::testing::FakeHypervisor;
use instance_core::{ErrorKind, Instance, InstanceState, LaunchSpec, Region, ShutdownBehavior};

/// A region whose machines are made when its keeper says so.
fn world(dir: &Path) -> (Region<Gate>, Keeper, Ami<X86_64>) {
    let ami = register(&open(dir));
    let (gate, keeper) = gate();
    (Region::open(dir, gate).unwrap(), keeper, ami)
}

/// Launches an instance, whose machine is let be made.
fn launch(region: &Region<Gate>, (asked, says): &Keeper, ami: &Ami<X86_64>, spec: LaunchSpec) -> Instance {
    says.send(true).unwrap();
    let instance = region.launch(ami, spec).unwrap();
    asked.recv_timeout(PATIENCE).unwrap();
    instance
}

fn tell(instance: &Instance, line: &str) {
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
}

#[test]
fn an_instance_that_powers_itself_off_is_seen_while_others_reboot() {
    let dir = tempfile::tempdir().unwrap();
    let (region, keeper, ami) = world(dir.path());
    let rebooting: Vec<_> = (0..4).map(|_| launch(&region, &keeper, &ami, spec())).collect();
    let stopping = launch(&region, &keeper, &ami, spec());
    let ending = launch(&region, &keeper, &ami, spec().shutdown_behavior(ShutdownBehavior::Terminate));
    rebooting.iter().for_each(|instance| tell(instance, "reboot"));
    // The new machine of one is being made, and that does not end.
    let (asked, says) = keeper;
    asked.recv_timeout(PATIENCE).unwrap();
    tell(&stopping, "poweroff");
    tell(&ending, "poweroff");
    stopping.wait_for(InstanceState::Stopped, soon()).unwrap();
    ending.wait_for(InstanceState::Terminated, soon()).unwrap();
    for instance in &rebooting {
        assert_eq!(instance.state(), InstanceState::Running);
    }
    drop(says);
    for instance in &rebooting {
        ask(instance, "ping again", "pong again");
    }
}

/// Of those that reset themselves two at most have their machines made; what is done to the others waits for nothing.
#[test]
fn a_reboot_that_waits_for_its_turn_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let (region, keeper, ami) = world(dir.path());
    let rebooting: Vec<_> = (0..4).map(|_| launch(&region, &keeper, &ami, spec())).collect();
    let changes = region.state_changes();
    rebooting.iter().for_each(|instance| tell(instance, "reboot"));
    keeper.0.recv_timeout(PATIENCE).unwrap();
    let (told, ended) = mpsc::channel();
    for instance in rebooting {
        let told = told.clone();
        thread::spawn(move || told.send(instance.terminate()));
    }
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    drop(keeper);
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    let gone = changes.try_iter().filter(|change| change.state == InstanceState::Terminated);
    assert_eq!(gone.count(), 4);
}

#[test]
fn a_region_that_is_closed_meanwhile_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (region, keeper, ami) = world(dir.path());
    let rebooting: Vec<_> = (0..4).map(|_| launch(&region, &keeper, &ami, spec())).collect();
    let stopping = launch(&region, &keeper, &ami, spec());
    rebooting.iter().for_each(|instance| tell(instance, "reboot"));
    let (asked, says) = keeper;
    asked.recv_timeout(PATIENCE).unwrap();
    tell(&stopping, "poweroff");
    stopping.wait_for(InstanceState::Stopped, soon()).unwrap();
    let ids: Vec<_> = rebooting.iter().map(Instance::id).collect();
    drop((rebooting, stopping));
    let closing = thread::spawn(move || drop(region));
    drop(says);
    closing.join().unwrap();
    // The hypervisor is gone with the region, and so is who was making a machine.
    let left = std::iter::repeat_with(|| asked.try_recv()).find_map(Result::err);
    assert_eq!(left, Some(mpsc::TryRecvError::Disconnected), "somebody has the region yet");
    let region = open(dir.path());
    for id in ids {
        let instance = region.instance(id).unwrap();
        assert_eq!(instance.state(), InstanceState::Stopped);
        instance.start().unwrap();
        ask(&instance, "ping again", "pong again");
    }
}

/// The last handle goes in a thread that follows an end, which waits neither for itself nor for the others.
#[test]
fn a_region_whose_last_handle_goes_with_who_is_told_is_closed_when_all_have_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (region, keeper, ami) = world(dir.path());
    let [rebooting, stopping] = [(); 2].map(|()| launch(&region, &keeper, &ami, spec()));
    tell(&rebooting, "reboot");
    let (asked, says) = keeper;
    asked.recv_timeout(PATIENCE).unwrap();
    let (watch, last) = (stopping.watch(), Mutex::new(Some(region)));
    let (told, gone) = mpsc::channel();
    watch.subscribe(move |description| {
        if description.state == InstanceState::Stopped {
            drop(last.lock().unwrap().take());
            told.send(()).unwrap();
        }
    });
    drop(rebooting);
    tell(&stopping, "poweroff");
    drop(stopping);
    gone.recv_timeout(PATIENCE).unwrap();
    drop(says);
    let left = std::iter::repeat_with(|| asked.recv_timeout(PATIENCE)).find_map(Result::err);
    assert_eq!(left, Some(mpsc::RecvTimeoutError::Disconnected), "somebody has the region yet");
    // Its lock is the last to go.
    let region = loop {
        match Region::open(dir.path(), FakeHypervisor::new()) {
            Err(e) if e.kind() == ErrorKind::RegionInUse => thread::yield_now(),
            opened => break opened.unwrap(),
        }
    };
    assert!(region.instances().iter().all(|instance| instance.state() == InstanceState::Stopped));
}

/// Each tells its guest what to do as soon as it is up, for many machines of each.
#[test]
fn instances_that_reboot_again_and_again_come_up_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let instance = region.launch(&ami, spec()).unwrap();
                let mut reader = instance.console().reader();
                for _ in 0..50 {
                    reader.wait_for("GUEST READY", soon()).unwrap();
                    tell(&instance, "reboot");
                }
                reader.wait_for("GUEST READY", soon()).unwrap();
                tell(&instance, "poweroff");
                instance.wait_for(InstanceState::Stopped, soon()).unwrap();
            });
        }
    });
}

//! What instances do and what is done to them, on the fake machine.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::time::Duration;

use common::{ask, files, open, register, soon, spec};
use instance_core::{ErrorKind, InstanceState, InstanceType, LaunchSpec, MetadataOptions, ShutdownBehavior};

#[test]
fn an_object_is_its_own_and_the_class_never_changes() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let (one, two) = (region.launch(&ami, spec()).unwrap(), region.launch(&ami, spec()).unwrap());
    ask(&one, "read 0 0", "data class");
    ask(&one, "write 0 0 object", "wrote");
    ask(&two, "read 0 0", "data class");

    let made = one.create_image("child").unwrap();
    assert_eq!(made.changed_bytes, 4096, "one block was written");
    assert!(made.stored_bytes > 0);
    assert_ne!(made.ami.digest(), ami.digest());
    assert_eq!(made.ami.manifest().parent(), Some(&ami.digest()));

    let child = region.launch(&made.ami, spec()).unwrap();
    ask(&child, "read 0 0", "data object");
    ask(&child, "write 0 0 other", "wrote");
    ask(&one, "read 0 0", "data object");
    let again = region.launch(&ami, spec()).unwrap();
    ask(&again, "read 0 0", "data class");
}

#[test]
fn a_stopped_instance_keeps_its_disk_and_a_terminated_one_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let before = files(dir.path());

    let instance = region.launch(&ami, spec()).unwrap();
    ask(&instance, "write 0 9 kept", "wrote");
    instance.stop(Duration::from_secs(10)).unwrap();
    assert_eq!(instance.state(), InstanceState::Stopped);
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    ask(&instance, "read 0 9", "data kept");
    instance.reboot().unwrap();
    ask(&instance, "read 0 9", "data kept");
    let refused = region.instance(instance.id()).unwrap().create_image("base").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ImageNameDuplicate);
    instance.terminate().unwrap();
    instance.terminate().unwrap();
    assert_eq!(instance.start().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
    assert_eq!(files(dir.path()), before);
}

#[test]
fn what_the_guest_does_to_itself_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let table = [
        ("poweroff", ShutdownBehavior::Stop, InstanceState::Stopped, "Client.InstanceInitiatedShutdown"),
        (
            "poweroff",
            ShutdownBehavior::Terminate,
            InstanceState::Terminated,
            "Client.InstanceInitiatedShutdown",
        ),
        ("crash", ShutdownBehavior::Stop, InstanceState::Stopped, "Client.InternalError"),
        ("panic", ShutdownBehavior::Terminate, InstanceState::Stopped, "Client.InternalError"),
    ];
    for (command, behavior, state, code) in table {
        let instance = region.launch(&ami, spec().shutdown_behavior(behavior)).unwrap();
        instance.console().write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
        instance.wait_for(state, soon()).unwrap();
        assert_eq!(instance.describe().state_reason.unwrap().code, code, "{command}");
    }

    // One that reboots is running all the while, and comes up again.
    let instance = region.launch(&ami, spec()).unwrap();
    let mut reader = instance.console().reader();
    reader.wait_for("GUEST READY", soon()).unwrap();
    instance.console().write_all(b"reboot\n", soon()).unwrap();
    reader.wait_for("GUEST READY", soon()).unwrap();
    assert_eq!(instance.state(), InstanceState::Running);
}

#[test]
fn what_a_guest_wrote_outlives_its_machine_however_that_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut region = open(dir.path());
    let id = region.launch(&register(&region), spec()).unwrap().id();
    for (round, end) in ["reset", "reboot", "crash", "poweroff", "stop", "close"].into_iter().enumerate() {
        let instance = region.instance(id).unwrap();
        instance.start().unwrap();
        ask(&instance, &format!("write 0 {} {end}", 8 * round), "wrote");
        let mut reader = instance.console().reader_from_now();
        let tell = |line: &str| instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
        match end {
            "reset" => instance.reboot().unwrap(),
            "reboot" => {
                tell(end);
                reader.wait_for("GUEST READY", soon()).unwrap();
            }
            "crash" | "poweroff" => {
                tell(end);
                instance.wait_for(InstanceState::Stopped, soon()).unwrap();
            }
            "stop" => instance.stop(Duration::ZERO).unwrap(),
            _ => {
                drop((instance, region));
                region = open(dir.path());
            }
        }
        let instance = region.instance(id).unwrap();
        instance.start().unwrap();
        ask(&instance, &format!("read 0 {}", 8 * round), &format!("data {end}"));
    }
}

#[test]
fn whoever_hears_of_a_state_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    for _ in 0..50 {
        let mut changes = region.state_changes();
        let launched = std::thread::spawn({
            let (region, ami) = (region.clone(), ami.clone());
            move || region.launch(&ami, spec()).unwrap()
        });
        let change = changes.find(|change| change.state == InstanceState::Running).unwrap();
        let state = region.instance(change.instance_id).unwrap().state();
        assert_eq!(state, InstanceState::Running);
        launched.join().unwrap().terminate().unwrap();
    }
}

#[test]
fn a_type_of_ones_own_may_have_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    for name in ["\u{e4}".repeat(100), "two\nlines".to_owned(), String::new()] {
        let hardware = InstanceType::custom(name, 1.try_into().unwrap(), 64.try_into().unwrap());
        region.launch(&ami, LaunchSpec::new(hardware)).unwrap().terminate().unwrap();
    }
}

/// Whoever sees its machine end first, and whatever a power-off of the guest's own would do.
#[test]
fn a_guest_that_powers_off_because_it_was_asked_to_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    for behavior in [ShutdownBehavior::Terminate, ShutdownBehavior::Stop] {
        let instance = region.launch(&ami, spec().shutdown_behavior(behavior)).unwrap();
        for round in 0..20 {
            let changes = region.state_changes();
            instance.stop(Duration::from_secs(30)).unwrap();
            let states: Vec<_> = changes.try_iter().map(|c| (c.state, c.reason.unwrap().code)).collect();
            let user = || "Client.UserInitiatedShutdown".to_owned();
            let expected = [(InstanceState::Stopping, user()), (InstanceState::Stopped, user())];
            assert_eq!(states, expected, "round {round}");
            instance.start().unwrap();
        }
        instance.terminate().unwrap();
    }
}

/// Tags that cannot be offered as metadata, and an offer of the tags, exclude each other, whoever is first.
#[test]
fn an_offer_of_tags_never_meets_one_that_cannot_be_offered() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let server = region.launch(&register(&region), spec()).unwrap();
    let id = [server.id().into()];
    let mut offer = MetadataOptions::default();
    offer.instance_metadata_tags = true;
    let check = || {
        let told = server.describe();
        let offers = told.metadata_options.instance_metadata_tags;
        assert!(!(offers && told.tags.contains_key("cost center")), "{told:?}");
    };
    let refused = |result: instance_core::Result<()>| match result {
        Ok(()) => check(),
        Err(e) => assert_eq!(e.kind(), ErrorKind::InvalidParameter),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                refused(region.create_tags(&id, &[("cost center", "7")]));
                region.delete_tags(&id, &[("cost center", None)]).unwrap();
            }
        });
        for _ in 0..300 {
            refused(server.set_metadata_options(offer.clone()));
            server.set_metadata_options(MetadataOptions::default()).unwrap();
        }
    });
}

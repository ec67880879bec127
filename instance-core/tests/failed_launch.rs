//! Launches that fail while somebody waits for their instances.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/cable.rs"]
mod cable;
#[path = "common/region.rs"]
mod common;
#[path = "common/gate.rs"]
mod gate;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ami_core::ResourceId;
use cable::Cable;
use common::{open, register, spec};
use gate::gate;
use instance_core::{
    ErrorKind, Instance, InstanceState, MetadataOptions, RegionOptions, Result, ShutdownBehavior,
};

/// What is done to an instance by who has found it while it was being launched.
type Act = fn(&Instance) -> Result<()>;

#[test]
fn nothing_comes_of_what_is_asked_of_an_instance_whose_launch_fails() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()));
    let (hypervisor, (asked, answer)) = gate();
    let network = Cable::default();
    let region = RegionOptions::new().network(network.clone()).open(dir.path(), hypervisor).unwrap();
    let refused: [Act; 9] = [
        |i| i.set_termination_protection(true),
        |i| i.set_stop_protection(true),
        |i| i.set_shutdown_behavior(ShutdownBehavior::Terminate),
        |i| i.set_metadata_options(MetadataOptions::default()),
        |i| i.set_user_data(None),
        |i| i.start(),
        |i| i.stop(Duration::ZERO),
        |i| i.reboot(),
        |i| i.create_image("child").map(drop),
    ];
    let once = || spec().client_token("once");
    thread::scope(|scope| {
        let launch = scope.spawn(|| region.launch(&ami, once()));
        asked.recv().unwrap();
        let [instance] = &region.instances()[..] else { panic!("it is to be seen") };
        assert_eq!(instance.state(), InstanceState::Pending);
        let (begun, begins) = mpsc::channel();
        let in_a_thread = |act: Act| {
            let (begun, instance) = (begun.clone(), instance.clone());
            scope.spawn(move || {
                begun.send(()).unwrap();
                act(&instance)
            })
        };
        let waiting: Vec<_> = refused.into_iter().map(in_a_thread).collect();
        let ended = in_a_thread(Instance::terminate);
        let (began, id, region) = (begun.clone(), ResourceId::from(instance.id()), &region);
        let tagged = scope.spawn(move || {
            began.send(()).unwrap();
            region.create_tags(&[id], &[("stage", "test")])
        });
        (0..refused.len() + 2).for_each(|_| begins.recv().unwrap());
        answer.send(false).unwrap();
        assert_eq!(launch.join().unwrap().unwrap_err().kind(), ErrorKind::Hypervisor);
        for waited in waiting {
            assert_eq!(waited.join().unwrap().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
        }
        ended.join().unwrap().unwrap();
        let kind = tagged.join().unwrap().unwrap_err().kind();
        // Whichever was first.
        assert!([ErrorKind::IncorrectInstanceState, ErrorKind::InstanceNotFound].contains(&kind), "{kind:?}");
        // Nor of what is asked later by who still has it.
        for act in refused {
            assert_eq!(act(instance).unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
            assert_eq!(instance.state(), InstanceState::Terminated);
        }
        instance.terminate().unwrap();
        assert_eq!(instance.describe().state_reason.unwrap().code, "Server.InternalError");
    });
    assert_eq!(network.released(), 1, "its place may be another's by then");
    assert!(region.instances().is_empty());
    drop(region);
    let region = RegionOptions::new().network(network).open(dir.path(), gate().0).unwrap();
    assert!(region.instances().is_empty(), "no store has it");
    region.launch(&ami, once()).unwrap();
}

//! The status of instances, as it is described.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake};
use std::thread::Thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, soon};
use instance_core::{
    Describe, DescribeInstanceStatus as Status, ErrorKind, InstanceState, InstanceStatus, LaunchSpec,
};

#[test]
fn a_status_is_waited_for_as_a_future() {
    let dir = tempfile::tempdir().unwrap();
    let region = common::open(dir.path());
    let ami = common::register(&region, "base", &common::disk(1, 7)).unwrap();
    let server = common::launch(&region, &ami).unwrap();
    let (sender, receiver) = mpsc::channel();
    let waiting = server.clone();
    std::thread::spawn(move || {
        let impaired = |s: &InstanceStatus| s.instance.as_str() == "impaired";
        sender.send(block_on(waiting.until_status(impaired))).unwrap();
    });
    server.wait_until_status_ok(soon()).unwrap();
    assert!(receiver.try_recv().is_err());
    server.console().port().write_output(b"Kernel panic - not syncing: Attempted to kill init!\n");
    let found = receiver.recv_timeout(PATIENCE).unwrap();
    assert_eq!((found.instance_id, found.system.as_str()), (server.id(), "ok"));
}

/// Runs a future by nothing but the waker that it is given.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Arc::new(Unpark(std::thread::current())).into();
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn nobody_waits_for_a_state_that_does_not_come() {
    let dir = tempfile::tempdir().unwrap();
    let region = common::open(dir.path());
    let ami = common::register(&region, "base", &common::disk(1, 7)).unwrap();
    let server = common::launch(&region, &ami).unwrap();
    let (sender, receiver) = mpsc::channel();
    let waiting = server.clone();
    std::thread::spawn(move || {
        let late = Instant::now() + Duration::from_secs(3600);
        sender.send(waiting.wait_for(InstanceState::Stopped, late).unwrap_err()).unwrap();
    });
    server.terminate().unwrap();
    let error = receiver.recv_timeout(PATIENCE).expect("it waits to the deadline");
    let says = ["does not become stopped any more"];
    common::check(&error, ErrorKind::IncorrectInstanceState, "IncorrectInstanceState", &says);
    server.wait_for(InstanceState::Terminated, Instant::now()).unwrap();
}

#[test]
fn the_status_of_instances_is_described_by_filters_and_pages() {
    let dir = tempfile::tempdir().unwrap();
    let region = common::open(dir.path());
    let ami = common::register(&region, "base", &common::disk(1, 7)).unwrap();
    let spec = LaunchSpec::new("t2.nano".parse().unwrap()).count(6, 6);
    let all = region.run_instances(&ami, spec).unwrap().instances;
    all.iter().for_each(|instance| instance.wait_until_status_ok(soon()).unwrap());
    all[0].stop(Duration::ZERO).unwrap();
    let count = |request: Status| region.describe_instance_status(&request).unwrap().items.len();
    let filter = |name: &str, value: &str| Describe::new().filter(name, [value]);
    assert_eq!(count(Status::new()), 5, "those that run");
    assert_eq!(count(Status::new().include_all_instances(true)), 6);
    assert_eq!(count(Status::of(Describe::new().id(all[1].id()))), 1);
    for (name, value, running) in [
        ("instance-status.status", "ok", 5),
        ("instance-status.reachability", "passed", 5),
        ("system-status.status", "ok", 5),
        ("system-status.reachability", "passed", 5),
        ("system-status.status", "impaired", 0),
        ("instance-state-name", "running", 5),
        ("instance-state-code", "16", 5),
        ("instance-state-code", "80", 0),
    ] {
        assert_eq!(count(Status::of(filter(name, value))), running, "{name}");
    }
    let stopped = filter("instance-status.status", "not-applicable");
    assert_eq!(count(Status::of(stopped).include_all_instances(true)), 1);
    let page = region
        .describe_instance_status(&Status::of(Describe::new().max_results(5)).include_all_instances(true))
        .unwrap();
    let rest = Describe::new().max_results(5).next_token(page.next_token.unwrap());
    assert_eq!(count(Status::of(rest).include_all_instances(true)), 1);
    let gone = Status::of(Describe::new().id("i-0123456789abcdef0".parse().unwrap()));
    let refused = region.describe_instance_status(&gone).unwrap_err();
    common::check(&refused, ErrorKind::InstanceNotFound, "InvalidInstanceID.NotFound", &[]);
}

//! Ports that are forwarded, and then elsewhere.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use common::PATIENCE;
use common::setup::{open_interface, opened, options};
use network_vpc::ErrorKind;

/// An address where nobody else listens.
fn free() -> SocketAddr {
    "127.78.5.1:0".parse().unwrap()
}

#[test]
fn a_port_that_is_forwarded_elsewhere_is_forwarded_all_the_time_and_to_one_place() {
    const TIMES: usize = 50;
    let network = opened(options());
    let id = open_interface(&network).id;
    let _machine = network.plug(id).unwrap();
    let forward = || network.forward(id, 22, free());
    let first = forward().unwrap();
    let is_over = AtomicBool::new(false);
    let mut all = thread::scope(|scope| {
        let looks_on = scope.spawn(|| {
            let mut looks = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert!(network.interface(id).unwrap().forwards.contains_key(&22), "after {looks} times");
                looks += 1;
            }
        });
        let two = [0, 1].map(|_| scope.spawn(|| (0..TIMES).map(|_| forward()).collect::<Vec<_>>()));
        let forwarded = two.map(|one| one.join());
        is_over.store(true, Ordering::Relaxed);
        looks_on.join().unwrap();
        forwarded.into_iter().flat_map(Result::unwrap).map(Result::unwrap).collect::<Vec<_>>()
    });
    let now = network.interface(id).unwrap().forwards[&22];
    assert!(all.contains(&now));
    all.push(first);
    for at in all {
        let begun = Instant::now();
        // Whoever had one before may not have waited for its end.
        while TcpStream::connect(at).is_ok() != (at == now) {
            assert!(begun.elapsed() < PATIENCE, "{at}, and it is {now}");
        }
    }
}

#[test]
fn a_port_that_was_asked_for_stays_so_if_it_was_not_before() {
    let network = opened(options());
    let id = open_interface(&network).id;
    // Where no other test listens meanwhile.
    let free = || "127.78.5.2:0".parse().unwrap();
    network.forward(id, 22, free()).unwrap();
    let asked = TcpListener::bind::<SocketAddr>(free()).unwrap().local_addr().unwrap();
    assert_eq!(network.forward(id, 22, asked).unwrap(), asked);
    let taken = TcpListener::bind(asked).unwrap();
    assert!(network.plug(id).is_err(), "it is another's, and none is taken instead");
    drop(taken);
    network.plug(id).unwrap();
    assert_eq!(network.interface(id).unwrap().forwards[&22], asked);
}

#[test]
fn an_address_of_the_hosts_leads_to_one_port_also_of_instances_that_are_stopped() {
    let network = opened(options());
    let [one, other] = [(); 2].map(|()| open_interface(&network).id);
    let at = network.forward(one, 22, "127.78.5.3:0".parse().unwrap()).unwrap();
    let any = SocketAddr::from(([0, 0, 0, 0], at.port()));
    let is_refused = || {
        for (id, port, at) in [(one, 80, at), (other, 22, at), (other, 22, any)] {
            let refused = network.forward(id, port, at).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Host, "{refused}");
            assert!(network.interface(id).unwrap().forwards.get(&port).is_none_or(|there| *there != at));
        }
    };
    is_refused();
    // It may be made wider.
    assert_eq!(network.forward(one, 22, any).unwrap(), any);
    assert_eq!(network.forward(one, 22, at).unwrap(), at);
    // UDP has addresses of its own.
    assert_eq!(network.forward_udp(other, 22, at).unwrap(), at);
    let machines = [one, other].map(|id| network.plug(id).unwrap());
    is_refused();
    // Where it leads already, nothing is to do, but that it was asked for now and is no other's from then on.
    assert_eq!(network.forward(one, 22, at).unwrap(), at);
    TcpStream::connect(at).unwrap();
    drop(machines);
    network.unplug(one);
    let _taken = TcpListener::bind(at).unwrap();
    assert!(network.plug(one).is_err());
}

//! Ports that are held to limits.

use instance_core::net::FrameLimits;
use storage_block::{IoLimits, Limiter, Rate};

use super::*;

/// So many operations at once, and then hardly any.
fn only(burst: u64) -> (Limiter, FrameLimits) {
    let limits = IoLimits { ops: Some(Rate { per_second: 1, burst }), ..IoLimits::NONE };
    let limiter = Limiter::new(limits);
    (limiter.clone(), FrameLimits::new([limiter]))
}

#[test]
fn frames_from_the_guest_wait_in_the_guest_when_the_limit_is_reached() {
    let (limiter, limits) = only(2);
    let mut guest = Guest::limited(0, |spec| spec.transmit_limits = limits);
    assert_eq!(guest.driver.device.due_in(), None);
    (0..4).for_each(|number| _ = guest.send(number % 2, &frame(7, true, 0)));
    assert_eq!(
        (guest.network.waiting(), guest.driver.used(transmit(0)), guest.driver.used(transmit(1))),
        (2, 1, 1)
    );
    let due = guest.driver.device.due_in().expect("it looks again by itself");
    assert!(due.as_millis() > 500 && due.as_millis() <= 1000, "{due:?}");
    guest.driver.set(reg::VIRTIO_MMIO_STATUS, 15 | 128);
    assert_eq!(guest.driver.device.due_in(), None, "a driver that has given up is not looked after");
    guest.driver.begin(0);
    assert_eq!(guest.driver.device.due_in(), None);
    (0..2).for_each(|number| _ = guest.send(number, &frame(7, true, 0)));
    assert!(guest.driver.device.due_in().is_some());
    limiter.set(IoLimits::NONE);
    guest.serve();
    assert_eq!((guest.network.waiting(), guest.driver.device.due_in()), (4, None));
}

#[test]
fn frames_to_the_guest_wait_in_the_cable_when_the_limit_is_reached() {
    let bytes = IoLimits { bytes: Some(Rate { per_second: 1, burst: 60 }), ..IoLimits::NONE };
    let (ops, other) = only(100);
    let slow = Limiter::new(bytes);
    let mut guest = Guest::limited(0, |spec| {
        spec.receive_limits = FrameLimits::new([slow.clone(), ops]);
        spec.transmit_limits = other;
    });
    (0..4).for_each(|_| guest.offer_buffer(0));
    (0..4).for_each(|number| guest.network_sends(7, number));
    guest.serve();
    assert_eq!(guest.received(0), [0]);
    assert!(guest.driver.device.due_in().is_some());
    // The other direction has its own.
    guest.send(0, &frame(7, true, 0));
    assert_eq!(guest.network.waiting(), 1);
    slow.set(IoLimits::NONE);
    guest.serve();
    assert_eq!(guest.received(0), [0, 1, 2, 3]);
    assert_eq!(guest.driver.device.due_in(), None);
}

/// Nobody looks again and again for what cannot be any more.
#[test]
fn what_waits_for_a_limit_is_not_looked_after_when_it_is_taken_back() {
    let waiting = || {
        let (_, limits) = only(1);
        let mut guest = Guest::limited(0, |spec| spec.transmit_limits = limits);
        (0..2).for_each(|_| _ = guest.send(0, &frame(7, true, 0)));
        assert!(guest.driver.device.due_in().is_some());
        guest
    };
    let mut guest = waiting();
    guest.driver.device.end();
    assert_eq!(guest.driver.device.due_in(), None, "the port is gone");
    let mut guest = waiting();
    guest.driver.set(reg::VIRTIO_MMIO_QUEUE_SEL, transmit(0) as u32);
    guest.driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.driver.device.due_in(), None, "the queue is the driver's");
}

//! Ports on TAP devices whose frames the device's thread moves.

use instance_core::machine::NetSpec;
use instance_core::net::MacAddress;
use instance_core::testing::taps;

use super::Net;
use crate::virtio::driver::Driver;

const PAIRS: usize = 3;

#[test]
fn a_tap_device_is_heard_whichever_queue_was_looked_at_last() {
    if let Err(error) = taps::available() {
        assert!(std::env::var_os("CI").is_none(), "nothing may be skipped under CI, but: {error}");
        return eprintln!("SKIPPED: {error}");
    }
    let link = taps::link();
    let spec = NetSpec::new(link.machine, MacAddress([2, 0, 10, 0, 0, 12]));
    let mut driver = Driver::new(Net::new(&spec, PAIRS), 2 * PAIRS + 1, 0);
    assert!(driver.device.ended().is_none(), "nobody has looked whether a frame waits");
    // All queues are ready, and one pair is used.
    (0..=2 * PAIRS).for_each(|queue| _ = driver.step(queue));
    assert!(driver.device.ended().is_some());
    assert!(driver.device.ended().is_none(), "nobody has looked since");
}

//! Features that require others (virtio 1.2, 2.2.1), which of what is offered those of network devices do (5.1.3.1).

use instance_core::machine::NetSpec;
use instance_core::net::{MacAddress, Offloads, link};

use super::*;
use crate::virtio::Net;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO: [u64; 2] = [1 << 7, 1 << 8];
const HOST_TSO: [u64; 2] = [1 << 11, 1 << 12];
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

/// The driver of a network device that offers all that one can.
fn driver() -> Driver {
    driver_on(Offloads::ALL, 2)
}

fn driver_on(takes: Offloads, pairs: usize) -> Driver {
    let (port, network) = link();
    network.set_takes(takes);
    let net = Net::new(&NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1])), pairs);
    Driver::of(net, MemoryDisk::new(MIB).unwrap().into_disk())
}

/// Whether the document lets a driver accept these.
fn may_be(features: u64) -> bool {
    let has = |bit: u64| features & bit != 0;
    (!GUEST_TSO.into_iter().any(has) || has(GUEST_CSUM))
        && (!HOST_TSO.into_iter().any(has) || has(CSUM))
        && (!has(MQ) || has(CTRL_VQ))
}

/// All sets that a driver can choose.
#[test]
fn no_feature_is_accepted_without_those_that_it_requires() {
    let mut driver = driver();
    let offered = driver.offered();
    let bits: Vec<u64> =
        (0..64).map(|bit| 1 << bit).filter(|bit| offered & bit != 0 && *bit != VERSION_1).collect();
    let of_chosen = |choice: u32| {
        (0..).zip(&bits).filter(|(n, _)| choice & 1 << n != 0).fold(VERSION_1, |all, (_, bit)| all | bit)
    };
    let mut accepted = 0;
    for features in (0..1 << bits.len()).map(of_chosen) {
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK != 0, may_be(features), "{features:#x}");
        accepted += u32::from(may_be(features));
    }
    assert!(may_be(offered) && accepted > 1 && accepted < 1 << bits.len());
}

/// Whatever the network takes: most drivers do so, of the features that they know.
#[test]
fn all_that_is_offered_may_be_accepted() {
    for n in 0..16 {
        let bit = |of: u32| n >> of & 1 == 1;
        let mut takes = Offloads::NONE;
        (takes.checksum, takes.tcp4, takes.tcp6) = (bit(0), bit(1), bit(2));
        let mut driver = driver_on(takes, 1 + usize::from(bit(3)));
        let offered = driver.offered();
        driver.negotiate(offered);
        assert_eq!(driver.status() & FEATURES_OK, FEATURES_OK, "{takes:?}: {offered:#x}");
    }
}

/// A driver that was refused may think again, as the document has it: without a reset.
#[test]
fn a_driver_that_was_refused_may_accept_less() {
    let mut driver = driver();
    driver.negotiate(VERSION_1 | MQ);
    assert_eq!(driver.status() & FEATURES_OK, 0);
    driver.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, 0);
    driver.set(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.status() & FEATURES_OK, FEATURES_OK);
}

/// Versions before took such sets, and whoever saved a machine with one has it where that goes on.
#[test]
fn a_saved_machine_keeps_a_feature_without_those_that_it_requires() {
    for missing in [CSUM, GUEST_CSUM, CTRL_VQ] {
        let mut driver = driver();
        let offered = driver.offered();
        driver.negotiate(offered);
        driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]);
        driver.set(reg::VIRTIO_MMIO_STATUS, 15);
        let mut saved = driver.device.save();
        assert_eq!(saved.core.accepted, offered);
        saved.core.accepted &= !missing;

        let mut restored = self::driver();
        restored.device.restore(&restored.memory, &saved).unwrap();
        assert_eq!((restored.status(), restored.device.save()), (15, saved), "{missing:#x}");
        for queue in 0..restored.device.queues() {
            assert_eq!(restored.device.step(&restored.memory, queue), Step::Idle, "{missing:#x}");
        }
        // Its driver begins anew by the rules.
        restored.negotiate(offered & !missing);
        assert_eq!(restored.status() & FEATURES_OK, 0, "{missing:#x}");
    }
}

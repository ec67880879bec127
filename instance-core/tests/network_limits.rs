//! What instance types give of the network, as the limits of machines' ports.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ami_core::X86_64;
use common::cable::Cable;
use common::{disk, open, register};
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, NetSpec, Runs,
};
use instance_core::testing::FakeHypervisor;
use instance_core::{InstanceType, LaunchSpec, Region, RegionOptions};

/// Makes fake machines, and remembers the ports that they were to have.
#[derive(Debug, Clone, Default)]
struct Limiting {
    net_limits: bool,
    ports: Arc<Mutex<Vec<NetSpec>>>,
}

impl Hypervisor for Limiting {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = FakeHypervisor::new().capabilities();
        capabilities.net_limits = self.net_limits;
        capabilities
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        FakeHypervisor::new().execution()
    }

    fn create(&self, mut spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.ports.lock().unwrap().append(&mut spec.nets);
        FakeHypervisor::new().create(spec)
    }
}

impl Runs<X86_64> for Limiting {}

/// The port of an instance of this type, in a region that is opened so.
fn port_of(dir: &Path, hardware: InstanceType, net_limits: bool, options: RegionOptions) -> NetSpec {
    let hypervisor = Limiting { net_limits, ..Limiting::default() };
    let region: Region<Limiting> = options.network(Cable::default()).open(dir, hypervisor.clone()).unwrap();
    let ami = region.images().unwrap().remove(0).ami().clone().typed::<X86_64>().unwrap();
    let instance = region.launch(&ami, LaunchSpec::new(hardware)).unwrap();
    instance.terminate().unwrap();
    hypervisor.ports.lock().unwrap().pop().unwrap()
}

#[test]
fn ports_are_held_to_what_the_type_gives_where_that_can_be() {
    let dir = tempfile::tempdir().unwrap();
    register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let micro: InstanceType = "t3.micro".parse().unwrap();
    let port = port_of(dir.path(), micro.clone(), true, RegionOptions::new());
    // 5 Gbit/s at best, of which a second's worth is saved up: each direction has its own.
    port.receive_limits.charge(5 * 625_000_000);
    let delay = port.receive_limits.delay().unwrap();
    assert!(delay > Duration::from_secs(3) && delay <= Duration::from_secs(4), "{delay:?}");
    assert!(!port.transmit_limits.is_none() && port.transmit_limits.delay().is_none());

    // Which a reboot does not give again, and a stop does.
    let hypervisor = Limiting { net_limits: true, ..Limiting::default() };
    let region = RegionOptions::new().network(Cable::default()).open(dir.path(), hypervisor.clone()).unwrap();
    let ami = region.images().unwrap().remove(0).ami().clone().typed::<X86_64>().unwrap();
    let instance = region.launch(&ami, LaunchSpec::new(micro.clone())).unwrap();
    let last = || hypervisor.ports.lock().unwrap().pop().unwrap();
    last().receive_limits.charge(500 * 625_000_000);
    instance.reboot().unwrap();
    assert!(last().receive_limits.delay().is_some());
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    assert!(last().receive_limits.delay().is_none());
    drop((instance, region));

    let custom = InstanceType::custom("lab.tiny", 1.try_into().unwrap(), 128.try_into().unwrap());
    assert!(!port_of(dir.path(), custom, true, RegionOptions::new()).is_limited());
    assert!(
        !port_of(dir.path(), micro.clone(), true, RegionOptions::new().network_limits(false)).is_limited()
    );
    assert!(!port_of(dir.path(), micro, false, RegionOptions::new()).is_limited());
}

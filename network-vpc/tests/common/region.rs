//! Regions with a network, in which a test is the guest of each machine.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;
use std::sync::{Arc, Mutex};

use ami_core::{Ami, X86_64};
use instance_core::console::ConsolePort;
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, NetSpec, RestoreSpec, Runs,
};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region, RegionOptions};
use network_vpc::{Network, NetworkOptions};
use storage_block::MemoryDisk;

use super::Guest;

/// Its machines run nothing. What they are plugged in by is left to the test.
#[derive(Debug, Clone)]
pub(crate) struct Idle {
    fake: FakeHypervisor,
    last: Arc<Mutex<Option<(NetSpec, ConsolePort)>>>,
}

impl Idle {
    pub(crate) fn new() -> Self {
        Self { fake: FakeHypervisor::new(), last: Arc::default() }
    }

    /// The guest of the machine that was made last, with an address, and its console.
    pub(crate) fn guest(&self) -> (Guest, ConsolePort) {
        let (port, console) = self.last.lock().unwrap().take().expect("a machine was made");
        (Guest::boot(port), console)
    }
}

impl Runs<X86_64> for Idle {}

impl Hypervisor for Idle {
    fn capabilities(&self) -> Capabilities {
        self.fake.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.fake.execution()
    }

    fn create(&self, mut spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        let port = spec.nets.pop().expect("it is in a network");
        *self.last.lock().unwrap() = Some((port, spec.console.clone()));
        self.fake.create(spec)
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.fake.restore(spec)
    }
}

pub(crate) fn open<H: Hypervisor>(dir: &Path, hypervisor: H) -> (Region<H>, Network) {
    let name = "eu-west-1".parse().unwrap();
    let network = NetworkOptions::new().resolver(None).open(&dir.join("network"), &name).unwrap();
    let options = RegionOptions::new().name(name).network(network.clone());
    (options.open(dir, hypervisor).unwrap(), network)
}

pub(crate) fn image<H>(region: &Region<H>) -> Ami<X86_64> {
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    region.register_image(Ami::<X86_64>::builder("web"), source).unwrap()
}

pub(crate) fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

//! A network with one place.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use ami_core::{BlockDeviceMapping, InstanceId, NetworkInterfaceId};
use instance_core::Result;
use instance_core::machine::NetSpec;
use instance_core::net::{self, MacAddress, NetPort};
use instance_core::network::{Guest, Network, NetworkPlacement, PlacementRequest};

const MAC: MacAddress = MacAddress([2, 0, 10, 0, 0, 12]);

/// A network whose cables end here, and that remembers what it was last told of its guest's instance store.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cable {
    ends: Arc<Mutex<Vec<NetPort>>>,
    told: Arc<Mutex<Vec<BlockDeviceMapping>>>,
    released: Arc<AtomicUsize>,
}

impl Cable {
    pub(crate) fn told(&self) -> Vec<BlockDeviceMapping> {
        self.told.lock().unwrap().clone()
    }

    /// How often a place was given up.
    pub(crate) fn released(&self) -> usize {
        self.released.load(SeqCst)
    }
}

impl Network for Cable {
    fn public_key(&self, _: &str) -> Result<String> {
        Ok("ssh-ed25519 AAAA".to_owned())
    }

    fn place(&self, _: InstanceId, _: &PlacementRequest) -> Result<NetworkPlacement> {
        let interface = "eni-0123456789abcdef0".parse()?;
        let of = ("vpc-0123456789abcdef0".parse()?, "subnet-0123456789abcdef0".parse()?);
        Ok(NetworkPlacement::new(interface, of, Ipv4Addr::new(10, 0, 0, 12), MAC))
    }

    fn plug(&self, guest: Guest<'_>) -> Result<NetSpec> {
        let (machine, network) = net::link();
        self.ends.lock().unwrap().push(network);
        self.update(guest);
        Ok(NetSpec::new(machine, MAC))
    }

    fn update(&self, guest: Guest<'_>) {
        *self.told.lock().unwrap() = guest.instance_store.to_vec();
    }

    fn release(&self, _: &NetworkPlacement) -> Result<()> {
        self.released.fetch_add(1, SeqCst);
        Ok(())
    }

    fn keep_only(&self, _: &HashSet<NetworkInterfaceId>) -> Result<()> {
        Ok(())
    }
}

//! A network: what it consists of, on disk, and the interfaces that are plugged in.

mod addresses;
mod dhcp_options;
mod file;
pub(crate) mod forwards;
mod groups;
mod interfaces;
mod keys;
mod lock;
mod of_region;
mod options;
mod public;
mod routes;
mod vpcs;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ami_core::{NetworkInterfaceId, RegionName, VpcId};
use instance_core::machine::NetSpec;
use instance_core::net;
use ipnet::Ipv4Net;
use mio::{Poll, Waker};

pub use self::dhcp_options::{DhcpOptions, DhcpSettings};
use self::forwards::PublicOffers;
pub use self::interfaces::InterfaceSpec;
use self::lock::Lock;
pub use self::options::NetworkOptions;
use crate::edge::budget::Budget;
use crate::edge::{Carrier, Edge, Reach, WAKE};
use crate::fabric::Fabric;
use crate::model::{MTU, Memberships, Model};
use crate::port::Port;
use crate::{Error, ErrorKind, Metadata, NetworkInterface, Result, Subnet, Vpc};

/// A region's network. Clones are the same.
///
/// ```
/// use instance_core::net::Frame;
/// use network_vpc::{Direction, Network, Rule};
///
/// let network = Network::in_memory(&"us-east-1".parse()?)?;
/// let group = network.create_security_group(network.default_vpc()?, "web", "a web server")?;
/// network.authorize(group.id, Direction::Ingress, Rule::tcp(80, "0.0.0.0/0".parse()?))?;
/// let interface = network.create_interface(network.interface_spec()?.groups([group.id]))?;
///
/// // What a machine is given; here nobody boots, and the port is unplugged again.
/// let port = network.plug(interface.id)?;
/// assert_eq!(port.mac, interface.mac);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Threads
///
/// Any thread may call at any time. Each interface that is plugged in has a thread, which ends when its machine
/// does, when the interface is unplugged, or with the network's last handle.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: Option<PathBuf>,
    reach: Reach,
    /// How many of an interface are remembered.
    conversations: usize,
    budget: Arc<Budget>,
    elastic_pool: Ipv4Net,
    /// Declared before what its threads use.
    plugged: Mutex<HashMap<NetworkInterfaceId, Plugged>>,
    fabric: Arc<Fabric>,
    model: Mutex<Model>,
    /// Let go last.
    _lock: Option<Lock>,
}

#[derive(Debug)]
struct Plugged {
    port: Arc<Port>,
    edge: Edge,
    /// Where it is listened for public addresses, and where the host does not let us, and why.
    public: PublicOffers,
    refused: BTreeMap<(Carrier, SocketAddr), String>,
}

impl Network {
    /// Opens the network that is kept in a directory, or begins one, with the [options](NetworkOptions) that
    /// are the defaults. The directory is this network's for as long as one of its handles is there.
    ///
    /// # Errors
    ///
    /// As [`NetworkOptions::open`].
    pub fn open(dir: &Path, region: &RegionName) -> Result<Self> {
        NetworkOptions::new().open(dir, region)
    }

    /// A network that is kept nowhere.
    ///
    /// # Errors
    ///
    /// As [`NetworkOptions::in_memory`].
    pub fn in_memory(region: &RegionName) -> Result<Self> {
        NetworkOptions::new().in_memory(region)
    }

    fn new(model: Model, kept: Option<(PathBuf, Lock)>, options: NetworkOptions) -> Self {
        let (plugged, fabric) = Default::default();
        let (file, _lock) = kept.unzip();
        let NetworkOptions { reach, conversations, sockets, elastic_pool } = options;
        let budget = Budget::new(sockets.unwrap_or_else(Budget::of_process));
        let model = Mutex::new(model);
        let inner = Inner { file, reach, conversations, budget, elastic_pool, plugged, fabric, model, _lock };
        Self(Arc::new(inner))
    }

    /// The VPCs.
    pub fn vpcs(&self) -> Vec<Vpc> {
        self.model().vpcs.values().cloned().collect()
    }

    /// The VPC that is there from the beginning, or was [made](Self::create_default_vpc) in its place.
    ///
    /// # Errors
    ///
    /// [`VpcNotSpecified`](ErrorKind::VpcNotSpecified) if it was deleted: another has to be named.
    pub fn default_vpc(&self) -> Result<VpcId> {
        let model = self.model();
        let default = model.vpcs.values().find(|vpc| vpc.is_default).map(|vpc| vpc.id);
        default.ok_or_else(|| Error::new(ErrorKind::VpcNotSpecified, "there is no default VPC: name one"))
    }

    /// The subnets.
    pub fn subnets(&self) -> Vec<Subnet> {
        self.model().subnets.values().cloned().collect()
    }

    /// The interfaces.
    pub fn interfaces(&self) -> Vec<NetworkInterface> {
        self.model().interfaces.values().cloned().collect()
    }

    /// An interface.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound).
    pub fn interface(&self, id: NetworkInterfaceId) -> Result<NetworkInterface> {
        self.model().interface(id).cloned()
    }

    /// Plugs an interface in, and gives the end of its cable that a machine is made with.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InterfaceInUse`](ErrorKind::InterfaceInUse) while a
    /// machine has it, [`InsufficientAddressCapacity`](ErrorKind::InsufficientAddressCapacity) if no public address is left
    /// for it, or what the host refused.
    pub fn plug(&self, id: NetworkInterfaceId) -> Result<NetSpec> {
        self.plug_in(id, false)
    }

    /// The same. A machine that goes on in the place of one that ran does so without the public address that it cannot have.
    fn plug_in(&self, id: NetworkInterfaceId, goes_on: bool) -> Result<NetSpec> {
        let mut plugged = self.plugged();
        if plugged.get(&id).is_some_and(|plugged| plugged.port.is_plugged()) {
            return Err(Error::new(ErrorKind::InterfaceInUse, format!("{id} is plugged in already")));
        }
        if let Some(before) = plugged.remove(&id) {
            self.0.fabric.remove(&before.port);
        }
        let given = self.give_public_ip(&mut plugged, id).or_else(|error| {
            if !goes_on {
                return Err(error);
            }
            tracing::warn!(%error, %id, "an interface goes on without a public address");
            Ok(())
        });
        let made = given.and_then(|()| self.connect(&mut plugged, id));
        if made.is_err() {
            self.take_public_ip(&mut plugged, id);
        }
        made
    }

    /// Puts a cable between an interface that has all that it is to have and a machine.
    fn connect(
        &self,
        plugged: &mut HashMap<NetworkInterfaceId, Plugged>,
        id: NetworkInterfaceId,
    ) -> Result<NetSpec> {
        let refused = |e| Error::host(format!("cannot plug in {id}"), e);
        let (interface, view) = {
            let model = self.model();
            let interface = model.interface(id)?;
            (interface.clone(), model.view(interface, &mut Memberships::default())?)
        };
        let poll = Poll::new().map_err(refused)?;
        let waker = Waker::new(poll.registry(), WAKE).map_err(refused)?;
        let (machine, cable) = net::link();
        let port =
            Port::new(view, cable.clone(), &self.0.fabric, waker, self.0.conversations).map_err(refused)?;
        let edge =
            Edge::start(poll, port.clone(), self.0.reach.clone(), self.0.budget.share()).map_err(refused)?;
        cable.set_stream_server(Some(edge.stream_server()));
        let (public, refused) = Default::default();
        let mut there = Plugged { port: port.clone(), edge, public, refused };
        self.listen_again(plugged, &there, &interface)?;
        there.offer(self.model().public_offers(&interface));
        self.0.fabric.add(&port);
        // Not the port itself, which has the cable's end, which has this.
        let (weak, fabric) = (Arc::downgrade(&port), Arc::downgrade(&self.0.fabric));
        cable.set_waker(Some(Arc::new(move || {
            let Some(port) = weak.upgrade() else { return };
            port.woken();
            if let (false, Some(fabric)) = (port.is_plugged(), fabric.upgrade()) {
                fabric.remove(&port);
            }
        })));
        plugged.insert(id, there);
        let mut spec = NetSpec::new(machine, interface.mac);
        spec.mtu = MTU;
        Ok(spec)
    }

    /// Pulls an interface's cable. Its machine goes on without. With it goes a public address that the interface has only
    /// while it is plugged in.
    pub fn unplug(&self, id: NetworkInterfaceId) {
        self.pull_out(id);
        let mut plugged = self.plugged();
        // Somebody else may have plugged it in again.
        if !plugged.contains_key(&id) {
            self.take_public_ip(&mut plugged, id);
        }
    }

    /// The same of one that is about to go. Nobody listens for it any more when this returns.
    fn pull_out(&self, id: NetworkInterfaceId) {
        let before = self.plugged().remove(&id);
        if let Some(before) = before {
            self.0.fabric.remove(&before.port);
        }
    }

    /// Says what the guest at a plugged interface is told of its instance; of nothing, unless told otherwise.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound) if it is not plugged in.
    pub fn set_metadata(&self, id: NetworkInterfaceId, metadata: Option<Metadata>) -> Result<()> {
        let plugged = self.plugged();
        let there = plugged
            .get(&id)
            .ok_or_else(|| Error::new(ErrorKind::InterfaceNotFound, format!("{id} is not plugged in")))?;
        there.port.set_metadata(metadata);
        Ok(())
    }

    /// How many conversations of an interface are remembered.
    pub fn tracked_conversations(&self, id: NetworkInterfaceId) -> usize {
        self.plugged().get(&id).map_or(0, |plugged| plugged.port.conversations())
    }

    /// How many sockets of the host's the guests' conversations have open; see
    /// [`NetworkOptions::sockets`].
    pub fn open_sockets(&self) -> usize {
        self.0.budget.open()
    }

    /// Makes a change, on disk first and then for all to see.
    fn change<T>(&self, change: impl FnOnce(&mut Model) -> Result<T>) -> Result<T> {
        self.change_with(&mut self.plugged(), change)
    }

    /// The same for who has locked what is plugged in.
    fn change_with<T>(
        &self,
        plugged: &mut HashMap<NetworkInterfaceId, Plugged>,
        change: impl FnOnce(&mut Model) -> Result<T>,
    ) -> Result<T> {
        let mut model = self.model();
        let mut changed = model.clone();
        let made = change(&mut changed)?;
        if let Some(file) = &self.0.file {
            file::write(file, &changed)?;
        }
        let before = std::mem::replace(&mut *model, changed);
        let gone: HashSet<_> = before.all_addresses().collect();
        let gone = &gone - &model.all_addresses().collect();
        let mut members = Memberships::default();
        let mut offers = Vec::new();
        for (id, plugged) in plugged.iter_mut() {
            let interface = model.interfaces.get(id);
            if let Some(Ok(view)) = interface.map(|interface| model.view(interface, &mut members)) {
                self.0.fabric.renew(&plugged.port, view);
            }
            if !gone.is_empty() {
                plugged.port.forget(&gone);
            }
            // Whose machine is gone is offered nowhere until it has another.
            let interface = interface.filter(|_| plugged.port.is_plugged());
            let wanted = interface.map(|interface| model.public_offers(interface)).unwrap_or_default();
            plugged.withdraw(&wanted);
            offers.push((plugged, wanted));
        }
        // Only then is an address free that leads elsewhere from now on.
        offers.into_iter().for_each(|(plugged, wanted)| plugged.offer(wanted));
        Ok(made)
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locked before the model.
    fn plugged(&self) -> MutexGuard<'_, HashMap<NetworkInterfaceId, Plugged>> {
        self.0.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_random(source: std::io::Error) -> Error {
    Error::host("cannot make an id", source)
}

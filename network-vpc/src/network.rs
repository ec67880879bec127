//! A network: what it consists of, on disk, and the interfaces that are plugged in.

mod groups;
mod keys;
mod of_region;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ami_core::{InstanceId, NetworkInterfaceId, RegionName, SecurityGroupId, SubnetId, VpcId};
use instance_core::machine::NetSpec;
use instance_core::net::{self, MacAddress};
use ipnet::Ipv4Net;
use mio::{Poll, Waker};

use crate::edge::{Edge, Forward, Reach, WAKE};
use crate::model::{MTU, Memberships, Model, check_address, check_block, usable};
use crate::port::{Fabric, Port};
use crate::{Error, ErrorKind, Metadata, NetworkInterface, Result, Subnet, Vpc};

/// The file in the network's directory.
const FILE: &str = "network.json";

/// The block of the VPC that is there from the beginning, and of its subnet (VPC User Guide, "Default VPCs").
const DEFAULT_VPC: &str = "172.31.0.0/16";
const DEFAULT_SUBNET: &str = "172.31.0.0/20";

/// How many conversations of an interface are remembered unless options say otherwise.
const CONVERSATIONS: usize = 65_536;

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
    /// Declared before what its threads use.
    plugged: Mutex<HashMap<NetworkInterfaceId, Plugged>>,
    fabric: Arc<Fabric>,
    model: Mutex<Model>,
}

#[derive(Debug)]
struct Plugged {
    port: Arc<Port>,
    edge: Edge,
}

/// What an interface is made by: [`Network::create_interface`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceSpec {
    subnet: SubnetId,
    groups: Vec<SecurityGroupId>,
    private_ip: Option<Ipv4Addr>,
    source_dest_check: bool,
}

impl InterfaceSpec {
    /// An interface in a subnet, in no group yet.
    pub fn new(subnet: SubnetId) -> Self {
        Self { subnet, groups: Vec::new(), private_ip: None, source_dest_check: true }
    }

    /// In these groups; in its VPC's default one, if in none.
    pub fn groups(mut self, groups: impl IntoIterator<Item = SecurityGroupId>) -> Self {
        self.groups = groups.into_iter().collect();
        self
    }

    /// With this address.
    pub fn private_ip(mut self, address: Ipv4Addr) -> Self {
        self.private_ip = Some(address);
        self
    }

    /// Whether it may send and receive only what is from and to its own address; it may, unless this says otherwise.
    pub fn source_dest_check(mut self, on: bool) -> Self {
        self.source_dest_check = on;
        self
    }
}

/// How a network is opened.
#[derive(Debug, Clone, Default)]
pub struct NetworkOptions {
    reach: Reach,
    conversations: Option<usize>,
}

impl NetworkOptions {
    /// Guests reach what the host reaches, but not the host itself, and ask its resolver.
    pub fn new() -> Self {
        Self { reach: Reach { host: false, resolver: host_resolver() }, conversations: None }
    }

    /// Whether guests may reach the host's own addresses, except the loopback ones.
    pub fn reach_host(mut self, on: bool) -> Self {
        self.reach.host = on;
        self
    }

    /// Whom questions about other names are passed on to.
    pub fn resolver(mut self, resolver: Option<SocketAddr>) -> Self {
        self.reach.resolver = resolver;
        self
    }

    /// How many conversations of each interface are remembered at most: 65,536, unless this says otherwise. Each
    /// that is takes some 100 bytes. A sixteenth each are for those that begin, inwards and outwards, and for
    /// protocols without ports.
    pub fn tracked_conversations(mut self, most: usize) -> Self {
        self.conversations = Some(most);
        self
    }

    /// Opens the network that is kept in a directory, or begins one.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](ErrorKind::Corrupt) for a state that cannot be read, or what the host refused.
    pub fn open(self, dir: &Path, region: &RegionName) -> Result<Network> {
        let file = dir.join(FILE);
        let there = match fs::read(&file) {
            Ok(bytes) => Some(parse(&bytes, &file)?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::host(format!("cannot read {}", file.display()), e)),
        };
        match there {
            Some(model) => Ok(Network::new(model, Some(file), self)),
            None => {
                fs::create_dir_all(dir)
                    .map_err(|e| Error::host(format!("cannot make {}", dir.display()), e))?;
                let model = first_model(region)?;
                write(&file, &model)?;
                Ok(Network::new(model, Some(file), self))
            }
        }
    }

    /// A network that is kept nowhere.
    ///
    /// # Errors
    ///
    /// Only where the host has no random numbers to give.
    pub fn in_memory(self, region: &RegionName) -> Result<Network> {
        Ok(Network::new(first_model(region)?, None, self))
    }
}

impl Network {
    /// Opens the network that is kept in a directory, or begins one, with the [options](NetworkOptions) that
    /// are the defaults.
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

    fn new(model: Model, file: Option<PathBuf>, options: NetworkOptions) -> Self {
        let (plugged, fabric) = Default::default();
        let (reach, conversations) = (options.reach, options.conversations.unwrap_or(CONVERSATIONS));
        Self(Arc::new(Inner { file, reach, conversations, plugged, fabric, model: Mutex::new(model) }))
    }

    /// The VPCs.
    pub fn vpcs(&self) -> Vec<Vpc> {
        self.model().vpcs.values().cloned().collect()
    }

    /// The VPC that is there from the beginning.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound) if it was deleted.
    pub fn default_vpc(&self) -> Result<VpcId> {
        let model = self.model();
        let default = model.vpcs.values().find(|vpc| vpc.is_default).map(|vpc| vpc.id);
        default.ok_or_else(|| Error::new(ErrorKind::VpcNotFound, "there is no default VPC"))
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

    /// Makes a VPC, with a way out, and its default security group.
    ///
    /// # Errors
    ///
    /// [`InvalidVpcRange`](ErrorKind::InvalidVpcRange), or what the host refused.
    pub fn create_vpc(&self, cidr: Ipv4Net) -> Result<Vpc> {
        let cidr = check_block(cidr, ErrorKind::InvalidVpcRange)?;
        self.change(|model| add_vpc(model, cidr, false))
    }

    /// Deletes a VPC that nothing is in but its default group.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), [`DependencyViolation`](ErrorKind::DependencyViolation), or what the
    /// host refused.
    pub fn delete_vpc(&self, id: VpcId) -> Result<()> {
        self.change(|model| {
            model.vpc(id)?;
            let in_use = model.subnets.values().any(|subnet| subnet.vpc_id == id)
                || model.groups.values().any(|g| g.vpc_id == id && g.name != groups::DEFAULT);
            if in_use {
                return Err(Error::new(
                    ErrorKind::DependencyViolation,
                    format!("{id} has subnets or groups"),
                ));
            }
            model.groups.retain(|_, group| group.vpc_id != id);
            model.vpcs.remove(&id);
            Ok(())
        })
    }

    /// Makes a subnet.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), [`InvalidSubnetRange`](ErrorKind::InvalidSubnetRange),
    /// [`SubnetConflict`](ErrorKind::SubnetConflict), or what the host refused.
    pub fn create_subnet(&self, vpc: VpcId, cidr: Ipv4Net) -> Result<Subnet> {
        let cidr = check_block(cidr, ErrorKind::InvalidSubnetRange)?;
        self.change(|model| add_subnet(model, vpc, cidr))
    }

    /// Deletes a subnet without interfaces.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), [`DependencyViolation`](ErrorKind::DependencyViolation), or
    /// what the host refused.
    pub fn delete_subnet(&self, id: SubnetId) -> Result<()> {
        self.change(|model| {
            model.subnet(id)?;
            if !model.taken(id).is_empty() {
                return Err(Error::new(ErrorKind::DependencyViolation, format!("{id} has interfaces")));
            }
            model.subnets.remove(&id);
            Ok(())
        })
    }

    /// What an interface is made by that is in the default subnet.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound) if there is none any more.
    pub fn interface_spec(&self) -> Result<InterfaceSpec> {
        let vpc = self.default_vpc()?;
        let model = self.model();
        let subnet = model.subnets.values().find(|subnet| subnet.vpc_id == vpc);
        let subnet =
            subnet.ok_or_else(|| Error::new(ErrorKind::SubnetNotFound, format!("{vpc} has no subnet")))?;
        Ok(InterfaceSpec::new(subnet.id))
    }

    /// Makes an interface.
    ///
    /// # Errors
    ///
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), [`SubnetFull`](ErrorKind::SubnetFull),
    /// [`InvalidAddress`](ErrorKind::InvalidAddress), [`AddressInUse`](ErrorKind::AddressInUse),
    /// [`GroupNotFound`](ErrorKind::GroupNotFound), or what the host refused.
    pub fn create_interface(&self, spec: InterfaceSpec) -> Result<NetworkInterface> {
        self.create_interface_for(None, spec)
    }

    fn create_interface_for(
        &self,
        instance_id: Option<InstanceId>,
        spec: InterfaceSpec,
    ) -> Result<NetworkInterface> {
        let InterfaceSpec { subnet, groups, private_ip, source_dest_check } = spec;
        let id = NetworkInterfaceId::random().map_err(no_random)?;
        let mac = random_mac()?;
        self.change(|model| {
            let subnet = model.subnet(subnet)?.clone();
            let groups = groups::of_interface(model, subnet.vpc_id, groups)?;
            let taken = model.taken(subnet.id);
            let private_ip = match private_ip {
                Some(address) => {
                    check_address(&subnet, address)?;
                    if taken.contains(&address) {
                        let what = format!("another interface has {address}");
                        return Err(Error::new(ErrorKind::AddressInUse, what));
                    }
                    address
                }
                None => usable(subnet.cidr).find(|address| !taken.contains(address)).ok_or_else(|| {
                    Error::new(ErrorKind::SubnetFull, format!("{} has no address left", subnet.id))
                })?,
            };
            let forwards = Default::default();
            let (subnet_id, vpc_id) = (subnet.id, subnet.vpc_id);
            let made = NetworkInterface {
                id,
                subnet_id,
                vpc_id,
                mac,
                private_ip,
                groups,
                source_dest_check,
                instance_id,
                forwards,
            };
            model.interfaces.insert(id, made.clone());
            Ok(made)
        })
    }

    /// Puts an interface into other groups. Those conversations go on that were allowed.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`GroupNotFound`](ErrorKind::GroupNotFound), or what the
    /// host refused.
    pub fn modify_groups(&self, id: NetworkInterfaceId, groups: &[SecurityGroupId]) -> Result<()> {
        self.change(|model| {
            let vpc = model.interface(id)?.vpc_id;
            let groups = groups::of_interface(model, vpc, groups.to_vec())?;
            model.interface_mut(id)?.groups = groups;
            Ok(())
        })
    }

    /// Deletes an interface that is not plugged in.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InterfaceInUse`](ErrorKind::InterfaceInUse), or what
    /// the host refused.
    pub fn delete_interface(&self, id: NetworkInterfaceId) -> Result<()> {
        let plugged = self.plugged();
        if plugged.get(&id).is_some_and(|plugged| plugged.port.is_plugged()) {
            return Err(Error::new(ErrorKind::InterfaceInUse, format!("{id} is plugged in")));
        }
        drop(plugged);
        self.unplug(id);
        self.change(|model| {
            model.interface(id)?;
            model.interfaces.remove(&id);
            Ok(())
        })
    }

    /// Plugs an interface in, and gives the end of its cable that a machine is made with.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), [`InterfaceInUse`](ErrorKind::InterfaceInUse) while a
    /// machine has it, or what the host refused.
    pub fn plug(&self, id: NetworkInterfaceId) -> Result<NetSpec> {
        let refused = |e| Error::host(format!("cannot plug in {id}"), e);
        let mut plugged = self.plugged();
        if plugged.get(&id).is_some_and(|plugged| plugged.port.is_plugged()) {
            return Err(Error::new(ErrorKind::InterfaceInUse, format!("{id} is plugged in already")));
        }
        if let Some(before) = plugged.remove(&id) {
            self.0.fabric.remove(&before.port);
        }
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
        let edge = Edge::start(poll, port.clone(), self.0.reach.clone()).map_err(refused)?;
        for (inside, at) in &interface.forwards {
            let listener = TcpListener::bind(at).map_err(refused)?;
            edge.listen(Forward { listener, port: *inside });
        }
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
        plugged.insert(id, Plugged { port, edge });
        let mut spec = NetSpec::new(machine, interface.mac);
        spec.mtu = MTU;
        Ok(spec)
    }

    /// Pulls an interface's cable. Its machine goes on without.
    pub fn unplug(&self, id: NetworkInterfaceId) {
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

    /// Has a port of an interface reached at an address of the host's, and says which: with port 0, a free one is
    /// taken. It stays so when the network is opened again.
    ///
    /// Clients get in whom the interface's groups let in, by their own addresses. The guest sees those of
    /// the host itself as 169.254.0.1.
    ///
    /// ```
    /// # use network_vpc::Network;
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let interface = network.create_interface(network.interface_spec()?)?;
    /// let at = network.forward(interface.id, 22, "127.0.0.1:0".parse()?)?;
    /// println!("ssh -p {} admin@{}", at.port(), at.ip());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), or that the host has no such address free.
    pub fn forward(&self, id: NetworkInterfaceId, port: u16, at: SocketAddr) -> Result<SocketAddr> {
        let refused = |e| Error::host(format!("cannot listen at {at}"), e);
        self.model().interface(id)?;
        let listener = TcpListener::bind(at).map_err(refused)?;
        let at = listener.local_addr().map_err(refused)?;
        self.stop_forwarding(id, port)?;
        self.change(|model| {
            model.interface_mut(id)?.forwards.insert(port, at);
            Ok(())
        })?;
        if let Some(plugged) = self.plugged().get(&id) {
            plugged.edge.listen(Forward { listener, port });
        }
        Ok(at)
    }

    /// Takes that back. Conversations go on.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](ErrorKind::InterfaceNotFound), or what the host refused.
    pub fn stop_forwarding(&self, id: NetworkInterfaceId, port: u16) -> Result<()> {
        if self.model().interface(id)?.forwards.contains_key(&port) {
            self.change(|model| {
                model.interface_mut(id)?.forwards.remove(&port);
                Ok(())
            })?;
            if let Some(plugged) = self.plugged().get(&id) {
                plugged.edge.unlisten(port);
            }
        }
        Ok(())
    }

    /// How many conversations of an interface are remembered.
    pub fn tracked_conversations(&self, id: NetworkInterfaceId) -> usize {
        self.plugged().get(&id).map_or(0, |plugged| plugged.port.conversations())
    }

    /// Makes a change, on disk first and then for all to see.
    fn change<T>(&self, change: impl FnOnce(&mut Model) -> Result<T>) -> Result<T> {
        let plugged = self.plugged();
        let mut model = self.model();
        let mut changed = model.clone();
        let made = change(&mut changed)?;
        if let Some(file) = &self.0.file {
            write(file, &changed)?;
        }
        *model = changed;
        let mut members = Memberships::default();
        for (id, plugged) in plugged.iter() {
            let interface = model.interfaces.get(id);
            if let Some(Ok(view)) = interface.map(|interface| model.view(interface, &mut members)) {
                plugged.port.set_view(view);
            }
        }
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

fn first_model(region: &RegionName) -> Result<Model> {
    let mut model = Model {
        format: Model::FORMAT,
        region: region.clone(),
        vpcs: Default::default(),
        subnets: Default::default(),
        groups: Default::default(),
        interfaces: Default::default(),
        key_pairs: Default::default(),
    };
    let constant = |text: &str| {
        text.parse().map_err(|_| Error::new(ErrorKind::InvalidVpcRange, format!("{text} is no block")))
    };
    let vpc = add_vpc(&mut model, constant(DEFAULT_VPC)?, true)?;
    add_subnet(&mut model, vpc.id, constant(DEFAULT_SUBNET)?)?;
    Ok(model)
}

fn add_vpc(model: &mut Model, cidr: Ipv4Net, is_default: bool) -> Result<Vpc> {
    let id = VpcId::random().map_err(no_random)?;
    let vpc = Vpc { id, cidr, is_default, internet_gateway: true };
    model.vpcs.insert(id, vpc.clone());
    let group = groups::default_group(id)?;
    model.groups.insert(group.id, group);
    Ok(vpc)
}

fn add_subnet(model: &mut Model, vpc: VpcId, cidr: Ipv4Net) -> Result<Subnet> {
    let whole = model.vpc(vpc)?.cidr;
    if !whole.contains(&cidr) {
        return Err(Error::new(ErrorKind::InvalidSubnetRange, format!("{cidr} is no part of {whole}")));
    }
    let overlaps =
        |other: &&Subnet| other.vpc_id == vpc && (other.cidr.contains(&cidr) || cidr.contains(&other.cidr));
    if let Some(other) = model.subnets.values().find(overlaps) {
        let what = format!("{cidr} overlaps {}, which has {}", other.id, other.cidr);
        return Err(Error::new(ErrorKind::SubnetConflict, what));
    }
    let id = SubnetId::random().map_err(no_random)?;
    let subnet = Subnet { id, vpc_id: vpc, cidr, availability_zone: format!("{}a", model.region) };
    model.subnets.insert(id, subnet.clone());
    Ok(subnet)
}

fn parse(bytes: &[u8], file: &Path) -> Result<Model> {
    let model: Model = serde_json::from_slice(bytes).map_err(|e| {
        Error::new(ErrorKind::Corrupt, format!("{} cannot be read", file.display())).with_source(e)
    })?;
    if model.format != Model::FORMAT {
        let what = format!("{} has format {}, not {}", file.display(), model.format, Model::FORMAT);
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    // Whatever names something names what is there.
    let mut members = Memberships::default();
    let mut views = model.interfaces.values().map(|interface| model.view(interface, &mut members));
    views.try_for_each(|view| view.map(drop)).map_err(|e| {
        Error::new(ErrorKind::Corrupt, format!("{} contradicts itself", file.display())).with_source(e)
    })?;
    Ok(model)
}

/// Replaces the file: it holds the one or the other, whatever happens.
fn write(file: &Path, model: &Model) -> Result<()> {
    let failed = |e: std::io::Error| Error::host(format!("cannot write {}", file.display()), e);
    let dir = file.parent().unwrap_or(Path::new("."));
    let json = serde_json::to_vec_pretty(model).map_err(|e| failed(e.into()))?;
    let mut written = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    written.write_all(&json).map_err(failed)?;
    written.as_file().sync_all().map_err(failed)?;
    written.persist(file).map_err(|e| failed(e.error))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// An address of those that are given locally, and no router's.
fn random_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|e| no_random(e.into()))?;
    bytes[0] = 0x06;
    Ok(MacAddress(bytes))
}

/// The first resolver that the host asks.
fn host_resolver() -> Option<SocketAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").ok()?;
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).map(|ip| SocketAddr::new(ip, 53)).next()
}

fn no_random(source: std::io::Error) -> Error {
    Error::host("cannot make an id", source)
}

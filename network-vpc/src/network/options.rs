//! How a network is opened.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use ami_core::RegionName;
use ipnet::Ipv4Net;

use super::lock::Lock;
use super::{Network, file, vpcs};
use crate::edge::Reach;
use crate::{Error, Result};

/// How many conversations of an interface are remembered unless options say otherwise.
const CONVERSATIONS: usize = 65_536;

/// What Elastic IP addresses are taken from: loopback addresses that hardly anybody listens at.
const ELASTIC_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 64, 0, 0), 10);

/// How a network is opened.
#[derive(Debug, Clone)]
pub struct NetworkOptions {
    pub(super) reach: Reach,
    pub(super) conversations: usize,
    pub(super) sockets: Option<usize>,
    pub(super) elastic_pool: Ipv4Net,
}

impl Default for NetworkOptions {
    /// Guests reach what the host reaches, but not the host itself, and have nobody to ask for names.
    fn default() -> Self {
        let reach = Reach::default();
        Self { reach, conversations: CONVERSATIONS, sockets: None, elastic_pool: ELASTIC_POOL }
    }
}

impl NetworkOptions {
    /// Guests reach what the host reaches, but not the host itself, and ask its resolver.
    pub fn new() -> Self {
        Self { reach: Reach { host: false, resolver: host_resolver() }, ..Self::default() }
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
        self.conversations = most;
        self
    }

    /// How many sockets of the host's the conversations of all guests with the world outside have open at most: half of
    /// the descriptors that the process may have when the network is opened, and 32,768 at most, unless this says
    /// otherwise. Each network has its own, so who opens several says less. A guest gets
    /// another as long as it has fewer than are left for all, so that one that opens what it can leaves half of them; of
    /// these, clients from outside have three quarters at most.
    /// Where it gets none, of its conversations by datagrams the one ends that was silent longest, and without one its
    /// connection is refused. Ports that are listened at are not counted: it is not guests who open them.
    pub fn sockets(mut self, most: usize) -> Self {
        self.sockets = Some(most);
        self
    }

    /// The addresses of the host that [Elastic IP addresses](Network::allocate_address) are taken from: 127.64.0.0/10,
    /// loopback ones, unless this says otherwise. The first and the last of them are not used.
    pub fn elastic_pool(mut self, pool: Ipv4Net) -> Self {
        self.elastic_pool = pool.trunc();
        self
    }

    /// Opens the network that is kept in a directory, or begins one. The directory is that network's for as long as one of
    /// its handles is there, or its process.
    ///
    /// # Errors
    ///
    /// [`NetworkInUse`](crate::ErrorKind::NetworkInUse) while another has the directory,
    /// [`Corrupt`](crate::ErrorKind::Corrupt) for a state that cannot be read, or what the host refused.
    pub fn open(self, dir: &Path, region: &RegionName) -> Result<Network> {
        fs::create_dir_all(dir).map_err(|e| Error::host(format!("cannot make {}", dir.display()), e))?;
        let lock = Lock::take(dir)?;
        let path = dir.join(file::NAME);
        let there = match fs::read(&path) {
            Ok(bytes) => Some(file::parse(&bytes, &path)?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::host(format!("cannot read {}", path.display()), e)),
        };
        match there {
            Some(mut model) => {
                // Nothing is plugged in yet, whatever was when it was kept.
                model.interfaces.values_mut().for_each(|interface| interface.public_ip = None);
                Ok(Network::new(model, Some((path, lock)), self))
            }
            None => {
                let model = vpcs::first_model(region)?;
                file::write(&path, &model)?;
                Ok(Network::new(model, Some((path, lock)), self))
            }
        }
    }

    /// A network that is kept nowhere.
    ///
    /// # Errors
    ///
    /// Only where the host has no random numbers to give.
    pub fn in_memory(self, region: &RegionName) -> Result<Network> {
        Ok(Network::new(vpcs::first_model(region)?, None, self))
    }
}

/// The first resolver that the host asks.
fn host_resolver() -> Option<SocketAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").ok()?;
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).map(|ip| SocketAddr::new(ip, 53)).next()
}

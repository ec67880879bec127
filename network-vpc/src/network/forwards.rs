//! Where on the host interfaces are reached: at forwarded ports and at Elastic IP addresses.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind as IoErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use ami_core::NetworkInterfaceId;

use super::{Network, Plugged};
use crate::edge::{Carrier, Entrance, Forward, Listener};
use crate::{Error, NetworkInterface, Result};

/// Where an interface's Elastic IP addresses are listened at, and the address of the interface that each leads to.
pub(crate) type ElasticOffers = BTreeMap<(Carrier, SocketAddr), Ipv4Addr>;

impl Network {
    /// Has a port of TCP of an interface reached at an address of the host's, and says which: with port 0, a free one is
    /// taken. What comes in by UDP comes to an [Elastic IP address](Self::allocate_address). It stays so when the network is opened again, but for one that was not asked for: if that is taken by
    /// then, the instance is plugged in with another, which [`interface`](Self::interface) says.
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
    /// [`InterfaceNotFound`](crate::ErrorKind::InterfaceNotFound), or that the host has no such address free.
    pub fn forward(&self, id: NetworkInterfaceId, port: u16, at: SocketAddr) -> Result<SocketAddr> {
        let is_chosen = at.port() == 0;
        let refused = |e| Error::host(format!("cannot listen at {at}"), e);
        self.model().interface(id)?;
        let listener = TcpListener::bind(at).map_err(refused)?;
        let at = listener.local_addr().map_err(refused)?;
        self.stop_forwarding(id, port)?;
        let mut plugged = self.plugged();
        self.change_with(&mut plugged, |model| {
            let interface = model.interface_mut(id)?;
            interface.forwards.insert(port, at);
            if is_chosen {
                interface.chosen_forwards.insert(port);
            }
            Ok(())
        })?;
        if let Some(plugged) = plugged.get(&id) {
            plugged.edge.listen(forwarded(listener, Entrance { at, port, to: None }));
        }
        Ok(at)
    }

    /// Takes that back. Conversations go on.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](crate::ErrorKind::InterfaceNotFound), or what the host refused.
    pub fn stop_forwarding(&self, id: NetworkInterfaceId, port: u16) -> Result<()> {
        let mut plugged = self.plugged();
        if !self.model().interface(id)?.forwards.contains_key(&port) {
            return Ok(());
        }
        let at = self.change_with(&mut plugged, |model| {
            let interface = model.interface_mut(id)?;
            interface.chosen_forwards.remove(&port);
            Ok(interface.forwards.remove(&port))
        })?;
        if let (Some(at), Some(plugged)) = (at, plugged.get(&id)) {
            plugged.edge.unlisten(Carrier::Tcp, at);
        }
        Ok(())
    }

    /// Has the ports listened at that are forwarded to an interface which is about to be plugged in. One that is taken
    /// and nobody asked for becomes another.
    pub(super) fn listen_again(
        &self,
        plugged: &mut HashMap<NetworkInterfaceId, Plugged>,
        there: &Plugged,
        interface: &NetworkInterface,
    ) -> Result<()> {
        let mut moved = Vec::new();
        for (&port, &before) in &interface.forwards {
            let refused = |e| Error::host(format!("cannot listen at {before}"), e);
            let listener = match TcpListener::bind(before) {
                Err(e) if e.kind() == IoErrorKind::AddrInUse && interface.chosen_forwards.contains(&port) => {
                    TcpListener::bind((before.ip(), 0))
                }
                bound => bound,
            };
            let listener = listener.map_err(refused)?;
            let at = listener.local_addr().map_err(refused)?;
            there.edge.listen(forwarded(listener, Entrance { at, port, to: None }));
            if at != before {
                moved.push((port, at));
            }
        }
        if moved.is_empty() {
            return Ok(());
        }
        self.change_with(plugged, |model| {
            model.interface_mut(interface.id)?.forwards.extend(moved);
            Ok(())
        })
    }
}

fn forwarded(listener: TcpListener, entrance: Entrance) -> Forward {
    Forward { listener: Listener::Tcp(listener), entrance }
}

impl Plugged {
    /// Listens no longer for Elastic IP addresses where that is not among what is wanted.
    pub(super) fn withdraw(&mut self, wanted: &ElasticOffers) {
        let edge = &self.edge;
        self.elastic.retain(|place, to| {
            let stays = wanted.get(place) == Some(to);
            if !stays {
                edge.unlisten(place.0, place.1);
            }
            stays
        });
    }

    /// Listens for Elastic IP addresses where that is wanted and the host lets us.
    pub(super) fn offer(&mut self, wanted: ElasticOffers) {
        for ((carrier, at), to) in wanted {
            if self.elastic.contains_key(&(carrier, at)) {
                continue;
            }
            match Listener::bind(carrier, at) {
                Ok(listener) => {
                    let entrance = Entrance { at, port: at.port(), to: Some(to) };
                    self.edge.listen(Forward { listener, entrance });
                    self.elastic.insert((carrier, at), to);
                }
                Err(error) => tracing::warn!(%error, %at, "an Elastic IP address is not listened at"),
            }
        }
    }
}

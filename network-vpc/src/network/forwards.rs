//! Where on the host interfaces are reached: at forwarded ports and at public addresses.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind as IoErrorKind;
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::NetworkInterfaceId;

use super::{Network, Plugged};
use crate::edge::{Carrier, Entrance, Forward, Listener};
use crate::{Error, ErrorKind, NetworkInterface, Result};

/// Where an interface's public addresses are listened at, and the address of the interface that each leads to.
pub(crate) type PublicOffers = BTreeMap<(Carrier, SocketAddr), Ipv4Addr>;

fn cannot_listen(at: SocketAddr, error: std::io::Error) -> Error {
    Error::host(format!("cannot listen at {at}"), error)
}

impl Network {
    /// Has a port of TCP of an interface reached at an address of the host's, and says which: with port 0, a free one is
    /// taken. If it was reached at another, it is no longer. It stays so when the network is opened again, but for one that was not asked for: if that is taken by
    /// then, the instance is plugged in with another, which [`interface`](Self::interface) says.
    ///
    /// Clients get in whom the interface's groups let in, by their own addresses; none of them is a member of a group. The
    /// guest sees those of the host itself as 169.254.0.1, and those whose addresses are among its VPC's or have no route out of its
    /// subnet, so that it can answer them.
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
    /// [`InterfaceNotFound`](crate::ErrorKind::InterfaceNotFound), [`InvalidParameter`](crate::ErrorKind::InvalidParameter)
    /// for an address of IPv6, by which nobody could be let in, or that the host has no such address free.
    pub fn forward(&self, id: NetworkInterfaceId, port: u16, at: SocketAddr) -> Result<SocketAddr> {
        self.forward_by(Carrier::Tcp, id, port, at)
    }

    /// The same for a port of UDP. A conversation that has been silent for a minute begins anew, or for three where both sides have
    /// spoken twice in turn, and of more than 512 the one that was silent longest makes room.
    ///
    /// At 0.0.0.0 a client may be answered from another of the host's addresses than it spoke to, and not take that for an answer: an
    /// address of its own for each is better.
    ///
    /// ```
    /// # use network_vpc::{Direction, Network, Rule};
    /// # let network = Network::in_memory(&"us-east-1".parse()?)?;
    /// let group = network.create_security_group(network.default_vpc()?, "names", "a name server")?;
    /// network.authorize(group.id, Direction::Ingress, Rule::udp(53..=53, "0.0.0.0/0".parse()?))?;
    /// let interface = network.create_interface(network.interface_spec()?.groups([group.id]))?;
    /// let at = network.forward_udp(interface.id, 53, "127.0.0.1:0".parse()?)?;
    /// println!("dig @{} -p {} example.com", at.ip(), at.port());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_udp(&self, id: NetworkInterfaceId, port: u16, at: SocketAddr) -> Result<SocketAddr> {
        self.forward_by(Carrier::Udp, id, port, at)
    }

    /// Has a port of TCP reached no longer. Conversations go on.
    ///
    /// # Errors
    ///
    /// [`InterfaceNotFound`](crate::ErrorKind::InterfaceNotFound), or what the host refused.
    pub fn stop_forwarding(&self, id: NetworkInterfaceId, port: u16) -> Result<()> {
        self.stop_forwarding_by(Carrier::Tcp, id, port)
    }

    /// The same for a port of UDP. What came in there ends, as there is nothing left to answer from.
    ///
    /// # Errors
    ///
    /// As [`stop_forwarding`](Self::stop_forwarding).
    pub fn stop_forwarding_udp(&self, id: NetworkInterfaceId, port: u16) -> Result<()> {
        self.stop_forwarding_by(Carrier::Udp, id, port)
    }

    fn forward_by(
        &self,
        carrier: Carrier,
        id: NetworkInterfaceId,
        port: u16,
        at: SocketAddr,
    ) -> Result<SocketAddr> {
        if at.is_ipv6() {
            let what = format!("{at} cannot be forwarded to {id}: there is no IPv6 in this network");
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        let is_chosen = at.port() == 0;
        let mut plugged = self.plugged();
        if self.model().interface(id)?.forwards_by(carrier).0.get(&port) == Some(&at) {
            // It is listened at already where the interface is plugged in.
            return self.change_with(&mut plugged, |model| {
                model.interface_mut(id)?.forwards_mut(carrier).1.remove(&port);
                Ok(at)
            });
        }
        let listener = self.listener(carrier, at, (id, port))?;
        let at = listener.local_addr().map_err(|e| cannot_listen(at, e))?;
        // In one step: nobody finds it forwarded to nowhere, and of two who forward it the last has it.
        let before = self.change_with(&mut plugged, |model| {
            let (forwards, chosen) = model.interface_mut(id)?.forwards_mut(carrier);
            match is_chosen {
                true => chosen.insert(port),
                false => chosen.remove(&port),
            };
            Ok(forwards.insert(port, at))
        })?;
        if let Some(plugged) = plugged.get(&id) {
            if let Some(before) = before {
                plugged.edge.unlisten([(carrier, before)]);
            }
            plugged.edge.listen(Forward { listener, entrance: Entrance { at, port, to: None } });
        }
        Ok(at)
    }

    /// A listener at an address of the host's for a port of an interface that leads to no other, also not to one of an instance that
    /// is stopped: with port 0, at one that is free.
    fn listener(&self, carrier: Carrier, at: SocketAddr, of: (NetworkInterfaceId, u16)) -> Result<Listener> {
        // Those of others are held until one is found that is nobody's, as the host would give them again.
        let mut of_others = Vec::new();
        loop {
            let listener = Listener::bind(carrier, at).map_err(|e| cannot_listen(at, e))?;
            let found = listener.local_addr().map_err(|e| cannot_listen(at, e))?;
            let other = self.model().forwarded_at(carrier, found, of);
            match other {
                None => return Ok(listener),
                Some(_) if at.port() == 0 => of_others.push(listener),
                Some(other) => {
                    let what = format!("it leads to {other}");
                    return Err(cannot_listen(at, std::io::Error::new(IoErrorKind::AddrInUse, what)));
                }
            }
        }
    }

    fn stop_forwarding_by(&self, carrier: Carrier, id: NetworkInterfaceId, port: u16) -> Result<()> {
        let mut plugged = self.plugged();
        if !self.model().interface(id)?.forwards_by(carrier).0.contains_key(&port) {
            return Ok(());
        }
        let at = self.change_with(&mut plugged, |model| {
            let (forwards, chosen) = model.interface_mut(id)?.forwards_mut(carrier);
            chosen.remove(&port);
            Ok(forwards.remove(&port))
        })?;
        if let (Some(at), Some(plugged)) = (at, plugged.get(&id)) {
            plugged.edge.unlisten([(carrier, at)]);
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
        for carrier in [Carrier::Tcp, Carrier::Udp] {
            let (forwards, chosen) = interface.forwards_by(carrier);
            for (&port, &before) in forwards {
                let listener = match Listener::bind(carrier, before) {
                    Err(e) if e.kind() == IoErrorKind::AddrInUse && chosen.contains(&port) => {
                        self.listener(carrier, (before.ip(), 0).into(), (interface.id, port))?
                    }
                    bound => bound.map_err(|e| cannot_listen(before, e))?,
                };
                let at = listener.local_addr().map_err(|e| cannot_listen(before, e))?;
                there.edge.listen(Forward { listener, entrance: Entrance { at, port, to: None } });
                if at != before {
                    moved.push((carrier, port, at));
                }
            }
        }
        if moved.is_empty() {
            return Ok(());
        }
        self.change_with(plugged, |model| {
            let there = model.interface_mut(interface.id)?;
            for (carrier, port, at) in moved {
                there.forwards_mut(carrier).0.insert(port, at);
            }
            Ok(())
        })
    }
}

impl Plugged {
    /// Listens no longer for public addresses where that is not among what is wanted.
    pub(super) fn withdraw(&mut self, wanted: &PublicOffers) {
        let stays = |place: &(Carrier, SocketAddr), to: &Ipv4Addr| wanted.get(place) == Some(to);
        self.edge
            .unlisten(self.public.iter().filter(|(place, to)| !stays(place, to)).map(|(place, _)| *place));
        self.public.retain(|place, to| stays(place, to));
    }

    /// Listens for public addresses where that is wanted and the host lets us.
    pub(super) fn offer(&mut self, wanted: PublicOffers) {
        self.refused.clear();
        for ((carrier, at), to) in wanted {
            if self.public.contains_key(&(carrier, at)) {
                continue;
            }
            match Listener::bind(carrier, at) {
                Ok(listener) => {
                    let entrance = Entrance { at, port: at.port(), to: Some(to) };
                    self.edge.listen(Forward { listener, entrance });
                    self.public.insert((carrier, at), to);
                }
                Err(error) => {
                    tracing::warn!(%error, %at, "a public address is not listened at");
                    self.refused.insert((carrier, at), error.to_string());
                }
            }
        }
    }
}

//! Datagrams of clients outside, who come in where an address of the host's is listened at, and what the guest answers
//! them from there.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use instance_core::net::Frame;
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use smoltcp::wire::{Ipv4Packet, UdpPacket};

use super::datagram::{LONGEST, MOST, TURN};
use super::pace::{Pace, Side};
use super::{Entrance, Tokens, shown_as};
use crate::answer::udp_frame;
use crate::backlog::Sender;
use crate::packet::{Flow, Transport};
use crate::port::Port;

/// The guest's address and port, and the client's as the guest sees it.
type Key = ((Ipv4Addr, u16), (Ipv4Addr, u16));

/// Where an interface is listened for, and who has come.
pub(super) struct Visitors {
    tokens: Tokens,
    doors: Vec<Door>,
    visitors: HashMap<Key, Visitor>,
}

struct Door {
    socket: UdpSocket,
    entrance: Entrance,
}

struct Visitor {
    /// Where the client came in.
    at: SocketAddr,
    client: SocketAddr,
    pace: Pace,
}

impl Visitors {
    pub(super) fn new() -> Self {
        Self { tokens: Tokens(3), doors: Vec::new(), visitors: HashMap::new() }
    }

    /// Offers a port of the instance's to the world.
    pub(super) fn listen(
        &mut self,
        registry: &Registry,
        socket: std::net::UdpSocket,
        entrance: Entrance,
    ) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let mut socket = UdpSocket::from_std(socket);
        registry.register(&mut socket, self.tokens.next(), Interest::READABLE)?;
        self.doors.push(Door { socket, entrance });
        Ok(())
    }

    pub(super) fn unlisten(&mut self, at: SocketAddr) {
        self.doors.retain(|door| door.entrance.at != at);
        self.visitors.retain(|_, visitor| visitor.at != at);
    }

    /// A packet of the guest's. Says whether it was for one who came.
    pub(super) fn take(&mut self, flow: &Flow, packet: &[u8]) -> bool {
        let Transport::Udp { source, destination } = flow.transport else { return false };
        let key = ((flow.source, source), (flow.destination, destination));
        let Some(visitor) = self.visitors.get_mut(&key) else { return false };
        visitor.pace.said(Side::Guest);
        let payload =
            Ipv4Packet::new_checked(packet).ok().and_then(|ip| UdpPacket::new_checked(ip.payload()).ok());
        let door = self.doors.iter().find(|door| door.entrance.at == visitor.at);
        if let (Some(udp), Some(door)) = (payload, door) {
            // What the host does not take is lost, as datagrams are.
            let _ = door.socket.send_to(udp.payload(), visitor.client);
        }
        true
    }

    /// Gives the guest what has come for it, and forgets who is silent. Says whether more may have come.
    pub(super) fn work(&mut self, port: &Port) -> bool {
        let mut more = false;
        let view = port.view();
        let mut bytes = vec![0; if self.doors.is_empty() { 0 } else { LONGEST }];
        for door in &self.doors {
            let own = (door.entrance.to.unwrap_or(view.address), door.entrance.port);
            for turn in 1..=TURN {
                let Ok((len, client)) = door.socket.recv_from(&mut bytes) else { break };
                more |= turn == TURN;
                let IpAddr::V4(real) = client.ip() else { continue };
                let shown = shown_as(&view, real, &door.entrance);
                let key = (own, (shown, client.port()));
                let flow = |source| {
                    let transport = Transport::Udp { source: client.port(), destination: own.1 };
                    Flow { source, destination: own.0, transport }
                };
                let is_known = self.visitors.contains_key(&key);
                match self.visitors.get_mut(&key) {
                    // One whom the guest could not tell from another.
                    Some(there) if there.client != client || there.at != door.entrance.at => continue,
                    Some(there) => there.pace.said(Side::Other),
                    None if !port.admits(&flow(real), &flow(shown)) => continue,
                    None => {
                        if self.visitors.len() >= MOST {
                            let oldest = self.visitors.iter().min_by_key(|(_, there)| there.pace.last);
                            oldest.map(|(key, _)| *key).map(|key| self.visitors.remove(&key));
                        }
                        let pace = Pace::begun(Side::Other);
                        let visitor = Visitor { at: door.entrance.at, client, pace };
                        self.visitors.insert(key, visitor);
                    }
                }
                let frame = Frame::new(udp_frame(&view, (shown, client.port()), own, &bytes[..len]));
                // The conversation of one who is known may be over, and nobody is let in as whom the guest sees.
                let again = || is_known && port.admits(&flow(real), &flow(shown)) && port.lets_in(&frame);
                if port.lets_in(&frame) || again() {
                    port.give(Sender::Outside, port.fitted(frame));
                }
            }
        }
        self.visitors.retain(|_, visitor| !visitor.pace.is_over());
        more
    }
}

//! Datagrams of UDP and pings, each conversation over a socket of the host's.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::time::Duration;

use instance_core::net::Frame;
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, UdpPacket};
use socket2::{Domain, Protocol, Socket, Type};

use super::asked::Asked;
use super::budget::{Opener, Permit, Share};
use super::pace::{Pace, Side};
use super::{Reach, Tokens};
use crate::answer::{ipv4, udp_frame};
use crate::dns;
use crate::packet::{ECHO, ETHERNET_LEN, Flow, Transport};
use crate::port::Port;
use crate::switch::{DNS, View};

/// The most conversations of an interface; the one that was silent longest makes room, as it does where the network has
/// no socket left for the interface.
pub(super) const MOST: usize = 512;

/// How long one may be silent that asks for names, while there are questions without an answer: no resolver waits for longer.
const UNANSWERED: Duration = Duration::from_secs(10);

/// How many are read of a socket before others have their turn: whoever floods one holds up nothing else.
pub(super) const TURN: usize = 64;

/// The most bytes of a datagram in an IPv4 packet.
pub(super) const LONGEST: usize = 65_507;

/// What tells conversations apart: the guest's address with its port or ping's number, and who it speaks to, as it
/// sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Udp((Ipv4Addr, u16), (Ipv4Addr, u16)),
    Ping((Ipv4Addr, u16), Ipv4Addr),
}

/// The conversations of an interface.
pub(super) struct Datagrams {
    reach: Reach,
    share: Share,
    tokens: Tokens,
    conversations: HashMap<Key, Conversation>,
}

struct Conversation {
    socket: UdpSocket,
    _permit: Permit,
    pace: Pace,
    /// What one has asked that may ask for names: after the last answer it is over, as who looks many names up does so from
    /// many ports.
    asked: Option<Asked>,
}

impl Datagrams {
    pub(super) fn new(reach: Reach, share: Share) -> Self {
        Self { reach, share, tokens: Tokens(2), conversations: HashMap::new() }
    }

    /// A packet of the guest's.
    pub(super) fn take(&mut self, registry: &Registry, port: &Port, flow: &Flow, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        let key = match flow.transport {
            Transport::Udp { source, destination } => {
                Key::Udp((flow.source, source), (flow.destination, destination))
            }
            Transport::Icmp { kind: ECHO, id, .. } => Key::Ping((flow.source, id), flow.destination),
            _ => return,
        };
        match key {
            Key::Udp(own, (to, at)) => {
                let Ok(udp) = UdpPacket::new_checked(ip.payload()) else { return };
                let view = port.view();
                let known = view.is_resolver(to).then(|| dns::answer(&view, udp.payload())).flatten();
                if let Some(answer) = known {
                    let frame = udp_frame(&view, (to, at), own, &answer);
                    port.answer(Frame::new(frame));
                    return;
                }
                self.pass_on(registry, port, key, udp.payload());
            }
            // The host's kernel numbers it and computes its checksum.
            Key::Ping(..) => self.pass_on(registry, port, key, ip.payload()),
        }
    }

    fn pass_on(&mut self, registry: &Registry, port: &Port, key: Key, bytes: &[u8]) {
        if !self.conversations.contains_key(&key) {
            // Nothing ends for what may not go out.
            let Some(to) = self.way(port, key) else { return };
            if self.conversations.len() >= MOST {
                self.forget_oldest();
            }
            let Some(_permit) = self.permit(Opener::Guest) else { return };
            let Some(socket) = self.open(registry, key, to) else { return };
            let asked = matches!(key, Key::Udp(_, (_, DNS))).then(Asked::default);
            let conversation = Conversation { socket, _permit, pace: Pace::begun(Side::Guest), asked };
            self.conversations.insert(key, conversation);
        }
        if let Some(conversation) = self.conversations.get_mut(&key) {
            conversation.pace.said(Side::Guest);
            // Whoever says something else is in a conversation like others, of which nobody knows the end.
            conversation.asked.take_if(|asked| !asked.ask(bytes));
            // What the host does not take is lost, as datagrams are.
            let _ = conversation.socket.send(bytes);
        }
    }

    /// A socket for any conversation of the interface's with the world outside. Where there is none left, the conversation of
    /// datagrams ends that was silent longest.
    pub(super) fn permit(&mut self, opener: Opener) -> Option<Permit> {
        self.share.take(opener).or_else(|| {
            // Not for clients who have what they may have.
            if self.share.may_have(opener) {
                self.forget_oldest();
            }
            self.share.take(opener)
        })
    }

    fn forget_oldest(&mut self) {
        let oldest = self.conversations.iter().min_by_key(|(_, there)| there.pace.last).map(|(key, _)| *key);
        oldest.map(|key| self.conversations.remove(&key));
    }

    /// Where it goes, if it may go there.
    fn way(&self, port: &Port, key: Key) -> Option<SocketAddr> {
        match key {
            // Without a resolver there is nobody to ask.
            Key::Udp(_, (to, _)) if port.view().is_resolver(to) => self.reach.resolver,
            Key::Udp(_, (to, at)) => self.reach.allows(to).then(|| SocketAddr::new(to.into(), at)),
            Key::Ping(_, to) => self.reach.allows(to).then(|| SocketAddr::new(to.into(), 0)),
        }
    }

    fn open(&mut self, registry: &Registry, key: Key, to: SocketAddr) -> Option<UdpSocket> {
        let opened = match key {
            Key::Udp(..) => connect(to),
            Key::Ping(..) => ping(to),
        };
        let registered = opened.and_then(|mut socket| {
            registry.register(&mut socket, self.tokens.next(), Interest::READABLE)?;
            Ok(socket)
        });
        registered.inspect_err(|error| tracing::debug!(%error, ?key, "the host lets no datagrams out")).ok()
    }

    /// Gives the guest what has come for it, and forgets who is silent. Says whether more may have come.
    pub(super) fn work(&mut self, port: &Port) -> bool {
        let mut more = false;
        let view = port.view();
        let mut bytes = vec![0; if self.conversations.is_empty() { 0 } else { LONGEST }];
        for (key, conversation) in &mut self.conversations {
            for turn in 1..=TURN {
                let Some(len) = received(&conversation.socket, &mut bytes) else { break };
                more |= turn == TURN;
                conversation.pace.said(Side::Other);
                conversation.asked.iter_mut().for_each(|asked| asked.answer(&bytes[..len]));
                let frame = match *key {
                    Key::Udp(own, from) => udp_frame(&view, from, own, &bytes[..len]),
                    Key::Ping(own, from) => {
                        let Some(frame) = echo_reply(&view, from, own, &bytes[..len]) else { continue };
                        frame
                    }
                };
                match *key {
                    Key::Udp(_, (from, _)) if view.is_resolver(from) => port.answer(Frame::new(frame)),
                    _ => port.give_from_outside(Frame::new(frame)),
                }
            }
        }
        self.conversations.retain(|_, conversation| !conversation.is_over());
        more
    }
}

impl Conversation {
    fn is_over(&self) -> bool {
        match &self.asked {
            Some(asked) => asked.is_answered() || self.pace.last.elapsed() >= UNANSWERED,
            None => self.pace.is_over(),
        }
    }
}

/// What has come next. What became of datagrams of the guest's (ICMP), which the kernel tells before, is passed over: nobody would be
/// told again of what is behind it.
fn received(socket: &UdpSocket, bytes: &mut [u8]) -> Option<usize> {
    for _ in 0..TURN {
        match socket.recv(bytes) {
            Ok(len) => return Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(_) => {}
        }
    }
    None
}

fn connect(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket)
}

/// A socket for pings, which some hosts let nobody have.
fn ping(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))?;
    socket.set_nonblocking(true)?;
    socket.connect(&to.into())?;
    Ok(UdpSocket::from_std(StdUdpSocket::from(socket)))
}

/// The answer to a ping, with the number that the guest gave it.
fn echo_reply(view: &View, from: Ipv4Addr, own: (Ipv4Addr, u16), bytes: &[u8]) -> Option<Vec<u8>> {
    let (to, id) = own;
    let capabilities = ChecksumCapabilities::default();
    let packet = Icmpv4Packet::new_checked(bytes).ok()?;
    let Icmpv4Repr::EchoReply { seq_no, data, .. } = Icmpv4Repr::parse(&packet, &capabilities).ok()? else {
        return None;
    };
    let reply = Icmpv4Repr::EchoReply { ident: id, seq_no, data };
    let mut frame = ipv4(view, from, to, IpProtocol::Icmp, reply.buffer_len());
    reply.emit(&mut Icmpv4Packet::new_unchecked(&mut frame[ETHERNET_LEN + 20..]), &capabilities);
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_come_is_found_behind_an_error() {
        let there = StdUdpSocket::bind("127.78.5.2:0").unwrap().local_addr().unwrap();
        let socket = connect(there).unwrap();
        // Nobody is there, which the kernel says at once.
        socket.send(b"hello").unwrap();
        let host = StdUdpSocket::bind(there).unwrap();
        host.send_to(b"welcome", socket.local_addr().unwrap()).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(received(&socket, &mut bytes), Some(7));
        assert_eq!(received(&socket, &mut bytes), None);
    }
}

//! Instances that send each other frames of their own making, through the switch and the firewalls of both, beside a plain
//! model of what may arrive.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use ami_core::SecurityGroupId;
use instance_core::net::{Frame, MacAddress};

use super::conntrack::covers;
use super::known::{Conversation, Known, conversation};
use crate::firewall::{Conntrack, Direction, Members, Peer, Policy, Ports, Protocol, Rule};
use crate::packet::{ECHO, ECHO_REPLY, Flow, TcpFlags, Transport};
use crate::switch::{self, Giver, LOCAL_CLIENT, ROUTER_MAC, Verdict, View};

/// Two of a subnet and one of another.
const ADDRESSES: [Ipv4Addr; 3] =
    [Ipv4Addr::new(10, 0, 0, 4), Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(10, 0, 1, 6)];
const GROUPS: [&str; 2] = ["sg-0000000000000000a", "sg-0000000000000000b"];

/// The router of the third one's subnet.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

struct Station {
    address: Ipv4Addr,
    mac: MacAddress,
    is_in: [bool; 2],
    /// Whether it may pass on what is from others.
    forwards: bool,
    table: Conntrack,
    known: HashMap<Conversation, Known>,
}

struct World {
    stations: [Station; 3],
    /// Each of a group and a direction.
    rules: Vec<(usize, Direction, Rule)>,
    groups: [SecurityGroupId; 2],
    now: u32,
}

/// Frames, changes of rules and members, clients from outside, and addresses that change hands.
pub fn firewall(bytes: &[u8]) {
    let [Ok(a), Ok(b)] = GROUPS.map(str::parse) else { return };
    let station = |n: u8| Station {
        address: ADDRESSES[usize::from(n)],
        mac: MacAddress([6, 0, 0, 0, 0, n + 4]),
        is_in: [true, n == 1],
        forwards: false,
        table: Conntrack::new(1600),
        known: HashMap::new(),
    };
    let mut world = World { stations: [0, 1, 2].map(station), rules: Vec::new(), groups: [a, b], now: 0 };
    for step in bytes.chunks_exact(5) {
        let [action, a, b, c, d] = [0, 1, 2, 3, 4].map(|n| step[n]);
        let who = usize::from(a % 3);
        match action % 16 {
            0 => world.rules.clear(),
            1..=3 => world.add_rule(a, b, c),
            4 if b & 2 != 0 => world.stations[who].forwards ^= true,
            4 => world.stations[who].is_in[usize::from(b & 1)] ^= true,
            5 => world.now += u32::from(b),
            6 => world.changes_hands(who),
            7 => world.client(who, c, d),
            8 => world.error(who, usize::from(a / 3 % 3), b, transport(b >> 1, c, d)),
            _ => world.frame(who, usize::from(a / 3 % 4), b >> 5, transport(b, c, d)),
        }
        world.stations.iter().for_each(|station| station.table.check());
    }
}

fn transport(kind: u8, c: u8, d: u8) -> Transport {
    let (source, destination) = (u16::from(c & 3), u16::from(d & 3));
    let bit = |n: u8| c >> n & 1 == 1;
    match kind & 3 {
        0 | 1 => {
            let (syn, ack, fin, rst) = (bit(2), bit(3), bit(4), bit(5));
            let (sequence, acknowledged) = ((d >> 2 & 3).into(), (d >> 4 & 3).into());
            Transport::Tcp {
                source,
                destination,
                flags: TcpFlags { syn, ack, fin, rst, sequence, acknowledged },
            }
        }
        2 => Transport::Udp { source, destination },
        _ => Transport::Icmp { kind: if bit(2) { ECHO } else { ECHO_REPLY }, code: 0, id: source },
    }
}

impl World {
    fn add_rule(&mut self, a: u8, b: u8, c: u8) {
        const MOST: usize = 8;
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Any][usize::from(b & 3)];
        let ports = match protocol {
            Protocol::Tcp | Protocol::Udp if b & 4 != 0 => {
                Ports::Range(u16::from(b >> 3 & 3)..=u16::from(b >> 5 & 3))
            }
            _ => Ports::All,
        };
        let net = |text: &str| text.parse().map_or(Peer::Group(self.groups[0]), Peer::Cidr);
        let peer = match c % 6 {
            0 => net("0.0.0.0/0"),
            1 => net("10.0.0.5/32"),
            2 => net("10.0.1.0/24"),
            3 => net("203.0.113.0/25"),
            n => Peer::Group(self.groups[usize::from(n & 1)]),
        };
        let way = if a & 1 == 0 { Direction::Ingress } else { Direction::Egress };
        if self.rules.len() < MOST {
            self.rules.push((usize::from(a >> 1 & 1), way, Rule { protocol, ports, ..Rule::all(peer) }));
        }
    }

    fn of(&self, who: usize, way: Direction) -> impl Iterator<Item = &Rule> {
        let is_in = self.stations[who].is_in;
        self.rules.iter().filter(move |(group, of, _)| is_in[*group] && *of == way).map(|(_, _, rule)| rule)
    }

    /// What a rule says, word by word. `is_itself` says that the peer has the address.
    fn by_rule(
        &self,
        who: usize,
        way: Direction,
        (peer, is_itself): (Ipv4Addr, bool),
        transport: &Transport,
    ) -> bool {
        self.of(who, way).any(|rule| {
            let names = match rule.peer {
                Peer::Cidr(cidr) => cidr.contains(&peer),
                Peer::Group(named) => self.stations.iter().any(|there| {
                    is_itself
                        && there.address == peer
                        && (0..2).any(|n| there.is_in[n] && self.groups[n] == named)
                }),
            };
            names && covers(rule, transport)
        })
    }

    /// Whether a conversation goes on.
    fn goes_on(&self, who: usize, way: Direction, flow: &Flow) -> bool {
        self.stations[who].known.get(&conversation(way, flow)).is_some_and(|known| known.lives(self.now))
    }

    fn passed(&mut self, who: usize, way: Direction, flow: &Flow) {
        let known = self.stations[who].known.entry(conversation(way, flow)).or_default();
        known.passed(way, flow, self.now);
    }

    fn view(&self, who: usize) -> Option<View> {
        let station = &self.stations[who];
        let mut view = super::view()?;
        (view.mac, view.address) = (station.mac, station.address);
        view.source_dest_check = !station.forwards;
        view.subnet = ipnet::Ipv4Net::new_assert(station.address, 24).trunc();
        let members = |group: SecurityGroupId| {
            let is_in = |there: &&Station| (0..2).any(|n| there.is_in[n] && self.groups[n] == group);
            Members::new(self.stations.iter().filter(is_in).map(|there| there.address).collect())
        };
        view.policy = Policy::new(self.of(who, Direction::Ingress), self.of(who, Direction::Egress), members);
        Some(view)
    }

    /// A frame from one to another, or to a client on the host, with what is not its own as `lie` says.
    fn frame(&mut self, from: usize, to: usize, lie: u8, transport: Transport) {
        let Some(view) = self.view(from) else { return };
        let sender = &self.stations[from];
        let destination = self.stations.get(to).map_or(LOCAL_CLIENT, |there| there.address);
        let stranger = &self.stations[(from + 1) % 3];
        let mac = if lie & 1 == 0 { sender.mac } else { stranger.mac };
        let source = [sender.address, stranger.address, LOCAL_CLIENT, ROUTER][usize::from(lie >> 1 & 3)];
        let is_itself = source == sender.address;
        // What it passes on is from somebody, as far as it knows.
        let is_honest = mac == sender.mac
            && (is_itself || sender.forwards && source != LOCAL_CLIENT && source != view.router());
        let flow = Flow { source, destination, transport };
        let frame = frame_of(mac, &flow, &message(&transport));
        let by_rule = self.by_rule(from, Direction::Egress, (destination, true), &transport);
        let may = by_rule || self.goes_on(from, Direction::Egress, &flow);
        let verdict = self.decide(from, &view, frame);
        assert!(verdict == Verdict::Drop || is_honest && may, "{flow:?} leaves {from}, {lie}");
        assert!(verdict != Verdict::Drop || !is_honest || !by_rule, "{flow:?} is kept from leaving {from}");
        if verdict != Verdict::Drop {
            self.passed(from, Direction::Egress, &flow);
        }
        match verdict {
            Verdict::Local(at, frame) => {
                assert!(at == destination && frame.data[..6] == self.stations[to].mac.0);
                let is_sound = self.view(to).is_some_and(|view| view.router() != source);
                let by_rule = self.by_rule(to, Direction::Ingress, (source, is_itself), &transport);
                let may = by_rule || self.goes_on(to, Direction::Ingress, &flow);
                let Some(passes) = self.admit(to, Giver::Peer(&view), &frame.data) else { return };
                assert!(passes || !by_rule || !is_sound, "{flow:?} is kept from {to}");
                assert!(!passes || may && is_sound, "{flow:?} is let in to {to}");
                if passes {
                    self.passed(to, Direction::Ingress, &flow);
                }
            }
            Verdict::Edge(_) => assert_eq!(destination, LOCAL_CLIENT),
            Verdict::Drop | Verdict::Reply(_) => assert_eq!(verdict, Verdict::Drop, "nobody has asked"),
        }
    }

    /// An error from one to another, about a packet that the other would have sent.
    fn error(&mut self, from: usize, to: usize, lie: u8, about: Transport) {
        const UNREACHABLE: u8 = 3;
        if from == to || matches!(about, Transport::Icmp { .. }) {
            return;
        }
        let Some(view) = self.view(from) else { return };
        let [own, other] = [from, to].map(|n| self.stations[n].address);
        let quoted =
            Flow { source: if lie & 1 == 0 { other } else { own }, destination: own, transport: about };
        let quote = frame_of(MacAddress([0; 6]), &quoted, &message(&about));
        let error = Transport::Icmp { kind: UNREACHABLE, code: 3, id: 0 };
        let flow = Flow { source: own, destination: other, transport: error };
        let frame = frame_of(view.mac, &flow, &[&[UNREACHABLE, 3, 0, 0, 0, 0, 0, 0], &quote[14..]].concat());
        // At the sender of the error the packet had come in, and at its receiver gone out.
        let may = |world: &Self, who: usize, way: Direction, peer: Ipv4Addr| {
            let went = way.opposite();
            let goes_on = world.by_rule(who, went, (peer, true), &about) || world.goes_on(who, went, &quoted);
            world.by_rule(who, way, (peer, true), &error) || lie & 1 == 0 && goes_on
        };
        let leaves = may(self, from, Direction::Egress, other);
        let verdict = self.decide(from, &view, frame);
        assert!(verdict == Verdict::Drop || leaves, "an error about {quoted:?} leaves {from}");
        if let Verdict::Local(_, frame) = verdict {
            let arrives = may(self, to, Direction::Ingress, own);
            let passes = self.admit(to, Giver::Peer(&view), &frame.data);
            assert!(passes != Some(true) || arrives, "an error about {quoted:?} is let in to {to}");
        }
    }

    /// A client from outside at a port that is forwarded, which the instance sees as one on the host.
    fn client(&mut self, who: usize, c: u8, d: u8) {
        let Some(view) = self.view(who) else { return };
        let (source, destination) = (u16::from(c & 3), u16::from(d & 3));
        let transport = match c & 4 {
            0 => Transport::Tcp { source, destination, flags: TcpFlags { syn: true, ..TcpFlags::default() } },
            _ => Transport::Udp { source, destination },
        };
        // Who has the address of a member of a group is none.
        let source = match d {
            0..=15 => self.stations[usize::from(d) % self.stations.len()].address,
            _ => Ipv4Addr::new(203, 0, 113, d),
        };
        let real = Flow { source, destination: view.address, transport };
        let shown = Flow { source: LOCAL_CLIENT, ..real };
        let names = |rule: &Rule| matches!(rule.peer, Peer::Cidr(cidr) if cidr.contains(&source));
        let by_rule = self.of(who, Direction::Ingress).any(|rule| names(rule) && covers(rule, &transport));
        let station = &mut self.stations[who];
        let passes = station.table.admit_as(&view.policy, &real, &shown, self.now);
        assert_eq!(passes, by_rule, "{real:?} at {who}");
        if passes {
            let known = station.known.entry(conversation(Direction::Ingress, &shown)).or_default();
            known.admitted(self.now);
            let first = frame_of(ROUTER_MAC, &shown, &message(&transport));
            // Those of rules for everybody are not tracked, and seen by their own addresses.
            let untracked = view.policy.leaves_untracked(Direction::Ingress, &real);
            let first = self.admit(who, Giver::Edge, &first);
            assert!(untracked || first == Some(true), "{shown:?} was admitted");
        }
    }

    /// An instance goes, and another gets its address.
    fn changes_hands(&mut self, who: usize) {
        let gone = self.stations[who].address;
        for station in &mut self.stations {
            station.table.forget(|peer| peer == gone);
            station.known.retain(|of, _| of.peer.0 != gone && of.own.0 != gone);
        }
        (self.stations[who].table, self.stations[who].known) = (Conntrack::new(1600), HashMap::new());
    }

    fn decide(&mut self, from: usize, view: &View, frame: Vec<u8>) -> Verdict {
        let macs: Vec<_> = self.stations.iter().map(|there| (there.address, there.mac)).collect();
        let peers = |at: Ipv4Addr| macs.iter().find(|(address, _)| *address == at).map(|(_, mac)| *mac);
        switch::decide(view, &peers, &mut self.stations[from].table, Frame::new(frame), self.now)
    }

    fn admit(&mut self, to: usize, from: Giver<'_>, frame: &[u8]) -> Option<bool> {
        let view = self.view(to)?;
        Some(switch::admit(&view, from, &mut self.stations[to].table, frame, self.now))
    }
}

/// The bytes behind the header of IPv4.
fn message(transport: &Transport) -> Vec<u8> {
    match *transport {
        Transport::Tcp { source, destination, flags } => {
            let bits = u8::from(flags.fin)
                | u8::from(flags.syn) << 1
                | u8::from(flags.rst) << 2
                | u8::from(flags.ack) << 4;
            let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
            let numbers = [flags.sequence.to_be_bytes(), flags.acknowledged.to_be_bytes()].concat();
            [&ports[..], &numbers, &[5 << 4, bits, 1, 0, 0, 0, 0, 0]].concat()
        }
        Transport::Udp { source, destination } => {
            [source.to_be_bytes(), destination.to_be_bytes(), [0, 8], [0; 2]].concat()
        }
        Transport::Icmp { kind, code, id } => [[kind, code], [0; 2], id.to_be_bytes(), [0; 2]].concat(),
        Transport::Other(_) => Vec::new(),
    }
}

fn frame_of(from: MacAddress, flow: &Flow, message: &[u8]) -> Vec<u8> {
    let len = (20 + message.len() as u16).to_be_bytes();
    let header = [0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, flow.transport.number(), 0, 0];
    let addresses = [flow.source.octets(), flow.destination.octets()].concat();
    [&ROUTER_MAC.0[..], &from.0, &[8, 0], &header, &addresses, message].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn agrees_with_a_plain_model(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            super::firewall(&bytes);
        }
    }
}

//! Packets against rules, with a plain model as the oracle.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::packet::{ECHO, ECHO_REPLY, TcpFlags, Transport};

const PEER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

fn policy(ingress: &[Rule], egress: &[Rule]) -> Policy {
    let allowed = |rules: &[Rule]| {
        rules.iter().map(|rule| Allowed { rule: rule.clone(), members: HashSet::new() }).collect()
    };
    Policy { ingress: allowed(ingress), egress: allowed(egress) }
}

fn anywhere() -> ipnet::Ipv4Net {
    "0.0.0.0/0".parse().unwrap()
}

const SYN: TcpFlags = TcpFlags { syn: true, ack: false, end: false };
const ACK: TcpFlags = TcpFlags { syn: false, ack: true, end: false };
const FIN: TcpFlags = TcpFlags { syn: false, ack: true, end: true };

fn tcp(source: u16, destination: u16, flags: TcpFlags) -> Transport {
    Transport::Tcp { source, destination, flags }
}

fn inwards(transport: Transport) -> Flow {
    Flow { source: PEER, destination: OWN, transport }
}

fn outwards(transport: Transport) -> Flow {
    Flow { source: OWN, destination: PEER, transport }
}

#[test]
fn a_rule_covers_what_it_says() {
    let nearby: ipnet::Ipv4Net = "203.0.113.0/24".parse().unwrap();
    let elsewhere = "198.51.100.0/24".parse().unwrap();
    let number = |n| Rule { protocol: Protocol::Number(n), ..Rule::all(Peer::Cidr(nearby)) };
    let udp = |port| Transport::Udp { source: 5, destination: port };
    let icmp = |kind, code| Transport::Icmp { kind, code, id: 0 };
    let unreachable = Rule { ports: Ports::Icmp(3, Some(4)), ..Rule::ping(nearby) };
    for (n, (rule, transport, expect)) in [
        (Rule::tcp(22, nearby), tcp(5, 22, SYN), true),
        (Rule::tcp(22, nearby), tcp(5, 23, SYN), false),
        (Rule::tcp(22, nearby), tcp(22, 5, SYN), false),
        (Rule::tcp(22, nearby), udp(22), false),
        (Rule::tcp(22, elsewhere), tcp(5, 22, SYN), false),
        (Rule::udp(10..=20, nearby), udp(10), true),
        (Rule::udp(10..=20, nearby), udp(20), true),
        (Rule::udp(10..=20, nearby), udp(21), false),
        (Rule::ping(nearby), icmp(8, 0), true),
        (Rule::ping(nearby), icmp(3, 0), false),
        (unreachable.clone(), icmp(3, 4), true),
        (unreachable, icmp(3, 1), false),
        (number(47), Transport::Other(47), true),
        (number(47), Transport::Other(50), false),
        (number(6), tcp(1, 2, SYN), true),
        (Rule::all(Peer::Cidr(nearby)), Transport::Other(50), true),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(policy(&[rule], &[]).allows(Direction::Ingress, &inwards(transport)), expect, "case {n}");
    }
}

#[test]
fn a_group_stands_for_its_members() {
    let rule = Rule::all(Peer::Group("sg-0123456789abcdef0".parse().unwrap()));
    let mut policy = policy(&[rule], &[]);
    assert!(!policy.allows(Direction::Ingress, &inwards(tcp(1, 2, SYN))));
    policy.ingress[0].members.insert(PEER);
    assert!(policy.allows(Direction::Ingress, &inwards(tcp(1, 2, SYN))));
}

#[test]
fn an_answer_needs_no_rule_and_outlives_it() {
    let (open, closed) = (policy(&[Rule::tcp(22, anywhere())], &[]), Policy::default());
    let mut table = Conntrack::new(100);
    assert!(!table.allows(&open, Direction::Egress, &outwards(tcp(22, 5, ACK)), 0), "before the question");
    assert!(table.allows(&open, Direction::Ingress, &inwards(tcp(5, 22, SYN)), 0));
    assert!(table.allows(&open, Direction::Egress, &outwards(tcp(22, 5, ACK)), 0));
    // The rule goes: this conversation goes on, another does not begin.
    assert!(table.allows(&closed, Direction::Ingress, &inwards(tcp(5, 22, ACK)), 300));
    assert!(!table.allows(&closed, Direction::Ingress, &inwards(tcp(6, 22, SYN)), 300));
    // It is over when it has been silent for long.
    assert!(!table.allows(&closed, Direction::Ingress, &inwards(tcp(5, 22, ACK)), 651));
}

#[test]
fn a_conversation_that_was_closed_does_not_begin_anew_without_a_rule() {
    let (open, closed) = (policy(&[Rule::tcp(22, anywhere())], &[]), Policy::default());
    let mut table = Conntrack::new(100);
    for (direction, flow) in [
        (Direction::Ingress, inwards(tcp(5, 22, SYN))),
        (Direction::Egress, outwards(tcp(22, 5, ACK))),
        (Direction::Egress, outwards(tcp(22, 5, FIN))),
        (Direction::Ingress, inwards(tcp(5, 22, FIN))),
    ] {
        assert!(table.allows(&open, direction, &flow, 0));
    }
    assert!(table.allows(&closed, Direction::Egress, &outwards(tcp(22, 5, ACK)), 1), "the last word");
    assert!(!table.allows(&closed, Direction::Ingress, &inwards(tcp(5, 22, SYN)), 1));
}

#[test]
fn echoes_and_errors_belong_to_what_they_answer() {
    let open = policy(&[], &[Rule::ping(anywhere())]);
    let mut table = Conntrack::new(100);
    let icmp = |kind, id| Transport::Icmp { kind, code: 0, id };
    assert!(!table.allows(&open, Direction::Ingress, &inwards(icmp(ECHO_REPLY, 7)), 0));
    assert!(table.allows(&open, Direction::Egress, &outwards(icmp(ECHO, 7)), 0));
    assert!(table.allows(&open, Direction::Ingress, &inwards(icmp(ECHO_REPLY, 7)), 0));
    assert!(!table.allows(&open, Direction::Ingress, &inwards(icmp(ECHO_REPLY, 8)), 0));
    assert!(table.allows_error(Direction::Ingress, &outwards(icmp(ECHO, 7)), 0));
    assert!(!table.allows_error(Direction::Ingress, &outwards(icmp(ECHO, 8)), 0));
}

#[test]
fn a_flood_of_beginnings_ends_no_conversation() {
    let open = policy(&[Rule::tcp(80, anywhere())], &[]);
    let mut table = Conntrack::new(800);
    for port in 1..=500 {
        assert!(table.allows(&open, Direction::Ingress, &inwards(tcp(port, 80, SYN)), 0));
        assert!(table.allows(&open, Direction::Egress, &outwards(tcp(80, port, ACK)), 0));
    }
    for n in 0..100_000u32 {
        let flow = Flow { source: Ipv4Addr::from(n), ..inwards(tcp(9, 80, SYN)) };
        assert!(table.allows(&open, Direction::Ingress, &flow, 1));
        assert!(table.len() <= 800 && table.beginnings() <= 200);
    }
    for port in 1..=500 {
        let established =
            table.allows(&Policy::default(), Direction::Egress, &outwards(tcp(80, port, ACK)), 2);
        assert!(established, "{port}");
    }
}

proptest! {
    /// Whatever comes, a packet passes if and only if a rule allows it or one of its conversation passed before.
    #[test]
    fn agrees_with_a_plain_model(
        packets in proptest::collection::vec((any::<bool>(), 0u16..4, 0u16..4, any::<bool>()), 0..200),
        ports in proptest::collection::vec((any::<bool>(), 0u16..4), 0..4),
    ) {
        let rules = |inwards| {
            let of = ports.iter().filter(|(way, _)| *way == inwards);
            of.map(|(_, port)| Rule::tcp(*port, anywhere())).collect::<Vec<_>>()
        };
        let policy = policy(&rules(true), &rules(false));
        let mut table = Conntrack::new(1000);
        let mut known = HashSet::new();
        for (comes_in, own, theirs, syn) in packets {
            let flags = if syn { SYN } else { ACK };
            let (direction, flow, receiver) = if comes_in {
                (Direction::Ingress, inwards(tcp(theirs, own, flags)), own)
            } else {
                (Direction::Egress, outwards(tcp(own, theirs, flags)), theirs)
            };
            let expect = known.contains(&(own, theirs)) || ports.contains(&(comes_in, receiver));
            prop_assert_eq!(table.allows(&policy, direction, &flow, 0), expect);
            if expect {
                known.insert((own, theirs));
            }
        }
    }
}

//! Packets against rules.

use std::net::Ipv4Addr;

mod ends;

use super::*;
use crate::packet::{ECHO, ECHO_REPLY, Flow, TcpFlags, Transport};

const PEER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

use Direction::{Egress, Ingress};

fn policy(ingress: &[Rule], egress: &[Rule]) -> Policy {
    Policy::new(ingress, egress, |_| Members::default())
}

fn anywhere() -> ipnet::Ipv4Net {
    "0.0.0.0/0".parse().unwrap()
}

/// Where the peer is: what is open to it is not open to all, and so is tracked.
fn nearby() -> ipnet::Ipv4Net {
    "203.0.113.0/24".parse().unwrap()
}

fn flags(letters: &str, sequence: u32, acknowledged: u32) -> TcpFlags {
    let has = |letter| letters.contains(letter);
    TcpFlags { syn: has('S'), ack: has('A'), fin: has('F'), rst: has('R'), sequence, acknowledged }
}

fn tcp(source: u16, destination: u16, flags: TcpFlags) -> Transport {
    Transport::Tcp { source, destination, flags }
}

fn inwards(transport: Transport) -> Flow {
    Flow { source: PEER, destination: OWN, transport }
}

fn outwards(transport: Transport) -> Flow {
    Flow { source: OWN, destination: PEER, transport }
}

/// A packet of a conversation between the peer's port 5 and the own port 22: `>` comes in.
fn said(table: &mut Conntrack, policy: &Policy, packet: &str, now: u32) -> bool {
    let mut words = packet.split(' ');
    let (way, letters) = (words.next().unwrap(), words.next().unwrap());
    let mut number = || words.next().map_or(0, |word| word.parse().unwrap());
    let flags = flags(letters, number(), number());
    let allowed = match way {
        ">" => table.allows(policy, Ingress, &inwards(tcp(5, 22, flags)), now),
        "<" => table.allows(policy, Egress, &outwards(tcp(22, 5, flags)), now),
        _ => panic!("{way}"),
    };
    table.check();
    allowed
}

/// Says whether each packet passes, in its order; `-` is one that does not.
fn check(table: &mut Conntrack, policy: &Policy, now: u32, packets: &[&str]) {
    for (n, packet) in packets.iter().enumerate() {
        let (expect, packet) = packet.strip_prefix("- ").map_or((true, *packet), |packet| (false, packet));
        assert_eq!(said(table, policy, packet, now), expect, "packet {n}, {packet:?} at {now}");
    }
}

const HANDSHAKE: &[&str] = &["> S 100", "< SA 900 101", "> A 101 901"];

#[test]
fn a_rule_covers_what_it_says() {
    let elsewhere = "198.51.100.0/24".parse().unwrap();
    let number = |n| Rule { protocol: Protocol::Number(n), ..Rule::all(Peer::Cidr(nearby())) };
    let udp = |port| Transport::Udp { source: 5, destination: port };
    let icmp = |kind, code| Transport::Icmp { kind, code, id: 0 };
    let unreachable = Rule { ports: Ports::Icmp(3, Some(4)), ..Rule::ping(nearby()) };
    let syn = flags("S", 0, 0);
    for (n, (rule, transport, expect)) in [
        (Rule::tcp(22, nearby()), tcp(5, 22, syn), true),
        (Rule::tcp(22, nearby()), tcp(5, 23, syn), false),
        (Rule::tcp(22, nearby()), tcp(22, 5, syn), false),
        (Rule::tcp(22, nearby()), udp(22), false),
        (Rule::tcp(22, elsewhere), tcp(5, 22, syn), false),
        (Rule::udp(10..=20, nearby()), udp(10), true),
        (Rule::udp(10..=20, nearby()), udp(20), true),
        (Rule::udp(10..=20, nearby()), udp(21), false),
        (Rule::ping(nearby()), icmp(8, 0), true),
        (Rule::ping(nearby()), icmp(3, 0), false),
        (unreachable.clone(), icmp(3, 4), true),
        (unreachable, icmp(3, 1), false),
        (number(47), Transport::Other(47), true),
        (number(47), Transport::Other(50), false),
        (number(6), tcp(1, 2, syn), true),
        (Rule::all(Peer::Cidr(nearby())), Transport::Other(50), true),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(policy(&[rule], &[]).allows(Ingress, &inwards(transport)), expect, "case {n}");
    }
}

#[test]
fn a_group_stands_for_its_members() {
    let rule = [Rule::all(Peer::Group("sg-0123456789abcdef0".parse().unwrap()))];
    let syn = inwards(tcp(1, 2, flags("S", 0, 0)));
    for (members, expect) in [(vec![], false), (vec![OWN], false), (vec![OWN, PEER], true)] {
        let policy = Policy::new(&rule, &[], |_| Members::new(members.iter().copied().collect()));
        assert_eq!(policy.allows(Ingress, &syn), expect, "{members:?}");
    }
}

#[test]
fn an_answer_needs_no_rule_and_outlives_it() {
    let (open, closed) = (policy(&[Rule::tcp(22, nearby())], &[]), Policy::default());
    let table = &mut Conntrack::new(1000);
    check(table, &open, 0, &["- < SA 900 101"]);
    check(table, &open, 0, HANDSHAKE);
    // The rule goes: this conversation goes on, also after days, another does not begin.
    check(table, &closed, 431_000, &["> A 101 901", "< A 901 101"]);
    let other = inwards(tcp(6, 22, flags("S", 0, 0)));
    assert!(!table.allows(&closed, Ingress, &other, 431_000));
    check(table, &closed, 431_000 + 432_001, &["- > A 101 901"]);
}

#[test]
fn a_conversation_does_not_begin_anew_without_a_rule() {
    let (open, closed) = (policy(&[Rule::tcp(22, nearby())], &[]), Policy::default());
    let table = &mut Conntrack::new(1000);
    check(table, &open, 0, HANDSHAKE);
    check(table, &closed, 0, &["- > S 500", "- < S 500", "> A 101 901"]);
    // Half of it may be closed for long.
    check(table, &closed, 0, &["< FA 901 101"]);
    check(table, &closed, 10_000, &["> A 101 902", "> FA 101 902", "< A 902 102", "- > S 500"]);
    // Closed, it is soon forgotten.
    check(table, &closed, 10_030, &["< A 902 102"]);
    check(table, &closed, 10_061, &["- < A 902 102"]);
    check(table, &open, 10_061, HANDSHAKE);
}

#[test]
fn a_syn_that_is_said_again_asks_the_rules_in_the_end() {
    let (open, closed) = (policy(&[Rule::tcp(22, nearby())], &[]), Policy::default());
    let table = &mut Conntrack::new(1000);
    check(table, &open, 0, &["> S 100"]);
    check(table, &closed, 20, &["> S 100", "- > S 200", "- < S 500"]);
    check(table, &closed, 31, &["- > S 100"]);
    // Also where more are over than one packet clears away.
    let begin = |port| inwards(tcp(port, 22, flags("S", 100, 0)));
    assert!((1..=20).all(|port| table.allows(&open, Ingress, &begin(port), 31)));
    assert!(!table.allows(&closed, Ingress, &begin(20), 62));
}

#[test]
fn a_reset_ends_what_its_sender_is_part_of() {
    let (open, closed) = (policy(&[Rule::tcp(22, nearby())], &[]), Policy::default());
    for (reset, ends) in [("> R 101", true), ("> R 102", false), ("< R 901", true), ("< R 101", false)] {
        let table = &mut Conntrack::new(1000);
        check(table, &open, 0, HANDSHAKE);
        check(table, &closed, 0, &[reset]);
        assert_eq!(said(table, &closed, "< A 901 101", 31), !ends, "{reset}");
    }
    // Nobody listens.
    let table = &mut Conntrack::new(1000);
    check(table, &open, 0, &["> S 100", "< RA 0 555", "> S 100"]);
    assert_eq!(table.len(), 1, "it has another number");
    check(table, &open, 0, &["< RA 0 101"]);
    assert_eq!(table.len(), 0);
    check(table, &closed, 0, &["- > S 100"]);
}

#[test]
fn echoes_belong_to_what_they_answer() {
    let open = policy(&[], &[Rule::ping(anywhere())]);
    let mut table = Conntrack::new(1000);
    let icmp = |kind, id| Transport::Icmp { kind, code: 0, id };
    assert!(!table.allows(&open, Ingress, &inwards(icmp(ECHO_REPLY, 7)), 0));
    assert!(table.allows(&open, Egress, &outwards(icmp(ECHO, 7)), 0));
    assert!(table.allows(&open, Ingress, &inwards(icmp(ECHO_REPLY, 7)), 0));
    assert!(!table.allows(&open, Ingress, &inwards(icmp(ECHO_REPLY, 8)), 0));
    assert!(!table.allows(&open, Ingress, &inwards(icmp(ECHO, 7)), 0), "asking is no answer");
}

#[test]
fn errors_belong_to_what_they_are_about() {
    let pings = policy(&[], &[Rule::ping(anywhere())]);
    let mut table = Conntrack::new(1000);
    let icmp = |kind, id| Transport::Icmp { kind, code: 0, id };
    let error = inwards(Transport::Icmp { kind: 3, code: 4, id: 0 });
    assert!(table.allows(&pings, Egress, &outwards(icmp(ECHO, 7)), 0));
    for (id, expect) in [(7, true), (8, false)] {
        let about = outwards(icmp(ECHO, id));
        assert_eq!(
            table.allows_error(&pings, Ingress, &about, pings.allows(Ingress, &error), 0),
            expect,
            "{id}"
        );
    }
    // Of what is not tracked, and by a rule of its own.
    let about = outwards(tcp(80, 5, TcpFlags::default()));
    let everything = [Rule::all(Peer::Cidr(anywhere()))];
    let web = policy(&[Rule::tcp(80, anywhere())], &everything);
    let path_mtu = policy(&[Rule { ports: Ports::Icmp(3, Some(4)), ..Rule::ping(nearby()) }], &[]);
    for (policy, expect) in [(&pings, false), (&web, true), (&path_mtu, true)] {
        assert_eq!(table.allows_error(policy, Ingress, &about, policy.allows(Ingress, &error), 0), expect);
    }
}

#[test]
fn what_is_open_to_all_needs_no_memory_and_ends_with_its_rule() {
    let everything = [Rule::all(Peer::Cidr(anywhere()))];
    let open = policy(&[Rule::tcp(22, anywhere())], &everything);
    let table = &mut Conntrack::new(1000);
    check(table, &open, 0, HANDSHAKE);
    assert_eq!(table.len(), 0);
    check(table, &policy(&[], &everything), 0, &["- > A 101 901", "< A 901 101", "- > A 101 901"]);
    // One way out is not enough, and who is asked by the instance is tracked.
    let narrow = policy(&[Rule::tcp(22, anywhere())], &[Rule::tcp(5, anywhere())]);
    check(table, &narrow, 0, HANDSHAKE);
    assert_eq!(table.len(), 1);
    let asks = outwards(tcp(1000, 443, flags("S", 1, 0)));
    assert!(table.allows(&open, Egress, &asks, 0));
    assert_eq!(table.len(), 2);
}

#[test]
fn udp_is_a_stream_once_it_was_answered_twice() {
    let open = policy(&[Rule::udp(53..=53, nearby())], &[]);
    let asks = inwards(Transport::Udp { source: 5, destination: 53 });
    let answers = outwards(Transport::Udp { source: 53, destination: 5 });
    for (packets, lives) in [("><", 30), ("><>", 30), ("><><", 180), ("><<<", 30)] {
        for (silent, expect) in [(lives, true), (lives + 1, false)] {
            let mut table = Conntrack::new(1000);
            for way in packets.chars() {
                let (direction, flow) = if way == '>' { (Ingress, &asks) } else { (Egress, &answers) };
                assert!(table.allows(&open, direction, flow, 0));
            }
            let lives = table.allows(&Policy::default(), Egress, &answers, silent);
            assert_eq!(lives, expect, "{packets} after {silent} s");
        }
    }
    // Who is never answered asks the rules every half minute.
    let mut table = Conntrack::new(1000);
    assert!(table.allows(&open, Ingress, &asks, 0));
    assert!(table.allows(&Policy::default(), Ingress, &asks, 30));
    assert!(!table.allows(&Policy::default(), Ingress, &asks, 31));
}

#[test]
fn protocols_without_ports_answer_for_ten_minutes() {
    let open = policy(&[], &[Rule { protocol: Protocol::Number(47), ..Rule::all(Peer::Cidr(nearby())) }]);
    let mut table = Conntrack::new(1000);
    let gre = Transport::Other(47);
    assert!(!table.allows(&open, Ingress, &inwards(gre), 0));
    assert!(table.allows(&open, Egress, &outwards(gre), 0));
    assert!(table.allows(&open, Ingress, &inwards(gre), 600));
    assert!(!table.allows(&open, Ingress, &inwards(Transport::Other(50)), 600));
    assert!(!table.allows(&open, Ingress, &inwards(gre), 1201));
}

/// Someone with many addresses, at each of which one thing is said.
fn flood(table: &mut Conntrack, policy: &Policy, packets: &[(Direction, Transport)]) {
    for n in 1..=20_000u32 {
        let peer = Ipv4Addr::from(0xcb00_0000 + n);
        for (direction, transport) in packets {
            let flow = match direction {
                Ingress => Flow { source: peer, destination: OWN, transport: *transport },
                Egress => Flow { source: OWN, destination: peer, transport: *transport },
            };
            assert!(table.allows(policy, *direction, &flow, 1));
        }
        assert!(table.len() <= 1600);
    }
    table.check();
}

#[test]
fn a_flood_ends_no_conversation_and_no_beginning_outwards() {
    let open = policy(
        &[Rule::tcp(22, "203.0.0.0/8".parse().unwrap()), Rule::udp(53..=53, "203.0.0.0/8".parse().unwrap())],
        &[Rule::tcp(443, nearby())],
    );
    let syn = (Ingress, tcp(9, 22, flags("S", 1, 0)));
    let answer = (Egress, tcp(22, 9, flags("SA", 7000, 2)));
    // They do not know the number that the instance has sent.
    let guess = (Ingress, tcp(9, 22, flags("A", 2, 7_000_000)));
    let asks = (Ingress, Transport::Udp { source: 9, destination: 53 });
    let tells = (Egress, Transport::Udp { source: 53, destination: 9 });
    let gre = policy(&[Rule::all(Peer::Cidr("203.0.0.0/8".parse().unwrap()))], &[]);
    let other = (Ingress, Transport::Other(47));
    let floods: [(&Policy, &[_]); 5] = [
        (&open, &[syn]),
        (&open, &[syn, answer]),
        (&open, &[syn, answer, guess]),
        (&open, &[asks, tells, asks, tells]),
        (&gre, &[other]),
    ];
    for (n, (flooded, packets)) in floods.into_iter().enumerate() {
        let mut table = Conntrack::new(1600);
        check(&mut table, &open, 0, HANDSHAKE);
        let begun = |port| outwards(tcp(port, 443, flags("S", 100, 0)));
        assert!((1..=90).all(|port| table.allows(&open, Egress, &begun(port), 0)));
        flood(&mut table, flooded, packets);
        for port in 1..=90 {
            let answer = inwards(tcp(443, port, flags("SA", 900, 101)));
            assert!(table.allows(&Policy::default(), Ingress, &answer, 2), "flood {n}, port {port}");
        }
        check(&mut table, &Policy::default(), 2, &["> A 101 901", "< A 901 101"]);
        // And there is room for more.
        let closed = Policy::default();
        for port in 1..=90 {
            let ack = outwards(tcp(port, 443, flags("A", 101, 901)));
            assert!(table.allows(&closed, Egress, &ack, 2));
        }
        flood(&mut table, flooded, packets);
        for port in 1..=90 {
            let data = inwards(tcp(443, port, flags("A", 901, 101)));
            assert!(table.allows(&closed, Ingress, &data, 40), "flood {n}, port {port}");
        }
    }
}

#[test]
fn where_all_is_taken_the_silent_go() {
    let open = policy(&[Rule::tcp(22, nearby())], &[]);
    let mut table = Conntrack::new(1600);
    let mut begin = |port, now| {
        for (direction, flow) in [
            (Ingress, inwards(tcp(port, 22, flags("S", 100, 0)))),
            (Egress, outwards(tcp(22, port, flags("SA", 900, 101)))),
            (Ingress, inwards(tcp(port, 22, flags("A", 101, 901)))),
        ] {
            assert!(table.allows(&open, direction, &flow, now));
        }
        table.allows(&Policy::default(), Egress, &outwards(tcp(22, 1, flags("A", 901, 101))), now)
    };
    // 1,300 go on; who comes after waits, and is heard of as those that wait are.
    assert!((1..=1400).all(|port| begin(port, 0)));
    // Nobody has been silent for long.
    assert!(begin(2000, 350));
    assert!((2001..=4000).all(|port| begin(port, 400)), "the one that speaks stays");
    let gone = outwards(tcp(22, 2, flags("A", 901, 101)));
    assert!(!table.allows(&Policy::default(), Egress, &gone, 400));
    table.check();
}

#[test]
fn what_a_flood_took_is_given_back() {
    let open = policy(&[Rule::tcp(22, "203.0.0.0/8".parse().unwrap())], &[]);
    let mut table = Conntrack::new(1600);
    flood(&mut table, &open, &[(Ingress, tcp(9, 22, flags("S", 1, 0)))]);
    assert_eq!(table.len(), 100);
    for _ in 0..60 {
        let nothing = outwards(tcp(1, 2, flags("A", 0, 0)));
        assert!(!table.allows(&Policy::default(), Egress, &nothing, 32));
    }
    assert_eq!(table.len(), 0);
}

//! Who may say what: groups and their members, and addresses that are one's own.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use common::packets::{ROUTER, Way, datagram};
use common::setup::{
    anywhere, boot, connect, interface, is_turned_away, network, opened, options, own_address,
};
use common::{Guest, PATIENCE, SILENCE, assert_reaches, reaches};
use instance_core::net::{Frame, MacAddress, NetPort};
use network_vpc::{Direction, ErrorKind, InterfaceSpec, Network, Peer, Rule};
use smoltcp::socket::tcp;

/// What has come to a port by now: what a machine sends is decided upon as it sends it.
fn came(port: &NetPort) -> usize {
    std::iter::from_fn(|| port.recv()).count()
}

/// Frames that another would be taken for the sender of go nowhere, and the same frame with the sender's own addresses
/// arrives.
#[test]
fn nobody_speaks_for_another() {
    let network = network();
    let all = Rule::all(Peer::Cidr(anywhere()));
    let [a, b, c] = ["a", "b", "c"].map(|name| interface(&network, name, std::slice::from_ref(&all)));
    let router = || {
        // Which passes on what is not from its own address.
        let spec = network.interface_spec().unwrap().groups(a.groups.clone()).source_dest_check(false);
        network.create_interface(spec).unwrap()
    };
    let router = router();
    let stranger = Ipv4Addr::new(198, 51, 100, 7);
    let [_of_a, of_b, _of_c, of_router] = [&a, &b, &c, &router].map(|i| network.plug(i.id).unwrap().port);
    for (sender, mac, address, to_mac, expect, what) in [
        (&a, a.mac, a.private_ip, b.mac, 1, "its own"),
        (&a, a.mac, a.private_ip, ROUTER, 1, "its own, by the router"),
        (&a, c.mac, a.private_ip, b.mac, 0, "another's hardware address"),
        (&a, MacAddress([2, 9, 9, 9, 9, 9]), a.private_ip, b.mac, 0, "nobody's hardware address"),
        (&a, ROUTER, a.private_ip, b.mac, 0, "the router's hardware address"),
        (&a, a.mac, c.private_ip, b.mac, 0, "another's address"),
        (&a, a.mac, stranger, b.mac, 0, "an address outside"),
        (&router, router.mac, stranger, b.mac, 1, "an address outside, where that is not checked"),
        (&router, a.mac, stranger, b.mac, 0, "another's hardware address, where addresses are not checked"),
    ] {
        let port = if sender.id == a.id { &_of_a } else { &of_router };
        let way = Way { macs: [mac, to_mac], addresses: [address, b.private_ip] };
        port.send(Frame::new(datagram(way, [4000, 9], b"hello"))).unwrap();
        assert_eq!(came(&of_b), expect, "{what}");
    }
}

/// Where it is switched off, an instance may pass on what others send.
#[test]
fn what_passes_on_for_others_is_let_to() {
    let network = network();
    let all = Rule::all(Peer::Cidr(anywhere()));
    let [a, b] = ["a", "b"].map(|name| interface(&network, name, std::slice::from_ref(&all)));
    let [of_a, of_b] = [&a, &b].map(|i| network.plug(i.id).unwrap().port);
    let way = Way { macs: [a.mac, ROUTER], addresses: [Ipv4Addr::new(198, 51, 100, 7), b.private_ip] };
    for (checked, expect) in [(true, 0), (false, 1), (true, 0)] {
        network.set_source_dest_check(a.id, checked).unwrap();
        of_a.send(Frame::new(datagram(way, [4000, 9], b"hello"))).unwrap();
        assert_eq!(came(&of_b), expect, "{checked}");
    }
}

/// Whoever passes on what others send has none of their memberships, and is not the network itself.
#[test]
fn who_passes_on_for_others_is_in_no_group_of_theirs_and_no_client_of_the_host() {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let member = interface(&network, "members", &[]);
    let of_members = Rule::all(Peer::Group(member.groups[0]));
    let friend = interface(&network, "friend", &[of_members]);
    let server = interface(&network, "server", &[Rule::udp(9..=9, "127.0.0.1/32".parse().unwrap())]);
    let open = interface(&network, "open", &[Rule::all(Peer::Cidr(anywhere()))]);
    let far = network.create_subnet(vpc, "172.31.64.0/24".parse().unwrap()).unwrap().id;
    let there = network.create_interface(InterfaceSpec::new(far).groups(open.groups.clone())).unwrap();
    let router = network.interface_spec().unwrap().groups(open.groups.clone()).source_dest_check(false);
    let router = network.create_interface(router).unwrap();
    let [of_member, to_friend, to_server, to_open, to_there, of_router] =
        [&member, &friend, &server, &open, &there, &router].map(|i| network.plug(i.id).unwrap().port);
    let send = |by: &NetPort, mac: MacAddress, from: Ipv4Addr, port: u16, to: Ipv4Addr| {
        let way = Way { macs: [mac, ROUTER], addresses: [from, to] };
        by.send(Frame::new(datagram(way, [port, 9], b"hello"))).unwrap();
    };
    send(&of_router, router.mac, member.private_ip, 4000, friend.private_ip);
    assert_eq!(came(&to_friend), 0, "who has a member's address is none");
    send(&of_member, member.mac, member.private_ip, 4000, friend.private_ip);
    assert_eq!(came(&to_friend), 1, "a member");
    send(&of_router, router.mac, member.private_ip, 4000, open.private_ip);
    assert_eq!(came(&to_open), 1, "what a rule names by its address");

    // A client of the host's is there, and stays the only one.
    let at = network.forward_udp(server.id, 9, "127.0.0.1:0".parse().unwrap()).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"hello", at).unwrap();
    let begun = Instant::now();
    while to_server.recv().is_none() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1)); // nothing tells a test that holds the port itself
    }
    let local_client = Ipv4Addr::new(169, 254, 0, 1);
    send(&of_router, router.mac, local_client, client.local_addr().unwrap().port(), server.private_ip);
    assert_eq!(came(&to_server), 0, "a client of the host's");

    for (from, expect) in [
        ([198, 51, 100, 7], 1),
        ([169, 254, 0, 1], 0),
        ([169, 254, 169, 254], 0),
        ([169, 254, 169, 253], 0),
        ([169, 254, 7, 7], 0),
        ([172, 31, 0, 1], 0),
        ([172, 31, 0, 2], 0),
        ([127, 0, 0, 1], 0),
        ([224, 0, 0, 1], 0),
    ] {
        send(&of_router, router.mac, from.into(), 4000, open.private_ip);
        assert_eq!(came(&to_open), expect, "{from:?}");
    }
    send(&of_router, router.mac, Ipv4Addr::new(172, 31, 64, 1), 4000, there.private_ip);
    assert_eq!(came(&to_there), 0, "another subnet's router");
}

#[test]
fn members_of_the_default_group_talk_to_each_other_and_nobody_else_to_them() {
    let network = network();
    let default = || network.create_interface(network.interface_spec().unwrap()).unwrap();
    let [mut one, mut other] = [default(), default()].map(|i| Guest::boot(network.plug(i.id).unwrap()));
    let (_, mut stranger) = boot(&network, "stranger", &[]);
    assert_reaches(&mut one, &mut other, 80);
    assert_reaches(&mut other, &mut one, 22);
    assert!(!reaches(&mut stranger, &mut one, 80, SILENCE));
    // A VPC that is made later has one of its own, whose members those of others are not.
    let vpc = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap().id;
    let subnet = network.create_subnet(vpc, "10.0.1.0/24".parse().unwrap()).unwrap().id;
    let there = || network.create_interface(InterfaceSpec::new(subnet)).unwrap();
    let [mut one, mut other] = [there(), there()].map(|i| Guest::boot(network.plug(i.id).unwrap()));
    assert_reaches(&mut one, &mut other, 80);
}

#[test]
fn an_interface_is_in_the_groups_that_it_was_last_put_into() {
    let network = network();
    let (_, mut client) = boot(&network, "client", &[]);
    let (server, mut serves) = boot(&network, "ssh", &[Rule::tcp(22, anywhere())]);
    let group =
        |name: &str| network.create_security_group(network.default_vpc().unwrap(), name, "").unwrap().id;
    let (web, friends) = (group("web"), group("friends"));
    network.authorize(web, Direction::Ingress, Rule::tcp(80, anywhere())).unwrap();
    network
        .authorize(web, Direction::Ingress, Rule::tcp(90, anywhere()).with_peer(Peer::Group(friends)))
        .unwrap();
    let mut check = |network: &Network, expect: [(u16, bool); 3], what: &str| {
        for (port, expect) in expect {
            let patience = if expect { PATIENCE } else { SILENCE };
            assert_eq!(reaches(&mut client, &mut serves, port, patience), expect, "{port} {what}");
        }
        assert!(network.interface(server.id).is_ok());
    };
    check(&network, [(22, true), (80, false), (90, false)], "in the first group");
    network.modify_groups(server.id, &[web]).unwrap();
    check(&network, [(22, false), (80, true), (90, false)], "in another");
    network.modify_groups(server.id, &[web, server.groups[0]]).unwrap();
    check(&network, [(22, true), (80, true), (90, false)], "in both");
    // Who is in a group is also whom its name in a rule stands for.
    let of_client = network.interfaces().into_iter().find(|i| i.id != server.id).unwrap();
    network.modify_groups(of_client.id, &[of_client.groups[0], friends]).unwrap();
    check(&network, [(22, true), (80, true), (90, true)], "with a friend");
    network.modify_groups(of_client.id, &of_client.groups).unwrap();
    check(&network, [(22, true), (80, true), (90, false)], "with none");
    network.modify_groups(server.id, &[]).unwrap();
    check(&network, [(22, false), (80, false), (90, false)], "in the default group");
    let default = network.interface(server.id).unwrap().groups;
    assert_eq!(network.security_group(default[0]).unwrap().name, "default");
    let nowhere = "sg-0123456789abcdef0".parse().unwrap();
    assert_eq!(
        network.modify_groups(server.id, &[web, nowhere]).unwrap_err().kind(),
        ErrorKind::GroupNotFound
    );
    assert_eq!(network.interface(server.id).unwrap().groups, default, "and it stays where it was");
}

#[test]
fn a_forwarded_port_is_open_to_the_addresses_that_its_rule_names() {
    let network = network();
    let (server, mut guest) = boot(&network, "ssh", &[Rule::tcp(22, "127.0.0.1/32".parse().unwrap())]);
    let at = network.forward(server.id, 22, "127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = guest.listen(22);
    let (friend, stranger) = (Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2));
    assert!(is_turned_away(connect((stranger, 0).into(), at)));
    guest.work();
    assert_eq!(guest.tcp(listener).state(), tcp::State::Listen, "and the guest hears nothing of it");
    let client = connect((friend, 0).into(), at);
    let is_there = |guest: &mut Guest| (guest.tcp(listener).state() == tcp::State::Established).then_some(());
    guest.until(is_there).unwrap();
    // Who is there stays there when the rule goes to another.
    let rule = *network.security_group(server.groups[0]).unwrap().ingress.keys().next().unwrap();
    network.revoke(server.groups[0], rule).unwrap();
    let other = Rule::tcp(22, "127.0.0.2/32".parse().unwrap());
    network.authorize(server.groups[0], Direction::Ingress, other).unwrap();
    assert!(is_turned_away(connect((friend, 0).into(), at)));
    guest.say(listener, b"x");
    assert!(!is_turned_away(client));
}

/// What an instance may begin is decided by its groups at once, also where it runs, and what it has begun goes on.
#[test]
fn what_an_instance_may_begin_its_groups_say() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let (server, mut guest) = boot(&network, "client", &[]);
    let group = server.groups[0];
    let hosts = [(); 2].map(|()| TcpListener::bind((own, 0)).unwrap());
    let [one, other] = [0, 1].map(|n| hosts[n].local_addr().unwrap().port());
    let begun = guest.connect(PATIENCE, own, one).expect("everything, unless told otherwise");

    let every = *network.security_group(group).unwrap().egress.keys().next().unwrap();
    network.revoke(group, every).unwrap();
    assert!(guest.connect(SILENCE, own, one).is_none(), "nothing any more");
    let to_other = Rule::tcp(other, format!("{own}/32").parse().unwrap());
    network.authorize(group, Direction::Egress, to_other).unwrap();
    guest.connect(PATIENCE, own, other).expect("what a rule names");
    assert!(guest.connect(SILENCE, own, one).is_none(), "and nothing else");
    let mut first = hosts[0].accept().unwrap().0;
    first.write_all(b"x").unwrap();
    assert_eq!(guest.hear(begun, 1), b"x", "what had begun before goes on");
}

//! Metadata as it goes over the network.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::Ipv4Addr;
use std::time::Duration;

use common::setup::{boot, network};
use common::{Guest, PATIENCE};
use instance_core::HttpTokens;
use network_vpc::Metadata;
use smoltcp::iface::SocketHandle;

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PUT: &str = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
const GET: &str = "GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n";
/// Longer than it takes until what was not acknowledged is sent again, and that twice.
const SENT_AGAIN: Duration = Duration::from_secs(4);

/// What comes until it is so many answers, or for a time if it is to be none.
fn answers(guest: &mut Guest, connection: SocketHandle, count: usize) -> String {
    let mut heard = String::new();
    let time = if count == 0 { SENT_AGAIN } else { PATIENCE };
    guest.within(time, |guest| {
        let socket = guest.tcp(connection);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), heard += std::str::from_utf8(bytes).unwrap())).unwrap();
        }
        (count > 0 && heard.matches("200 OK").count() == count).then_some(())
    });
    heard
}

/// Neither what follows it in the stream nor that it is sent again takes a token further than it may go.
#[test]
fn a_token_goes_no_further_than_it_may() {
    let network = network();
    let (interface, mut guest) = boot(&network, "a", &[]);
    let limit = |hops| {
        let mut metadata = Metadata::new("i-0000000000000000a".parse().unwrap());
        metadata.options.http_put_response_hop_limit = hops;
        metadata.options.http_tokens = HttpTokens::Optional;
        network.set_metadata(interface.id, Some(metadata)).unwrap();
    };
    let both = PUT.to_owned() + GET;
    for (limited_to, hops, asked, expect) in [
        (2, 2, &[&*both][..], 2),
        (2, 2, &[PUT, GET], 2),
        (1, 2, &[GET], 1),
        (1, 2, &[&both], 0),
        (1, 2, &[PUT, GET], 0),
        (1, 2, &[&(GET.to_owned() + PUT)], 0),
        // Which no region allows; it is as little as can be.
        (0, 1, &[PUT], 1),
        (0, 2, &[PUT], 0),
    ] {
        let count = asked.len();
        limit(limited_to);
        guest.hops = hops;
        let connection = guest.connect(PATIENCE, METADATA, 80).unwrap();
        let mut heard = String::new();
        for asked in asked {
            guest.say(connection, asked.as_bytes());
            heard += &answers(&mut guest, connection, expect / count);
        }
        let tokens = heard.matches("Ttl-Seconds: 60").count();
        assert_eq!(heard.matches("200 OK").count(), expect, "{asked:?} at {hops} of {limited_to}");
        assert_eq!(tokens > 0, expect > 0 && asked[0].contains("PUT"), "{heard}");
        guest.tcp(connection).abort();
        guest.work();
        guest.sockets.remove(connection);
    }
}

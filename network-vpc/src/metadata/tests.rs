//! Requests, and what is answered.

use std::sync::Arc;

use instance_core::HttpTokens;

use ami_core::ProductCodeKind;

use super::*;
use crate::firewall::Policy;
use crate::switch::View;

fn view() -> View {
    View { policy: Policy::default(), ..crate::fuzzing::view().unwrap() }
}

fn metadata() -> Metadata {
    let mut metadata = Metadata::new("i-0123456789abcdef0".parse().unwrap());
    metadata.image_id = Some("ami-0123456789abcdef0".parse().unwrap());
    let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    metadata.product_codes.insert(code);
    metadata.instance_type = "t3.micro".to_owned();
    metadata.owner = Some("123456789012".parse().unwrap());
    metadata.public_keys.push(("mine".to_owned(), "ssh-ed25519 AAAA mine".to_owned()));
    metadata.user_data = Some(b"#!/bin/sh\n".to_vec());
    metadata.root_device = Some("/dev/xvda".to_owned());
    for (name, device) in [("ephemeral0", "/dev/sdb"), ("ephemeral1", "xvdc")] {
        metadata.instance_store.push((name.to_owned(), device.to_owned()));
    }
    metadata.volumes = vec!["/dev/sdf".to_owned(), "xvdg".to_owned()];
    metadata.options.http_tokens = HttpTokens::Optional;
    metadata
}

fn told(metadata: Metadata) -> Told {
    let secret = Secret::random().unwrap();
    Told { view: Arc::new(view()), metadata: Some(Arc::new(metadata)), secret, now: 1_000_000 }
}

/// Status, head and body of the answer to a request.
fn ask(told: &Told, request: &str) -> (u16, String, String) {
    let mut session = Session::default();
    // In pieces, as a network brings it.
    for piece in request.as_bytes().chunks(7) {
        session.hear(piece, || told.clone());
    }
    let answer = String::from_utf8(session.answer().to_vec()).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
}

fn get(told: &Told, path: &str) -> Option<String> {
    let (status, _, body) = ask(told, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
    (status == 200).then_some(body)
}

/// As cloud-init writes a name in a path.
fn quoted(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~/:".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).into() } else { format!("%{byte:02X}") })
        .collect()
}

/// Reads a directory and all that is below it as cloud-init does, which goes without all of it if one leaf is refused.
/// Gives the paths of the leaves.
fn crawl(told: &Told, dir: &str) -> Vec<String> {
    let text = get(told, dir).unwrap_or_else(|| panic!("{dir} is listed"));
    let mut leaves = Vec::new();
    for name in text.lines().map(str::trim).filter(|name| !name.trim_end_matches('/').is_empty()) {
        if name.ends_with('/') {
            leaves.extend(crawl(told, &format!("{dir}{}", quoted(name))));
            continue;
        }
        // Keys are listed by number and name.
        let number = name.split_once('=').and_then(|(number, _)| number.replace('_', "").parse::<i64>().ok());
        let leaf = number.map_or(name.to_owned(), |number| format!("{number}/openssh-key"));
        let path = format!("{dir}{}", quoted(&leaf));
        assert!(get(told, &path).is_some(), "{path} is listed");
        leaves.push(path);
    }
    leaves
}

#[test]
fn whatever_is_listed_is_there() {
    let mut with_tags = metadata();
    with_tags.options.instance_metadata_tags = true;
    let odd = ["a b", "é", "a/b", "7=x", "-1_0=x", ".", "_index", "two\nlines"];
    let plain = ["Name", "team@x", "a+b,c=d", "x:y", "7a=x", "7"];
    for key in odd.iter().chain(&plain) {
        let _ = with_tags.tags.insert(*key, "value");
    }
    for name in ["by another", "a=b", "a/", "/", "50%"] {
        with_tags.public_keys.push((name.to_owned(), "ssh-ed25519 AAAA".to_owned()));
    }
    let mut least = Metadata::new("i-0123456789abcdef0".parse().unwrap());
    least.options.http_tokens = HttpTokens::Optional;
    for (metadata, least) in [(metadata(), 30), (with_tags, 40), (least, 25)] {
        let told = told(metadata);
        let leaves = ["/2021-03-23/meta-data/", "/latest/dynamic/"].map(|root| crawl(&told, root)).concat();
        assert!(leaves.len() >= least, "{leaves:?}");
        let tags = leaves.iter().filter(|leaf| leaf.contains("/tags/instance/")).count();
        assert_eq!(tags, if told.metadata.unwrap().options.instance_metadata_tags { 6 } else { 0 });
    }
}

#[test]
fn says_what_clients_look_for() {
    let told = told(metadata());
    for (path, expect) in [
        ("/latest/meta-data/instance-id", "i-0123456789abcdef0"),
        ("/2009-04-04/meta-data/ami-id", "ami-0123456789abcdef0"),
        ("/latest/meta-data/product-codes", "8vk2x"),
        ("/latest/meta-data/public-keys/", "0=mine"),
        ("/latest/meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA mine"),
        ("/latest/meta-data/network/interfaces/macs", "06:00:00:00:00:09/"),
        ("/latest/meta-data/network/interfaces/macs/06:00:00:00:00:09/vpc-id", "vpc-0123456789abcdef0"),
        ("/latest/meta-data/network/interfaces/macs/06:00:00:00:00:09/network-card", "0"),
        ("/latest/meta-data/ami-manifest-path", "(unknown)"),
        ("/latest/meta-data/placement/availability-zone", "us-east-1a"),
        ("/latest/meta-data/hostname", "ip-10-0-0-12.ec2.internal"),
        ("/latest/meta-data/block-device-mapping/", "ami\nebs1\nebs2\nephemeral0\nephemeral1\nroot"),
        ("/latest/meta-data/block-device-mapping/ebs1", "sdf"),
        ("/latest/meta-data/block-device-mapping/ebs2", "xvdg"),
        ("/latest/meta-data/block-device-mapping/ephemeral0", "sdb"),
        ("/latest/meta-data/block-device-mapping/ephemeral1", "xvdc"),
        ("/latest/meta-data/block-device-mapping/root", "/dev/xvda"),
        ("/latest/user-data", "#!/bin/sh\n"),
        ("/latest", "dynamic\nmeta-data\nuser-data"),
        ("/latest/dynamic/instance-identity/", "document"),
    ] {
        assert_eq!(get(&told, path).as_deref(), Some(expect), "{path}");
    }
    let document = get(&told, "/latest/dynamic/instance-identity/document").unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!((&document["region"], &document["accountId"]), (&"us-east-1".into(), &"123456789012".into()));
    assert_eq!(document["marketplaceProductCodes"], serde_json::json!(["8vk2x"]));
    assert!(document["devpayProductCodes"].is_null());
    for path in
        ["/latest/meta-data/tags/", "/1999-01-01/meta-data/", "/latest/meta-data/none", "/latest/x", "/x"]
    {
        assert_eq!(get(&told, path), None, "{path}");
    }
}

#[test]
fn tokens_are_asked_for_and_known() {
    let mut required = metadata();
    required.options.http_tokens = HttpTokens::Required;
    required.options.http_put_response_hop_limit = 3;
    let told = told(required);
    assert_eq!(get(&told, "/latest/meta-data/instance-id"), None);
    let put = |headers: &str| ask(&told, &format!("PUT /latest/api/token HTTP/1.1\r\n{headers}\r\n"));
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds";
    for (headers, expect) in [
        (format!("{ttl}: 21600\r\n"), 200),
        (format!("{ttl}: 1\r\n"), 200),
        (format!("{ttl}: 0\r\n"), 400),
        (format!("{ttl}: 21601\r\n"), 400),
        (format!("{ttl}: soon\r\n"), 400),
        (String::new(), 400),
        (format!("{ttl}: 60\r\nX-Forwarded-For: 10.0.0.1\r\n"), 403),
    ] {
        assert_eq!(put(&headers).0, expect, "{headers}");
    }
    let (_, head, token) = put(&format!("{ttl}: 60\r\n"));
    assert!(head.contains("Token-Ttl-Seconds: 60"));
    let with = |token: &str| {
        ask(
            &told,
            &format!("GET /latest/meta-data/mac HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n"),
        )
    };
    assert_eq!(with(&token).0, 200);
    let mut forged = token.clone().into_bytes();
    forged[3] ^= 1;
    for token in [&*String::from_utf8(forged).unwrap(), "", "AAAA", &token[1..]] {
        assert_eq!(with(token).0, 401, "{token}");
    }
    for (seconds, expect) in [(59, 200), (60, 401), (61, 401), (1 << 40, 401)] {
        let later = Told { now: told.now + seconds, ..told.clone() };
        let header = format!("X-aws-ec2-metadata-token: {token}");
        let answer = ask(&later, &format!("GET /latest/meta-data/mac HTTP/1.1\r\n{header}\r\n\r\n"));
        assert_eq!(answer.0, expect, "after {seconds} seconds");
        let is_told = answer.1.ends_with(&format!("Token-Ttl-Seconds: {}", 60 - seconds.min(60)));
        assert_eq!(is_told, expect == 200, "{}", answer.1);
    }
    let mut session = Session::default();
    session.hear(b"PUT /latest/api/token HTTP/1.1\r\n\r\n", || told.clone());
    assert_eq!(session.hops(), Some(3));
    session.hear(b"GET / HTTP/1.1\r\n\r\n", || told.clone());
    assert_eq!(session.hops(), Some(3), "what was not acknowledged is sent again");
}

#[test]
fn what_is_no_request_is_refused() {
    let told = told(metadata());
    for (request, expect) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), 400),
        (format!("GET /{} HTTP/1.1\r\n", "x".repeat(20_000)), 431),
        ("DELETE / HTTP/1.1\r\n\r\n".to_owned(), 405),
        ("PUT /latest/meta-data/mac HTTP/1.1\r\n\r\n".to_owned(), 404),
    ] {
        assert_eq!(ask(&told, &request).0, expect, "{}", &request[..20.min(request.len())]);
    }
    let mut off = metadata();
    off.options.http_endpoint = false;
    assert_eq!(ask(&self::told(off), "GET / HTTP/1.1\r\n\r\n").0, 403);
}

#[test]
fn several_requests_come_over_one_connection() {
    let told = told(metadata());
    let mut session = Session::default();
    let one = "GET /latest/meta-data/mac HTTP/1.1\r\n\r\n";
    session.hear((one.to_owned() + one).as_bytes(), || told.clone());
    let answer = String::from_utf8(session.answer().to_vec()).unwrap();
    assert_eq!(answer.matches("06:00:00:00:00:09").count(), 2);
    assert!(!session.is_over());
    session.hear(b"GET / HTTP/1.0\r\n\r\n", || told.clone());
    assert!(session.is_over());
}

/// Who asks and asks and takes no answer fills neither the one nor the other, and is answered when they do.
#[test]
fn who_takes_no_answers_is_not_listened_to() {
    const QUESTION: &[u8] = b"GET /latest/user-data HTTP/1.1\r\n\r\n";
    let mut metadata = metadata();
    metadata.user_data = Some(vec![b'x'; 16 << 10]);
    let told = told(metadata);
    let questions = QUESTION.repeat(10_000);
    let (mut session, mut rest, mut said) = (Session::default(), &questions[..], Vec::new());
    let mut heard = session.hear(rest, || told.clone());
    assert!(heard < 40 << 10 && session.answer().len() < 40 << 10, "{heard}, {}", session.answer().len());
    while !session.answer().is_empty() {
        rest = &rest[heard..];
        let (status, len) = (session.answer().starts_with(b"HTTP/1.1 200 OK"), session.answer().len());
        assert!(status);
        said.push(len);
        session.said(len);
        heard = session.hear(rest, || told.clone());
    }
    assert!(rest.is_empty());
    let one = said[0];
    assert_eq!(said.iter().sum::<usize>(), 10_000 * one);
}

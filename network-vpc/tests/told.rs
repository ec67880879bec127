//! What the guests of a region's instances are told of themselves.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::Ipv4Addr;
use std::time::Duration;

use common::Guest;
use common::region::{Idle, image, open, spec};
use instance_core::{BlockDeviceMappingRequest, HttpTokens, LaunchSpec, MetadataOptions};

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

fn options() -> MetadataOptions {
    let mut options = MetadataOptions::default();
    options.http_tokens = HttpTokens::Optional;
    options.instance_metadata_tags = true;
    options
}

/// What is at a path; its status, if that is nothing.
fn read(guest: &mut Guest, path: &str) -> Result<String, u16> {
    match guest.http(METADATA, &format!("GET /latest/{path} HTTP/1.1\r\n")) {
        (200, text) => Ok(text),
        (status, _) => Err(status),
    }
}

#[test]
fn a_guest_is_told_what_its_instance_was_launched_with_and_what_became_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Idle::new();
    let (region, network) = open(dir.path(), machines.clone());
    let ami = image(&region);
    let key = network.create_key_pair("mine").unwrap().key_pair.public_key;
    let group = network.create_security_group(network.default_vpc().unwrap(), "web", "").unwrap().id;
    let more = ["/dev/sdf", "/dev/sdg"].map(|name| BlockDeviceMappingRequest::new(name).size_gib(1));
    let launch = spec().key_name("mine").security_group(group).user_data("#!/bin/sh\n").tag("Name", "one");
    let launch = more.into_iter().fold(launch.metadata_options(options()), LaunchSpec::block_device);
    let server = region.launch(&ami, launch).unwrap();
    let now = server.describe();
    let place = now.network.unwrap();
    let (mut guest, _) = machines.guest();
    for (path, expect) in [
        ("meta-data/instance-id", server.id().to_string()),
        ("meta-data/ami-id", ami.id().to_string()),
        ("meta-data/instance-type", "t2.nano".to_owned()),
        ("meta-data/reservation-id", now.reservation_id.to_string()),
        ("meta-data/ami-launch-index", "0".to_owned()),
        ("meta-data/local-ipv4", place.private_ip.to_string()),
        ("meta-data/hostname", place.private_dns_name),
        ("meta-data/security-groups", "web".to_owned()),
        ("meta-data/placement/region", "eu-west-1".to_owned()),
        ("meta-data/block-device-mapping/root", "/dev/xvda".to_owned()),
        ("meta-data/block-device-mapping/", "ami\nebs1\nebs2\nroot".to_owned()),
        ("meta-data/block-device-mapping/ebs2", "sdg".to_owned()),
        ("meta-data/public-keys/", "0=mine".to_owned()),
        ("meta-data/public-keys/0/openssh-key", key),
        ("meta-data/tags/instance/Name", "one".to_owned()),
        ("user-data", "#!/bin/sh\n".to_owned()),
    ] {
        assert_eq!(read(&mut guest, path), Ok(expect), "{path}");
    }
    let document = read(&mut guest, "dynamic/instance-identity/document").unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    for (field, expect) in [
        ("imageId", ami.id().to_string()),
        ("instanceId", server.id().to_string()),
        ("instanceType", "t2.nano".to_owned()),
        ("accountId", now.owner.to_string()),
        ("architecture", "x86_64".to_owned()),
        ("pendingTime", now.launch_time.to_string()),
    ] {
        assert_eq!(document[field], expect, "{field}");
    }

    // While it runs.
    region.create_tags(&[server.id().into()], &[("Name", "two"), ("team@x", "a")]).unwrap();
    assert_eq!(read(&mut guest, "meta-data/tags/instance/Name"), Ok("two".to_owned()));
    assert_eq!(read(&mut guest, "meta-data/tags/instance/team%40x"), Ok("a".to_owned()));
    let mut off = options();
    off.http_endpoint = false;
    server.set_metadata_options(off).unwrap();
    assert_eq!(read(&mut guest, "meta-data/instance-id"), Err(403));
    server.set_metadata_options(options()).unwrap();

    // From its next start on.
    drop(guest);
    server.stop(Duration::ZERO).unwrap();
    server.set_user_data(Some(b"#cloud-config\n".to_vec())).unwrap();
    server.set_instance_type("t2.micro".parse().unwrap()).unwrap();
    server.start().unwrap();
    let (mut guest, _) = machines.guest();
    assert_eq!(read(&mut guest, "user-data"), Ok("#cloud-config\n".to_owned()));
    assert_eq!(read(&mut guest, "meta-data/instance-type"), Ok("t2.micro".to_owned()));
}

#[test]
fn an_instance_keeps_the_key_that_it_was_launched_with() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Idle::new();
    let (region, network) = open(dir.path(), machines.clone());
    let ami = image(&region);
    let first = network.create_key_pair("me").unwrap().key_pair.public_key;
    let launch = || spec().key_name("me").metadata_options(options());
    let server = region.launch(&ami, launch()).unwrap();
    let (mut guest, _) = machines.guest();
    let own = |guest: &mut Guest| read(guest, "meta-data/public-keys/0/openssh-key");
    network.delete_key_pair("me").unwrap();
    assert_eq!(own(&mut guest), Ok(first.clone()));
    region.create_tags(&[server.id().into()], &[("Name", "one")]).unwrap();
    assert_eq!(own(&mut guest), Ok(first.clone()), "after a change");
    let second = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me";
    assert_eq!(network.import_key_pair("me", second).unwrap().public_key, second);
    region.create_tags(&[server.id().into()], &[("Name", "two")]).unwrap();
    assert_eq!(own(&mut guest), Ok(first.clone()), "while there is another of that name");
    drop(guest);
    server.stop(Duration::ZERO).unwrap();
    server.start().unwrap();
    let (mut guest, _) = machines.guest();
    assert_eq!(own(&mut guest), Ok(first.clone()), "after a stop");
    drop((guest, server, region, network));

    let (region, network) = open(dir.path(), machines.clone());
    let server = region.instances().pop().unwrap();
    server.start().unwrap();
    let (mut guest, _) = machines.guest();
    assert_eq!(own(&mut guest), Ok(first), "in a region that was opened again");
    let _other = region.launch(&ami, launch()).unwrap();
    let (mut guest, _) = machines.guest();
    assert_eq!(own(&mut guest), Ok(second.to_owned()), "of another launch");
    network.delete_key_pair("me").unwrap();
}

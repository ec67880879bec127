//! How instances, volumes and snapshots are described: filters and pages.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use ami_core::{InstanceId, VolumeType};
use common::{check, refused, world};
use instance_core::{
    DescribeInstances, DescribeSnapshots, DescribeTags, DescribeVolumes, ErrorKind, InstanceState,
    LaunchSpec, VolumeSpec,
};

const FRIEND: &str = "222222222222";

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// Asks for page after page, and for the whole.
fn pages<T: PartialEq + std::fmt::Debug>(
    size: usize,
    mut ask: impl FnMut(Option<usize>, Option<String>) -> ami_core::Page<T>,
) -> usize {
    let whole = ask(None, None);
    assert_eq!(whole.next_token, None);
    let (mut found, mut token) = (Vec::new(), None);
    loop {
        let page = ask(Some(size), token);
        assert!(page.items.len() <= size);
        found.extend(page.items);
        token = page.next_token;
        if token.is_none() {
            break;
        }
    }
    assert_eq!(found, whole.items, "pages of {size}");
    found.len()
}

#[test]
fn instances_are_found_by_every_filter_and_in_pages() {
    let (_dir, region, ami) = world();
    let token = |spec: LaunchSpec, token: &str| region.run_instances(&ami, spec.client_token(token)).unwrap();
    let three = token(spec().count(3, 3).tag("stage", "test").key_name("laptop"), "three");
    token(spec().count(2, 2).tag("stage", "production").tag("Name", "web"), "two");
    let large = token(LaunchSpec::new("t2.small".parse().unwrap()).user_data("x"), "one").instances;
    three.instances[0].stop(Duration::ZERO).unwrap();
    three.instances[1].terminate().unwrap();
    region.as_account(FRIEND.parse().unwrap()).create_volume(VolumeSpec::new(1)).unwrap();
    let (image, id) = (ami.id().to_string(), large[0].id().to_string());
    let volume = large[0].describe().attachments[0].volume_id.to_string();
    let (reservation, owner) = (three.id.to_string(), region.account().to_string());
    type Filters<'a> = &'a [(&'a str, &'a [&'a str])];
    let table: &[(Filters<'_>, usize)] = &[
        (&[], 6),
        (&[("architecture", &["x86_64"])], 6),
        (&[("block-device-mapping.delete-on-termination", &["false"])], 5),
        (&[("block-device-mapping.device-name", &["/dev/sdf"])], 5),
        (&[("block-device-mapping.volume-id", &[&volume])], 1),
        (&[("client-token", &["two"])], 2),
        (&[("client-token", &["t*"])], 5),
        (&[("image-id", &[&image])], 6),
        (&[("instance-id", &[&id])], 1),
        (&[("instance-state-code", &["16"])], 4),
        (&[("instance-state-name", &["running"])], 4),
        (&[("instance-state-name", &["stopped", "terminated"])], 2),
        (&[("instance-state-name", &["stopped", "stopped"])], 1),
        (&[("instance-state-name", &["pending"])], 0),
        (&[("instance-type", &["t2.small"])], 1),
        (&[("instance-type", &["t2.*"])], 6),
        (&[("key-name", &["laptop"])], 3),
        (&[("launch-index", &["0"])], 3),
        (&[("launch-time", &["20*"])], 6),
        (&[("metadata-options.http-endpoint", &["enabled"])], 6),
        (&[("metadata-options.http-tokens", &["optional"])], 0),
        (&[("owner-id", &[&owner])], 6),
        (&[("owner-id", &[FRIEND])], 0),
        (&[("reservation-id", &[&reservation])], 3),
        (&[("root-device-name", &["/dev/xvda"])], 6),
        (&[("root-device-type", &["ebs"])], 6),
        (&[("state-reason-code", &["Client.*"])], 2),
        (&[("state-reason-message", &["*user*"])], 2),
        (&[("tag:stage", &["test", "production"])], 5),
        (&[("tag:stage", &["test"]), ("instance-state-name", &["running"])], 1),
        (&[("tag-key", &["Name"])], 2),
        (&[("tag-key", &["N*"])], 2),
        (&[("tag:absent", &["*"])], 0),
        (&[("virtualization-type", &["hvm"])], 6),
    ];
    for (filters, expected) in table {
        let request = filters.iter().fold(DescribeInstances::new(), |request, (name, values)| {
            request.filter(*name, values.iter().copied())
        });
        let found = pages(5, |max, token| {
            let request = max.into_iter().fold(request.clone(), DescribeInstances::max_results);
            let request = token.into_iter().fold(request, DescribeInstances::next_token);
            region.describe_instances(&request).unwrap()
        });
        assert_eq!(found, *expected, "{filters:?}");
    }
    // What changes is found as it is then.
    region.create_tags(&[large[0].id().into()], &[("stage", "test")]).unwrap();
    large[0].stop(Duration::ZERO).unwrap();
    let found =
        DescribeInstances::new().filter("tag:stage", ["test"]).filter("instance-state-name", ["stopped"]);
    let found = region.describe_instances(&found).unwrap().items;
    assert!(found.iter().any(|d| d.id == large[0].id() && d.state == InstanceState::Stopped), "{found:?}");
}

#[test]
fn volumes_and_snapshots_are_found_by_every_filter_and_in_pages() {
    let (_dir, region, ami) = world();
    let instance = region.launch(&ami, spec()).unwrap();
    let data = |n: u32| region.create_volume(VolumeSpec::new(n).tag("size", n.to_string())).unwrap();
    let (one, two) = (data(1), data(2));
    let snapshots: Vec<_> =
        (0..6).map(|n| region.create_snapshot(one.id, &format!("number {n}")).unwrap()).collect();
    region.create_snapshot(two.id, "other").unwrap();
    region.create_tags(&[snapshots[0].id.into()], &[("keep", "yes")]).unwrap();
    let copy = VolumeSpec::of_snapshot(snapshots[0].id).volume_type(VolumeType::Gp2);
    region.create_volume(copy).unwrap();
    let (id, holder) = (one.id.to_string(), instance.id().to_string());
    let (snapshot, owner) = (snapshots[0].id.to_string(), region.account().to_string());
    let volumes: &[(&str, &str, usize)] = &[
        ("attachment.delete-on-termination", "true", 1),
        ("attachment.device", "/dev/*", 2),
        ("attachment.instance-id", &holder, 2),
        ("attachment.status", "attached", 2),
        ("create-time", "20*", 5),
        ("encrypted", "false", 5),
        ("size", "1", 4),
        ("snapshot-id", &snapshot, 1),
        ("status", "available", 3),
        ("status", "in-use", 2),
        ("tag:size", "?", 2),
        ("tag-key", "size", 2),
        ("volume-id", &id, 1),
        ("volume-type", "gp3", 4),
    ];
    for (name, value, expected) in volumes {
        let found = pages(5, |max, token| {
            let request = DescribeVolumes::new().filter(*name, [*value]);
            let request = max.into_iter().fold(request, DescribeVolumes::max_results);
            region.describe_volumes(&token.into_iter().fold(request, DescribeVolumes::next_token)).unwrap()
        });
        assert_eq!(found, *expected, "{name}={value}");
    }
    let of_snapshots: &[(&str, &str, usize)] = &[
        ("description", "number ?", 6),
        ("encrypted", "false", 7),
        ("owner-id", &owner, 7),
        ("progress", "100%", 7),
        ("snapshot-id", &snapshot, 1),
        ("start-time", "20*", 7),
        ("status", "completed", 7),
        ("tag:keep", "yes", 1),
        ("tag-key", "keep", 1),
        ("volume-id", &id, 6),
        ("volume-size", "2", 1),
    ];
    for (name, value, expected) in of_snapshots {
        let found = pages(5, |max, token| {
            let request = DescribeSnapshots::new().filter(*name, [*value]);
            let request = max.into_iter().fold(request, DescribeSnapshots::max_results);
            region
                .describe_snapshots(&token.into_iter().fold(request, DescribeSnapshots::next_token))
                .unwrap()
        });
        assert_eq!(found, *expected, "{name}={value}");
    }
    let tags = |n: u32| (0..n).map(|i| (format!("k{i}"), i.to_string())).collect::<Vec<_>>();
    let tags = tags(20);
    let tags: Vec<(&str, &str)> = tags.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    region.create_tags(&[two.id.into()], &tags).unwrap();
    let found = pages(7, |max, token| {
        let request = max.into_iter().fold(DescribeTags::new(), DescribeTags::max_results);
        region.describe_tags(&token.into_iter().fold(request, DescribeTags::next_token)).unwrap()
    });
    assert_eq!(found, 23);
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let (_dir, region, ami) = world();
    let id = region.launch(&ami, spec()).unwrap().id();
    let all = DescribeInstances::new;
    let absent: InstanceId = "i-00000000000000000".parse().unwrap();
    let too_many = vec!["x"; 201];
    let (parameter, invalid) = (ErrorKind::InvalidParameter, "InvalidParameterValue");
    let table = [
        (all().id(absent), ErrorKind::InstanceNotFound, "InvalidInstanceID.NotFound"),
        (all().id(id).max_results(5), ErrorKind::InvalidParameterCombination, "InvalidParameterCombination"),
        (all().max_results(4), parameter, invalid),
        (all().max_results(1001), parameter, invalid),
        (all().filter("colour", ["red"]), parameter, invalid),
        (all().filter("tag:", ["red"]), parameter, invalid),
        (all().filter("image-id", too_many), ErrorKind::FilterLimitExceeded, "FilterLimitExceeded"),
        (all().filter("image-id", Vec::<String>::new()), parameter, invalid),
        (all().next_token("no token"), ErrorKind::InvalidNextToken, "InvalidNextToken"),
        (all().next_token("6162"), ErrorKind::InvalidNextToken, "InvalidNextToken"),
    ];
    for (request, kind, code) in table {
        let refused = region.describe_instances(&request).unwrap_err();
        check(&refused, kind, code, &[]);
    }
    let filter = region.describe_volumes(&DescribeVolumes::new().filter("image-id", ["x"]));
    refused(filter, parameter, invalid);
    refused(region.describe_snapshots(&DescribeSnapshots::new().filter("size", ["x"])), parameter, invalid);
    refused(region.describe_tags(&DescribeTags::new().filter("tag-key", ["x"])), parameter, invalid);
    let ids = BTreeSet::from([id]);
    let found = region.describe_instances(&ids.iter().fold(all(), |request, id| request.id(*id))).unwrap();
    assert_eq!(found.items.len(), 1);
}

//! What is at which path. Only what is there is listed: a client that is refused something that was listed takes
//! nothing at all, as cloud-init does.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ami_core::ProductCodeKind;
use instance_core::MetadataOptions;
use serde_json::json;

use super::Metadata;
use crate::switch::View;

/// The versions by which clients ask. All say the same.
const VERSIONS: [&str; 12] = [
    "1.0",
    "2007-01-19",
    "2008-02-01",
    "2009-04-04",
    "2011-01-01",
    "2014-02-25",
    "2016-09-02",
    "2018-09-24",
    "2021-03-23",
    "2021-07-15",
    "2022-09-24",
    "latest",
];

/// What is at a path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Text(String),
    Bytes(Vec<u8>),
}

pub(crate) fn find(path: &str, metadata: &Metadata, view: &View) -> Option<Found> {
    let path = path.trim_start_matches('/');
    if path.is_empty() {
        return Some(Found::Text(VERSIONS.join("\n")));
    }
    let (version, rest) = path.split_once('/').unwrap_or((path, ""));
    if !VERSIONS.contains(&version) {
        return None;
    }
    let (category, rest) = rest.split_once('/').unwrap_or((rest, ""));
    match (category, rest) {
        ("", _) => {
            let user_data = metadata.user_data.as_ref().map(|_| "user-data");
            let all: Vec<_> = ["dynamic", "meta-data"].into_iter().chain(user_data).collect();
            Some(Found::Text(all.join("\n")))
        }
        ("user-data", "") => metadata.user_data.clone().map(Found::Bytes),
        ("meta-data", "public-keys" | "public-keys/") => keys(metadata).map(Found::Text),
        ("meta-data", path) => list(&meta_data(metadata, view), path).map(Found::Text),
        ("dynamic", path) => list(&dynamic(metadata, view), path).map(Found::Text),
        _ => None,
    }
}

/// The keys' numbers and names, which is not how other directories are listed.
fn keys(metadata: &Metadata) -> Option<String> {
    // What ends in a slash would be taken for a directory.
    let name = |name: &str| name.trim_end_matches('/').to_owned();
    let names = metadata.public_keys.iter().enumerate().map(|(n, (key, _))| format!("{n}={}", name(key)));
    let names: Vec<_> = names.collect();
    (!names.is_empty()).then(|| names.join("\n"))
}

/// The text at a path, or what the directory there holds.
fn list(leaves: &BTreeMap<String, String>, path: &str) -> Option<String> {
    if let Some(text) = leaves.get(path) {
        return Some(text.clone());
    }
    let prefix = match path.trim_end_matches('/') {
        "" => String::new(),
        dir => format!("{dir}/"),
    };
    let mut names: Vec<String> = leaves
        .keys()
        .filter_map(|leaf| leaf.strip_prefix(&prefix))
        .map(|rest| rest.split_once('/').map_or(rest.to_owned(), |(dir, _)| format!("{dir}/")))
        .collect();
    names.dedup();
    (!names.is_empty()).then(|| names.join("\n"))
}

fn meta_data(metadata: &Metadata, view: &View) -> BTreeMap<String, String> {
    let host_name = view.host_name.clone() + "." + &view.domain;
    let groups = |of: fn(&(ami_core::SecurityGroupId, String)) -> String| {
        view.groups.iter().map(of).collect::<Vec<_>>().join("\n")
    };
    let (names, ids) = (groups(|(_, name)| name.clone()), groups(|(id, _)| id.to_string()));
    let mac = view.mac.to_string();
    let mut leaves = BTreeMap::new();
    let mut put = |path: &str, text: String| drop(leaves.insert(path.to_owned(), text));
    put("ami-launch-index", metadata.launch_index.to_string());
    // What EC2 says of images that were not bundled.
    put("ami-manifest-path", "(unknown)".to_owned());
    put("hostname", host_name.clone());
    put("instance-action", "none".to_owned());
    put("instance-id", metadata.instance_id.to_string());
    put("instance-life-cycle", "on-demand".to_owned());
    put("local-hostname", host_name.clone());
    put("local-ipv4", view.address.to_string());
    put("mac", mac.clone());
    put("placement/availability-zone", view.zone.clone());
    put("placement/region", view.region.clone());
    put("profile", "default-hvm".to_owned());
    put("security-groups", names.clone());
    put("services/domain", "amazonaws.com".to_owned());
    put("services/partition", "aws".to_owned());
    if let Some((public, _)) = view.public.iter().find(|(_, own)| *own == view.address) {
        put("public-ipv4", public.to_string());
    }
    if !metadata.instance_type.is_empty() {
        put("instance-type", metadata.instance_type.clone());
    }
    if let Some(image) = metadata.image_id {
        put("ami-id", image.to_string());
    }
    let codes: Vec<&str> = metadata.product_codes.iter().map(|code| code.id.as_str()).collect();
    if !codes.is_empty() {
        put("product-codes", codes.join("\n"));
    }
    if let Some(reservation) = metadata.reservation_id {
        put("reservation-id", reservation.to_string());
    }
    if let Some(root) = &metadata.root_device {
        put("block-device-mapping/ami", root.clone());
        put("block-device-mapping/root", root.clone());
    }
    let numbered = (1..).zip(&metadata.volumes).map(|(n, device)| (format!("ebs{n}"), device));
    let named = metadata.instance_store.iter().map(|(name, device)| (name.clone(), device));
    for (name, device) in numbered.chain(named) {
        // Not the path, unlike that of the root device.
        let device = device.strip_prefix("/dev/").unwrap_or(device);
        put(&format!("block-device-mapping/{name}"), device.to_owned());
    }
    for (n, (_, key)) in metadata.public_keys.iter().enumerate() {
        put(&format!("public-keys/{n}/openssh-key"), key.clone());
    }
    if metadata.options.instance_metadata_tags {
        for (key, value) in metadata.tags.iter().filter(|(key, _)| MetadataOptions::can_offer(key)) {
            put(&format!("tags/instance/{key}"), value.to_owned());
        }
    }
    let mut of_interface = vec![
        ("device-number", "0".to_owned()),
        ("interface-id", view.interface.to_string()),
        ("local-hostname", host_name),
        ("local-ipv4s", lines(view.addresses())),
        ("mac", mac.clone()),
        ("network-card", "0".to_owned()),
        ("security-groups", names),
        ("security-group-ids", ids),
        ("subnet-id", view.subnet_id.to_string()),
        ("subnet-ipv4-cidr-block", view.subnet.to_string()),
        ("vpc-id", view.vpc.to_string()),
        ("vpc-ipv4-cidr-block", view.vpc_cidr.to_string()),
        ("vpc-ipv4-cidr-blocks", view.vpc_cidr.to_string()),
    ];
    if !view.public.is_empty() {
        of_interface.push(("public-ipv4s", lines(view.public.iter().map(|(public, _)| *public))));
    }
    for (public, own) in &view.public {
        put(&format!("network/interfaces/macs/{mac}/ipv4-associations/{public}"), own.to_string());
    }
    of_interface.extend(metadata.owner.map(|owner| ("owner-id", owner.to_string())));
    for (name, text) in of_interface {
        put(&format!("network/interfaces/macs/{mac}/{name}"), text);
    }
    leaves
}

/// One a line.
fn lines(addresses: impl Iterator<Item = Ipv4Addr>) -> String {
    addresses.map(|address| address.to_string()).collect::<Vec<_>>().join("\n")
}

fn dynamic(metadata: &Metadata, view: &View) -> BTreeMap<String, String> {
    let codes_of = |kind: ProductCodeKind| -> Option<Vec<&str>> {
        let codes = metadata.product_codes.iter().filter(|code| code.kind == kind);
        let codes: Vec<&str> = codes.map(|code| code.id.as_str()).collect();
        (!codes.is_empty()).then_some(codes)
    };
    let document = json!({
        "accountId": metadata.owner.map(|owner| owner.to_string()),
        "architecture": metadata.architecture.to_string(),
        "availabilityZone": view.zone,
        "billingProducts": null,
        "devpayProductCodes": codes_of(ProductCodeKind::Devpay),
        "marketplaceProductCodes": codes_of(ProductCodeKind::Marketplace),
        "imageId": metadata.image_id.map(|image| image.to_string()),
        "instanceId": metadata.instance_id.to_string(),
        "instanceType": metadata.instance_type,
        "kernelId": null,
        "pendingTime": metadata.launch_time.map(|time| time.to_string()),
        "privateIp": view.address.to_string(),
        "ramdiskId": null,
        "region": view.region,
        "version": "2017-09-30",
    });
    let document = serde_json::to_string_pretty(&document).unwrap_or_default();
    BTreeMap::from([("instance-identity/document".to_owned(), document)])
}

//! Brings the records of an earlier version of the format to this one, all of them in one commit.
//!
//! It works on JSON, so that the records' own types know one version alone. A region of every version is in
//! `tests/golden`.

use ami_core::Timestamp;
use serde_json::{Map, Value, json};

use crate::record::{FormerImage, ImageRecord, InstanceRecord, RegionRecord, VolumeRecord};
use crate::store::{Record, Store};
use crate::{Error, ErrorKind, InstanceType, MetadataOptions, Result};

/// Brings a region of any earlier version to this one. Does nothing to a new or a current one.
pub(crate) fn migrate(store: &Store) -> Result<()> {
    let Some(region) = store.get_json(RegionRecord::TABLE, RegionRecord::KEY)? else { return Ok(()) };
    match region["format"].as_u64() {
        Some(1) => from_1(store, region),
        Some(2 | 3) => from_2(store, region),
        Some(found) if found == u64::from(RegionRecord::FORMAT) => Ok(()),
        found => {
            let found = found.map_or("no number".to_owned(), |n| n.to_string());
            let what = format!(
                "the region directory has format {found}; this version knows formats up to {}",
                RegionRecord::FORMAT
            );
            Err(Error::new(ErrorKind::Corrupt, what))
        }
    }
}

/// Version 1 knew one account, and less of instances and volumes. When they were made it did not know: what
/// has to have a time gets that of the migration.
fn from_1(store: &Store, mut region: Value) -> Result<()> {
    let (account, now) = (region["account"].clone(), json!(Timestamp::now()));
    let roots = root_devices(store)?;
    let mut instances = store.all_json(InstanceRecord::TABLE)?;
    for (key, record) in &mut instances {
        let description = object(key, record.get_mut("description"))?;
        let root = roots.iter().find(|(image, _)| description.get("image_id") == Some(image));
        let first = description.get("attachments").and_then(|a| a.get(0)?.get("device_name"));
        let root = root.map(|(_, root)| root).or(first).cloned();
        let added = json!({
            "owner": account,
            "launch_index": 0,
            "launch_time": now,
            "client_token": null,
            "termination_protection": false,
            "stop_protection": false,
            "key_name": null,
            "metadata_options": MetadataOptions::default(),
            "root_device_name": root,
        });
        add(description, added);
        let hardware = object(key, description.get_mut("instance_type"))?;
        let name = hardware.get("name").and_then(Value::as_str);
        let known = name.and_then(|name| name.parse::<InstanceType>().ok());
        let network = known.as_ref().and_then(InstanceType::network_performance);
        let ebs = known.as_ref().and_then(InstanceType::ebs_bandwidth);
        add(hardware, json!({ "network_performance": network, "ebs_bandwidth": ebs }));
        add(object(key, Some(record))?, json!({ "user_data": null, "parameters": null }));
    }
    let mut volumes = store.all_json(VolumeRecord::TABLE)?;
    for (key, record) in &mut volumes {
        let added = json!({
            "owner": account, "snapshot_id": null, "volume_type": "gp3", "created": now, "tags": {},
        });
        add(object(key, Some(record))?, added);
    }
    let mut images = store.all_json(ImageRecord::TABLE)?;
    for (key, record) in &mut images {
        add(object(key, Some(record))?, json!({ "snapshots": [] }));
    }
    add(object(RegionRecord::KEY, Some(&mut region))?, json!({ "format": RegionRecord::FORMAT }));
    store.commit(|c| {
        images.into_iter().try_for_each(|(key, json)| c.put_json(ImageRecord::TABLE, key, &json))?;
        instances.into_iter().try_for_each(|(key, json)| c.put_json(InstanceRecord::TABLE, key, &json))?;
        volumes.into_iter().try_for_each(|(key, json)| c.put_json(VolumeRecord::TABLE, key, &json))?;
        c.put_json(RegionRecord::TABLE, RegionRecord::KEY.to_owned(), &region)
    })
}

/// Version 2 knew no journal, and has all of its records in the database, and version 3 did not say in what words a state
/// was reached, nor when one ended; else their records are the same.
fn from_2(store: &Store, mut region: Value) -> Result<()> {
    add(object(RegionRecord::KEY, Some(&mut region))?, json!({ "format": RegionRecord::FORMAT }));
    store.commit(|c| c.put_json(RegionRecord::TABLE, RegionRecord::KEY.to_owned(), &region))
}

fn object<'a>(key: &str, value: Option<&'a mut Value>) -> Result<&'a mut Map<String, Value>> {
    value.and_then(Value::as_object_mut).ok_or_else(|| {
        let what = format!("the state store's record {key} is not what its version wrote");
        Error::new(ErrorKind::Corrupt, what)
    })
}

fn add(to: &mut Map<String, Value>, fields: Value) {
    if let Value::Object(fields) = fields {
        to.extend(fields);
    }
}

/// The ids of all images, deregistered ones too, with the names of their root devices.
fn root_devices(store: &Store) -> Result<Vec<(Value, Value)>> {
    let images =
        store.all_json(ImageRecord::TABLE)?.into_iter().map(|(_, record)| record["image"]["ami"].clone());
    let former = store.all_json(FormerImage::TABLE)?.into_iter().map(|(_, record)| record["ami"].clone());
    let root = |ami: Value| (ami["id"].clone(), ami["manifest"]["rootDeviceName"].clone());
    Ok(images.chain(former).map(root).collect())
}

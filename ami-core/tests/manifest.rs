//! Every rule for a manifest, whether it is built or read.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::{
    Ami, AmiBuilder, BlockDeviceMapping as Device, Boot, BootMode, Digest, ErrorKind, Manifest,
    OperatingSystem, Software, VolumeType, X86_64,
};
use serde_json::{Value, json};

fn snapshot() -> Digest {
    Digest::of(b"root")
}

fn bare() -> AmiBuilder<X86_64> {
    Ami::builder("web")
}

fn valid() -> AmiBuilder<X86_64> {
    bare().root_device("/dev/xvda").block_device(Device::ebs("/dev/xvda", snapshot(), 8))
}

fn direct(command_line: &str) -> Boot {
    Boot::direct(Digest::of(b"kernel"), None, command_line)
}

#[test]
fn the_builder_refuses_what_breaks_a_rule() {
    use ErrorKind::{
        InvalidBlockDeviceMapping as Mapping, InvalidManifest, InvalidParameterCombination as Combination,
        InvalidParameterValue as Value, MissingParameter,
    };
    let root = |device| bare().root_device("/dev/xvda").block_device(device);
    let long = "x".repeat(256);
    let packages = |count: usize| (0..count).map(|n| Software::new(format!("{n:0255}"), "1"));
    let cases: Vec<(AmiBuilder<X86_64>, ErrorKind, &str)> = vec![
        (bare(), MissingParameter, "the image has no root device name"),
        (bare().root_device("/dev/hda"), Mapping, "\"/dev/hda\" is no device name"),
        (bare().root_device("/dev/xvda"), Mapping, "the root device /dev/xvda is not mapped"),
        // The same disk under another name is not the device that was named.
        (root(Device::ebs("/dev/sda1", snapshot(), 8)), Mapping, "the root device /dev/xvda is not mapped"),
        (root(Device::no_device("/dev/xvda")), Mapping, "the root device /dev/xvda is neither"),
        (root(Device::ephemeral("/dev/xvda", "ephemeral0")), Mapping, "is neither an EBS volume nor"),
        (root(Device::instance_store_root("/dev/xvda", snapshot(), 0)), Mapping, "has 0 GiB"),
        (root(Device::instance_store_root("/dev/xvda", snapshot(), 11)), Mapping, "have 1 to 10 GiB"),
        (
            valid().block_device(Device::instance_store_root("/dev/sdb", snapshot(), 1)),
            Mapping,
            "root devices alone",
        ),
        (root(Device::blank("/dev/xvda", 8)), Mapping, "has no snapshot, but the image boots from it"),
        (
            root(Device::ebs("/dev/xvda", snapshot(), 125).volume_type(VolumeType::St1)),
            Mapping,
            "is a st1 volume, which cannot boot",
        ),
        (valid().block_device(Device::blank("/dev/xvda", 8)), Mapping, "device /dev/xvda is mapped twice"),
        (valid().block_device(Device::no_device("xvda")), Mapping, "stand for one disk"),
        (valid().block_device(Device::blank("/dev/sda1", 8)), Mapping, "stand for one disk"),
        (valid().block_device(Device::blank("/dev/hdb", 8)), Mapping, "\"/dev/hdb\" is no device name"),
        (
            valid().block_device(Device::blank("/dev/sdb", 0)),
            Mapping,
            "has 0 GiB, but gp3 volumes have 1 to 65536 GiB",
        ),
        (valid().block_device(Device::blank("/dev/sdb", 65_537)), Mapping, "has 65537 GiB"),
        (valid().block_device(Device::blank("/dev/sdb", u32::MAX)), Mapping, "has 4294967295 GiB"),
        (
            valid().block_device(Device::blank("/dev/sdb", 3).volume_type(VolumeType::Io2)),
            Mapping,
            "has 3 GiB, but io2 volumes have 4 to 65536 GiB",
        ),
        (valid().block_device(Device::ephemeral("/dev/sdb", "ephemeral24")), Mapping, "\"ephemeral24\""),
        (valid().block_device(Device::ephemeral("/dev/sdb", "ephemeral01")), Mapping, "\"ephemeral01\""),
        (
            valid().block_device(Device::ephemeral("/dev/sdb", "")),
            Mapping,
            "none of ephemeral0 to ephemeral23",
        ),
        (valid().boot(direct(&"x".repeat(2049))), Value, "has 2049 bytes, at most 2048 can be"),
        (valid().boot(direct("a\0b")), Value, "has a NUL or a line break in it"),
        (valid().boot(direct("a\nb")), Value, "has a NUL or a line break in it"),
        (
            valid().boot(direct("a").mode(BootMode::Uefi)),
            Combination,
            "passes no firmware, so not uefi either",
        ),
        (
            valid().operating_system(OperatingSystem::linux("", "12")),
            Value,
            "name of the operating system \"\"",
        ),
        (
            valid().operating_system(OperatingSystem::linux("debian", &*long)),
            Value,
            "version of the operating",
        ),
        (valid().software(Software::new(&*long, "1")), Value, "must be 1 to 255 bytes"),
        (valid().software(Software::new("a\nb", "1")), Value, r#"name of the software "a\nb""#),
        (valid().software_list(vec![Software::new("a", "1"); 2]), Value, "the software a 1 is listed twice"),
        (valid().software_list(packages(20_000)), InvalidManifest, "at most 4194304 can be"),
    ];
    for (builder, kind, text) in cases {
        let err = builder.clone().build_manifest().expect_err(text);
        assert_eq!(err.kind(), kind, "{err}");
        assert!(err.to_string().contains(text), "{err:?} does not say {text:?}");
    }
}

#[test]
fn the_builder_takes_what_is_just_within_the_rules() {
    let devices =
        |names: &[&str]| names.iter().map(|name| Device::blank(*name, 1)).collect::<Vec<_>>().into_iter();
    let cases = [
        valid(),
        valid().block_devices(devices(&["/dev/sdb", "/dev/xvdba", "xvdc", "/dev/sdd15", "/dev/nvme0n1"])),
        valid().block_device(Device::blank("/dev/sdb", 65_536)).block_device(Device::no_device("sdc")),
        valid().block_device(Device::blank("/dev/sdb", 4).volume_type(VolumeType::Io1)),
        valid().boot(direct(&"x".repeat(2048))),
        valid().boot(direct("")),
        valid().boot(Boot::root_volume().mode(BootMode::LegacyBios)),
        valid().operating_system(OperatingSystem::linux("arch", "")),
        valid().software(Software::new("linux", "1")).software(Software::new("linux", "2")),
        valid().software_list((0..16_000).map(|n| Software::new(format!("package-{n}"), "1.0"))),
        // What boots from a kernel beside it needs nothing on its root volume.
        bare().root_device("/dev/sda1").block_device(Device::blank("/dev/sda1", 1)).boot(direct("quiet")),
    ];
    for builder in cases {
        let manifest = builder.build_manifest().unwrap();
        assert_eq!(Manifest::from_canonical_json(&manifest.to_canonical_json()).unwrap(), manifest);
    }
}

#[test]
fn names_of_images_follow_the_rule() {
    let cases = [
        ("web", true),
        ("we", false),
        ("", false),
        ("a (b) [c] d.e/f-g'h@i_j", true),
        ("web\n", false),
        ("web:1", false),
        ("wéb", false),
        (&*"n".repeat(128), true),
        (&*"n".repeat(129), false),
    ];
    for (name, ok) in cases {
        let builder = Ami::<X86_64>::builder(name).root_device("/dev/xvda").block_device(Device::ebs(
            "/dev/xvda",
            snapshot(),
            8,
        ));
        let built = builder.build(&"local".parse().unwrap(), &"123456789012".parse().unwrap());
        assert_eq!(
            built.err().map(|err| err.code()),
            (!ok).then_some("InvalidAMIName.Malformed"),
            "{name:?}"
        );
    }
}

fn small_json() -> Value {
    serde_json::from_slice(include_bytes!("golden/full.manifest.json")).unwrap()
}

/// A manifest in JSON, with one place changed: set, or removed by `None`.
fn changed(pointer: &str, value: Option<Value>) -> Vec<u8> {
    let mut manifest = small_json();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = manifest.pointer_mut(parent).unwrap();
    match (value, parent) {
        (Some(value), Value::Object(map)) => drop(map.insert(key.to_owned(), value)),
        (None, Value::Object(map)) => drop(map.remove(key).unwrap()),
        (Some(value), Value::Array(list)) => list.push(value),
        _ => panic!("no such change: {pointer}"),
    }
    serde_json::to_vec(&manifest).unwrap()
}

#[test]
fn reading_refuses_what_breaks_a_rule() {
    let twice = json!({"deviceName": "/dev/sda1", "kind": "noDevice"});
    let cases = [
        ("/format", Some(json!(2)), "InvalidManifest", "of format 2, but only 1 is known"),
        ("/format", Some(json!(0)), "InvalidManifest", "of format 0"),
        ("/format", None, "InvalidManifest", "missing field `format`"),
        ("/architecture", Some(json!("sparc")), "InvalidManifest", "unknown variant `sparc`"),
        ("/architecture", None, "InvalidManifest", "missing field `architecture`"),
        (
            "/virtualizationType",
            Some(json!("paravirtual")),
            "InvalidManifest",
            "unknown variant `paravirtual`",
        ),
        ("/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        ("/boot/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        ("/boot/source/direct/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        ("/operatingSystem/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        ("/blockDeviceMappings/0/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        (
            "/blockDeviceMappings/0/kind/ebs/colour",
            Some(json!(1)),
            "InvalidManifest",
            "unknown field `colour`",
        ),
        (
            "/blockDeviceMappings/2/kind/ephemeral/colour",
            Some(json!(1)),
            "InvalidManifest",
            "unknown field `colour`",
        ),
        ("/software/0/colour", Some(json!("red")), "InvalidManifest", "unknown field `colour`"),
        ("/parent", Some(json!("sha256:00")), "InvalidManifest", "is not a digest"),
        ("/blockDeviceMappings/0/kind/ebs/volumeSizeGib", Some(json!(-1)), "InvalidManifest", "-1"),
        (
            "/blockDeviceMappings/0/kind/ebs/volumeSizeGib",
            Some(json!(1e10)),
            "InvalidManifest",
            "10000000000",
        ),
        (
            "/blockDeviceMappings/0/kind/ebs/volumeSizeGib",
            Some(json!(0)),
            "InvalidBlockDeviceMapping",
            "has 0 GiB",
        ),
        (
            "/blockDeviceMappings/-",
            Some(twice),
            "InvalidBlockDeviceMapping",
            "device /dev/sda1 is mapped twice",
        ),
        (
            "/blockDeviceMappings/0/deviceName",
            Some(json!("/dev/hda")),
            "InvalidBlockDeviceMapping",
            "/dev/hda",
        ),
        (
            "/blockDeviceMappings/0/deviceName",
            Some(json!("/dev/sdz")),
            "InvalidBlockDeviceMapping",
            "is not mapped",
        ),
        ("/rootDeviceName", Some(json!("/dev/xvda")), "InvalidBlockDeviceMapping", "is not mapped"),
        ("/rootDeviceName", Some(json!("")), "MissingParameter", "no root device name"),
        ("/boot/mode", Some(json!("uefi")), "InvalidParameterCombination", "passes no firmware"),
        ("/boot/source/direct/commandLine", Some(json!("a\nb")), "InvalidParameterValue", "line break"),
        (
            "/software/-",
            Some(json!({"name": "nginx", "version": ""})),
            "InvalidParameterValue",
            "listed twice",
        ),
    ];
    for (pointer, value, code, text) in cases {
        let json = changed(pointer, value);
        let err = Manifest::from_json(&json).expect_err(pointer);
        let source = std::error::Error::source(&err).map(ToString::to_string).unwrap_or_default();
        assert_eq!(err.code(), code, "{pointer}: {err}: {source}");
        assert!(format!("{err}: {source}").contains(text), "{pointer}: {err}: {source}: not {text:?}");
        assert!(serde_json::from_slice::<Manifest>(&json).is_err(), "{pointer} through serde");
    }
}

#[test]
fn reading_takes_any_form_of_the_same_manifest() {
    let canonical = include_bytes!("golden/full.manifest.json");
    let manifest = Manifest::from_json(canonical).unwrap();
    let mut shuffled = small_json();
    for list in ["/blockDeviceMappings", "/software"] {
        shuffled.pointer_mut(list).unwrap().as_array_mut().unwrap().reverse();
    }
    let forms = [serde_json::to_vec_pretty(&small_json()).unwrap(), serde_json::to_vec(&shuffled).unwrap()];
    for form in forms {
        assert_ne!(form, canonical);
        assert_eq!(Manifest::from_json_with_digest(&form, &manifest.digest()).unwrap(), manifest);
        assert_eq!(Manifest::from_canonical_json(&form).unwrap_err().kind(), ErrorKind::InvalidManifest);
    }
    let mut nulls = Manifest::from_json(include_bytes!("golden/small.manifest.json")).unwrap();
    let with_null =
        String::from_utf8(nulls.to_canonical_json()).unwrap().replacen('{', "{\"parent\":null,", 1);
    nulls = Manifest::from_json_with_digest(with_null.as_bytes(), &nulls.digest()).unwrap();
    assert_eq!(nulls.parent(), None);
}

#[test]
fn a_digest_of_something_else_is_refused() {
    let json = include_bytes!("golden/full.manifest.json");
    let err = Manifest::from_json_with_digest(json, &Digest::of(b"something else")).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::DigestMismatch);
    // The same name twice: which of them would be meant?
    let twice = String::from_utf8_lossy(json).replacen('{', "{\"format\":1,", 1);
    assert_eq!(Manifest::from_json(twice.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidManifest);
}

#[test]
fn length_and_depth_are_bounded() {
    let mut padded = include_bytes!("golden/small.manifest.json").to_vec();
    padded.resize(Manifest::MAX_JSON, b' ');
    assert!(Manifest::from_json(&padded).is_ok());
    padded.push(b' ');
    assert_eq!(Manifest::from_json(&padded).unwrap_err().kind(), ErrorKind::InvalidManifest);
    let deep = [b"{\"format\":1,\"x\":".as_slice(), &vec![b'['; Manifest::MAX_JSON - 100]].concat();
    assert_eq!(Manifest::from_json(&deep).unwrap_err().kind(), ErrorKind::InvalidManifest);
}

#[test]
fn every_truncation_is_an_error() {
    let json = include_bytes!("golden/full.manifest.json");
    for len in 0..json.len() {
        let err = Manifest::from_json(&json[..len]).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidManifest, "at {len}");
        assert!(std::error::Error::source(&err).is_some(), "the error at {len} says where");
    }
}

#[test]
fn a_snapshot_fits_or_not() {
    let device = Device::ebs("/dev/xvda", snapshot(), 8);
    let ebs = device.as_ebs().unwrap();
    for (bytes, ok) in [(0, true), (1, true), (8 << 30, true), ((8 << 30) + 1, false), (u64::MAX, false)] {
        assert_eq!(ebs.check_snapshot_size(bytes).is_ok(), ok, "{bytes}");
    }
    let err = ebs.check_snapshot_size((8 << 30) + 1).unwrap_err();
    assert_eq!(err.to_string(), "a volume of 8 GiB is smaller than its snapshot, which needs 9 GiB");
    assert_eq!(err.code(), "InvalidBlockDeviceMapping");
}

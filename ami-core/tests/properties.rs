//! What holds for all values, tried on many.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::*;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from_bytes)
}

fn volume(name: String) -> impl Strategy<Value = BlockDeviceMapping> {
    let size = |kind: VolumeType| (Just(kind), kind.size_range_gib().0..=kind.size_range_gib().1);
    let kind = select(VolumeType::ALL).prop_flat_map(size);
    (option::of(digest()), kind, any::<bool>(), any::<bool>()).prop_map(
        move |(snapshot, (kind, size), delete, encrypted)| {
            let mapping = match snapshot {
                Some(snapshot) => BlockDeviceMapping::ebs(&*name, snapshot, size),
                None => BlockDeviceMapping::blank(&*name, size),
            };
            mapping.volume_type(kind).delete_on_termination(delete).encrypted(encrypted)
        },
    )
}

fn device(name: String) -> impl Strategy<Value = BlockDeviceMapping> {
    let (ephemeral, none) = (name.clone(), name.clone());
    prop_oneof![
        4 => volume(name),
        1 => (0..24).prop_map(move |n| BlockDeviceMapping::ephemeral(&*ephemeral, format!("ephemeral{n}"))),
        1 => Just(BlockDeviceMapping::no_device(none)),
    ]
}

fn devices() -> impl Strategy<Value = Vec<BlockDeviceMapping>> {
    let root = prop_oneof![
        4 => (digest(), 1_u32..=65_536)
            .prop_map(|(snapshot, size)| BlockDeviceMapping::ebs("/dev/xvda", snapshot, size)),
        1 => (digest(), 1_u32..=10)
            .prop_map(|(snapshot, size)| BlockDeviceMapping::instance_store_root("/dev/xvda", snapshot, size)),
    ];
    let more = btree_set("[b-z]", 0..6).prop_flat_map(|letters| {
        letters.into_iter().map(|l| device(format!("/dev/sd{l}"))).collect::<Vec<_>>()
    });
    (root, more).prop_map(|(root, more)| [vec![root], more].concat())
}

fn boot() -> impl Strategy<Value = Boot> {
    prop_oneof![
        (option::of(select(BootMode::ALL)), any::<bool>()).prop_map(|(mode, tpm)| match mode {
            Some(BootMode::Uefi) if tpm => Boot::root_volume().mode(BootMode::Uefi).tpm(TpmSupport::V2_0),
            Some(mode) => Boot::root_volume().mode(mode),
            None => Boot::root_volume(),
        }),
        (digest(), option::of(digest()), "[^\0\r\n]{0,100}")
            .prop_map(|(kernel, initrd, command_line)| Boot::direct(kernel, initrd, command_line)),
    ]
}

/// The parts of a valid image: disks and software may come in any order.
type Parts =
    (Architecture, Option<OperatingSystem>, Vec<BlockDeviceMapping>, Boot, Vec<Software>, Option<Digest>);

fn parts() -> impl Strategy<Value = Parts> {
    let os = (select(OsFamily::ALL), "\\PC{1,20}", "\\PC{0,20}")
        .prop_map(|(family, name, version)| OperatingSystem::new(family, name, version));
    let software = btree_set(("\\PC{1,20}", "\\PC{0,20}"), 0..8)
        .prop_map(|list| list.into_iter().map(|(name, version)| Software::new(name, version)).collect());
    (select(&Architecture::ALL), option::of(os), devices(), boot(), software, option::of(digest()))
}

fn builder((architecture, os, devices, boot, software, parent): Parts) -> AmiBuilder<AnyArch> {
    let mut builder = AnyAmi::builder_for(architecture, "name")
        .root_device("/dev/xvda")
        .block_devices(devices)
        .boot(boot)
        .software_list(software);
    if let Some(os) = os {
        builder = builder.operating_system(os);
    }
    if let Some(parent) = parent {
        builder = builder.parent(parent);
    }
    builder
}

fn manifest() -> impl Strategy<Value = Manifest> {
    parts().prop_map(|parts| builder(parts).build_manifest().unwrap())
}

/// `value` with the fields of every object in the opposite order of names: `serde_json` sorts them.
fn reversed(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Object(map) => {
            let field = |(name, value)| format!("{} : {}", serde_json::Value::from(name), reversed(value));
            let fields: Vec<_> =
                map.iter().rev().map(|(name, value)| field((name.as_str(), value))).collect();
            format!("{{ {} }}", fields.join(" ,\n"))
        }
        serde_json::Value::Array(list) => {
            format!("[{}]", list.iter().map(reversed).collect::<Vec<_>>().join(" , "))
        }
        other => other.to_string(),
    }
}

/// A recursive matcher after the definition, slow and plain.
fn fits(pattern: &[char], text: &[char]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        (['*', rest @ ..], _) => fits(rest, text) || !text.is_empty() && fits(pattern, &text[1..]),
        (['?', rest @ ..], [_, more @ ..]) => fits(rest, more),
        (['\\', p, rest @ ..], [c, more @ ..]) | ([p, rest @ ..], [c, more @ ..]) => {
            p == c && fits(rest, more)
        }
        _ => false,
    }
}

macro_rules! ids_come_back {
    ($($kind:ident),*) => {
        proptest! {
            #[test]
            fn every_kind_of_id_comes_back(bytes: [u8; 16], short: u32) {
                $(
                    let id = $kind::from_bytes(bytes);
                    prop_assert_eq!(id.to_string().parse::<$kind>(), Ok(id));
                    prop_assert_eq!(id.to_string().len(), $kind::PREFIX.len() + 18);
                    let text = format!("{}-{short:08x}", $kind::PREFIX);
                    prop_assert_eq!(text.parse::<$kind>().unwrap().to_string(), text);
                )*
            }
        }
    };
}

ids_come_back!(
    AmiId,
    InstanceId,
    ReservationId,
    VolumeId,
    SnapshotId,
    NetworkInterfaceId,
    VpcId,
    SubnetId,
    SecurityGroupId,
    SecurityGroupRuleId,
    RouteTableId,
    InternetGatewayId,
    AllocationId,
    DhcpOptionsId,
    KeyPairId,
    LaunchTemplateId
);

proptest! {
    #[test]
    fn a_manifest_comes_back_from_its_canonical_form(manifest in manifest()) {
        let json = manifest.to_canonical_json();
        let read = Manifest::from_canonical_json(&json).unwrap();
        prop_assert_eq!(&read, &manifest);
        prop_assert_eq!(read.to_canonical_json(), json.clone());
        prop_assert_eq!(manifest.digest(), Digest::of(&json));
    }

    #[test]
    fn the_order_of_fields_and_the_space_between_them_do_not_matter(manifest in manifest()) {
        let value = serde_json::from_slice(&manifest.to_canonical_json()).unwrap();
        prop_assert_eq!(Manifest::from_json(reversed(&value).as_bytes()).unwrap().digest(), manifest.digest());
    }

    #[test]
    fn the_order_in_which_parts_are_given_does_not_matter(
        (parts, shuffled) in parts().prop_flat_map(|parts| {
            let (devices, software) = (Just(parts.2.clone()).prop_shuffle(), Just(parts.4.clone()).prop_shuffle());
            (Just(parts), (devices, software))
        })
    ) {
        let (devices, software) = shuffled;
        let digest = builder(parts.clone()).build_manifest().unwrap().digest();
        let other = (parts.0, parts.1, devices, parts.3, software, parts.5);
        prop_assert_eq!(builder(other).build_manifest().unwrap().digest(), digest);
    }

    #[test]
    fn manifests_are_equal_where_their_digests_are(a in manifest(), b in manifest()) {
        prop_assert_eq!(a == b, a.digest() == b.digest());
    }

    #[test]
    fn every_truncation_is_an_error(manifest in manifest(), place: prop::sample::Index) {
        let json = manifest.to_canonical_json();
        prop_assert!(Manifest::from_json(&json[..place.index(json.len())]).is_err());
    }

    /// Damaged in one place, a manifest is refused, or read as another, valid one.
    #[test]
    fn a_damaged_manifest_is_an_error_or_another(manifest in manifest(), place: prop::sample::Index, byte: u8) {
        let mut json = manifest.to_canonical_json();
        let place = place.index(json.len());
        prop_assume!(json[place] != byte);
        json[place] = byte;
        prop_assert!(Manifest::from_json_with_digest(&json, &manifest.digest()).is_err());
        if let Ok(read) = Manifest::from_json(&json) {
            let again = Manifest::from_canonical_json(&read.to_canonical_json()).unwrap();
            prop_assert_eq!(again, read);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_manifest(bytes in vec(any::<u8>(), 0..500)) {
        prop_assert_eq!(Manifest::from_json(&bytes).unwrap_err().kind(), ErrorKind::InvalidManifest);
    }

    #[test]
    fn arbitrary_text_is_read_and_written_back_or_refused(text in "\\PC{0,30}|(/dev/)?(sd|xvd|nvme)[a-z0-9]{0,5}") {
        if let Ok(name) = text.parse::<DeviceName>() {
            prop_assert_eq!(name.as_str(), &text);
            prop_assert!(name.same_disk(&name));
        }
        if let Ok(region) = text.parse::<RegionName>() {
            prop_assert_eq!(region.as_str(), &text);
        }
        prop_assert!(text.parse::<Digest>().is_err());
    }

    #[test]
    fn digests_and_times_come_back(digest in digest(), millis in 0..=Timestamp::MAX.as_unix_millis()) {
        prop_assert_eq!(digest.to_string().parse(), Ok(digest));
        let time = Timestamp::from_unix_millis(millis).unwrap();
        prop_assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time);
    }

    #[test]
    fn an_image_comes_back_from_json(
        parts in parts(),
        region in "[a-z0-9-]{1,64}",
        owner in "[0-9]{12}",
        other in "[0-9]{12}",
        description in "\\PC{0,60}",
    ) {
        let ami = builder(parts).build(&region.parse().unwrap(), &owner.parse().unwrap()).unwrap();
        let mut image = Image::new(ami);
        image.set_description(description).unwrap();
        image.launch_permissions_mut().add(other.parse().unwrap());
        let read: Image = serde_json::from_slice(&serde_json::to_vec(&image).unwrap()).unwrap();
        prop_assert_eq!(read.ami().created(), image.ami().created());
        prop_assert_eq!(read, image);
    }

    #[test]
    fn wildcards_match_what_their_definition_says(
        pattern in r"([ab*?]|\\[*?\\a]){0,8}",
        text in r"[ab*?\\]{0,8}",
    ) {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        let expected = fits(&chars(&pattern), &chars(&text));
        let ami = Ami::<X86_64>::builder("web")
            .root_device("/dev/xvda")
            .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8));
        let ami = ami.build(&"local".parse().unwrap(), &"123456789012".parse().unwrap()).unwrap();
        let mut image = Image::new(ami);
        image.set_description(&*text).unwrap();
        prop_assert_eq!(Filter::new("description", [pattern]).unwrap().matches(&image), expected);
    }
}

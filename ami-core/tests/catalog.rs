//! The catalog in memory, filters and queries.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::{
    AccountId, Ami, Arm64, BlockDeviceMapping, Boot, BootMode, Category, DescribeImages, Digest, Filter,
    Image, ImdsSupport, MemoryCatalog, OperatingSystem, OsFamily, OwnerAlias, ProductCode, ProductCodeKind,
    Query, SourceImage, StateReason, Timestamp, TpmSupport, VolumeType,
};

const OWNER: &str = "111111111111";
const VIEWER: &str = "222222222222";
const SNAPSHOT: &str = "snap-0123456789abcdef0";
const PARENT: &str = "ami-0123456789abcdef0";
const INSTANCE: &str = "i-0123456789abcdef0";

fn account(text: &str) -> AccountId {
    text.parse().unwrap()
}

#[test]
fn the_catalog_in_memory_keeps_the_contract() {
    ami_core::testing::catalog_conformance(MemoryCatalog::new);
}

/// An image with a value for every field that filters know.
fn image() -> Image {
    let ami = Ami::<Arm64>::builder("windows [1]")
        .operating_system(OperatingSystem::new(OsFamily::Windows, "windows", "2022"))
        .root_device("/dev/sda1")
        .block_device(
            BlockDeviceMapping::ebs("/dev/sda1", Digest::of(b"root"), 30).delete_on_termination(false),
        )
        .block_device(BlockDeviceMapping::blank("/dev/sdb", 125).volume_type(VolumeType::St1))
        .block_device(BlockDeviceMapping::no_device("/dev/sdc"))
        .boot(Boot::root_volume().mode(BootMode::Uefi).tpm(TpmSupport::V2_0))
        .created("2026-01-31T12:00:00.250Z".parse().unwrap())
        .build(&"us-east-1".parse().unwrap(), &account(OWNER))
        .unwrap();
    let mut image = Image::new(ami);
    image.set_description("a * in it").unwrap();
    image.set_owner_alias(Some(OwnerAlias::Amazon));
    image.launch_permissions_mut().set_public(true);
    image.tags_mut().insert("stage", "production").unwrap();
    image.tags_mut().insert("Name", "").unwrap();
    image.add_product_code(ProductCode { id: "abc".into(), kind: ProductCodeKind::Devpay }).unwrap();
    image.set_imds_support(ImdsSupport::V2_0);
    image.set_snapshots([SNAPSHOT.parse().unwrap()]);
    let source = SourceImage { region: "eu-west-1".parse().unwrap(), id: PARENT.parse().unwrap() };
    image.set_source(Some(source), INSTANCE.parse().ok());
    image.set_state_reason(Some(StateReason::new("Server.InternalError", "the disk is full")));
    image
}

#[test]
fn filters_compare_what_their_names_say() {
    let image = image();
    let (id, digest, root) =
        (image.id().to_string(), image.ami().digest().to_string(), Digest::of(b"root").to_string());
    // Name; values that match; values that do not.
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("architecture", &["arm64", "*64"], &["x86_64", "ARM64", ""]),
        ("block-device-mapping.delete-on-termination", &["true", "false"], &["", "yes"]),
        ("block-device-mapping.device-name", &["/dev/sda1", "/dev/sdb"], &["/dev/sdc", "/dev/sda"]),
        ("block-device-mapping.encrypted", &["false"], &["true"]),
        ("block-device-mapping.snapshot-digest", &[&root, "sha256:*"], &["snap-*", ""]),
        ("block-device-mapping.snapshot-id", &[SNAPSHOT, "snap-*"], &["snap-", "sha256:*"]),
        ("block-device-mapping.volume-size", &["30", "125"], &["0", "3"]),
        ("block-device-mapping.volume-type", &["gp3", "st1"], &["gp2"]),
        ("boot-mode", &["uefi"], &["uefi-preferred", ""]),
        ("creation-date", &["2026-01-31T12:00:00.250Z", "2026-01-*"], &["2026", "2026-02-*"]),
        ("description", &["a * in it", r"a \* in it", "*"], &[r"a \? in it", ""]),
        ("digest", &[&digest], &["sha256:"]),
        ("image-id", &[&id, "ami-*"], &["ami-", "i-*"]),
        ("image-type", &["machine", "m*"], &["kernel", "ramdisk"]),
        ("imds-support", &["v2.0", "v?.0"], &["v1.0", ""]),
        ("is-public", &["true"], &["false", "True"]),
        ("manifest-location", &["amazon/windows [1]", "amazon/*", "*/windows*"], &["windows*", "1111*"]),
        ("name", &["windows [1]", "windows*", "?indows ???"], &["windows", "windows [0-9]", "Windows*"]),
        ("owner-alias", &["amazon"], &["aws-marketplace"]),
        ("owner-id", &[OWNER], &[VIEWER]),
        ("platform", &["windows"], &["linux"]),
        ("product-code", &["abc"], &["ab"]),
        ("product-code.type", &["devpay"], &["marketplace"]),
        ("root-device-name", &["/dev/sda1"], &["/dev/sdb"]),
        ("root-device-type", &["ebs"], &["instance-store"]),
        ("source-image-id", &[PARENT, "ami-*"], &[&id, ""]),
        ("source-image-region", &["eu-west-1", "eu-*"], &["us-east-1"]),
        ("source-instance-id", &[INSTANCE, "i-*f0"], &["i-", "ami-*"]),
        ("state", &["available"], &["pending"]),
        ("state-reason-code", &["Server.InternalError", "Server.*"], &["Client.*", ""]),
        ("state-reason-message", &["the disk is full", "*full"], &["full", ""]),
        ("tag:stage", &["production", "prod*"], &["test", ""]),
        ("tag:Name", &["", "*"], &["?"]),
        ("tag:absent", &[], &["", "*"]),
        ("tag-key", &["stage", "Name"], &["production", "stag"]),
        ("tpm-support", &["v2.0", "v2*"], &["v1.2", ""]),
        ("virtualization-type", &["hvm"], &["paravirtual"]),
    ];
    for (name, good, bad) in cases {
        for value in *good {
            assert!(Filter::new(name, [*value]).unwrap().matches(&image), "{name} {value:?}");
            assert!(Filter::new(name, ["none of it", value]).unwrap().matches(&image), "{name}, one of two");
        }
        for value in *bad {
            assert!(!Filter::new(name, [*value]).unwrap().matches(&image), "{name} {value:?}");
        }
    }
}

/// No pattern fits what an image does not say.
#[test]
fn an_image_that_says_nothing_more_fits_none_of_those() {
    let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
    let ami = Ami::<Arm64>::builder("bare").root_device("/dev/xvda").block_device(root);
    let bare = Image::new(ami.build(&"us-east-1".parse().unwrap(), &account(OWNER)).unwrap());
    for name in [
        "block-device-mapping.snapshot-id",
        "boot-mode",
        "imds-support",
        "owner-alias",
        "platform",
        "product-code",
        "product-code.type",
        "source-image-id",
        "source-image-region",
        "source-instance-id",
        "state-reason-code",
        "state-reason-message",
        "tag-key",
        "tpm-support",
    ] {
        assert!(!Filter::new(name, ["*", ""]).unwrap().matches(&bare), "{name}");
        assert!(Filter::new(name, ["*", ""]).unwrap().matches(&image()), "{name}");
    }
    let location = Filter::new("manifest-location", [format!("{OWNER}/bare")]).unwrap();
    assert!(location.matches(&bare), "who has no alias is known by number");
}

/// A page ends and goes on in the same way whatever is filtered by.
#[test]
fn pages_of_what_fits_a_filter() {
    let made = |number: usize| {
        let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(&number.to_be_bytes()), 8);
        let ami = Ami::<Arm64>::builder(format!("web-{number}")).root_device("/dev/xvda").block_device(root);
        let mut image = Image::new(ami.build(&"us-east-1".parse().unwrap(), &account(OWNER)).unwrap());
        if number % 3 != 0 {
            let parent = SourceImage { region: "us-east-1".parse().unwrap(), id: PARENT.parse().unwrap() };
            image.set_source(Some(parent), format!("i-{:017x}", number % 3).parse().ok());
        }
        image
    };
    let images: Vec<Image> = (0..30).map(made).collect();
    let wanted = || Filter::new("source-instance-id", ["i-*1", "i-*2"]).unwrap();
    let (mut found, mut token, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        let mut request = DescribeImages::new().filter(wanted()).max_results(7);
        if let Some(token) = token {
            request = request.next_token(token);
        }
        let page = request.answer(&account(OWNER), Timestamp::now(), &images).unwrap();
        pages += 1;
        found.extend(page.items);
        token = page.next_token;
        if token.is_none() {
            break;
        }
    }
    assert_eq!(found, Query::all().filter(wanted()).select(&images));
    assert_eq!((found.len(), pages), (20, 3));
}

/// EC2 has them, and images here do not: that is said, and not answered with nothing.
#[test]
fn filters_of_ec2_that_have_no_meaning_here_say_so() {
    for name in [
        "ena-support",
        "free-tier-eligible",
        "hypervisor",
        "image-allowed",
        "kernel-id",
        "ramdisk-id",
        "sriov-net-support",
    ] {
        let refused = Filter::new(name, ["*"]).unwrap_err();
        assert_eq!(refused.code(), "InvalidParameterValue", "{name}");
        assert!(refused.to_string().starts_with(&format!("images have no {name:?} here")), "{refused}");
    }
}

#[test]
fn filters_that_cannot_be() {
    for name in ["", "tag:", "Name", "names", "block-device-mapping", "x".repeat(1000).as_str()] {
        assert_eq!(Filter::new(name, ["x"]).unwrap_err().code(), "InvalidParameterValue", "{name:?}");
    }
    let (none, many) = ("InvalidParameterValue", "FilterLimitExceeded");
    for (count, code) in [(0, Some(none)), (1, None), (200, None), (201, Some(many))] {
        let refused = Filter::new("name", vec!["x"; count]).err();
        assert_eq!(refused.map(|e| e.code()), code, "{count} values");
    }
    assert!(Filter::new("name", std::iter::repeat("without end")).is_err());
}

#[test]
fn wildcards() {
    // Pattern, text, whether it fits.
    let cases = [
        ("", "", true),
        ("*", "", true),
        ("***", "", true),
        ("?", "", false),
        ("*a", "aaa", true),
        ("*a*b", "xaxxbxb", true),
        ("*a*b", "xaxxbx", false),
        ("a*a", "a", false),
        ("a?c", "aéc", true),
        ("*éa", "éééa", true),
        (r"\*", "*", true),
        (r"\*", "a", false),
        (r"\?", "?", true),
        (r"\\", r"\", true),
        (r"\", r"\", true),
        (r"\", "", false),
        (r"*\**", "a*b", true),
        (r"*\**", "ab", false),
        (r"\a", "a", true),
        ("[a]", "a", false),
        ("A", "a", false),
    ];
    let mut image = image();
    for (pattern, text, fits) in cases {
        image.set_description(text).unwrap();
        let filter = Filter::new("description", [pattern]).unwrap();
        assert_eq!(filter.matches(&image), fits, "{pattern:?} and {text:?}");
    }
    // Would take for ever if every star were tried at every place.
    image.set_description("a".repeat(255)).unwrap();
    let hostile = format!("{}b", "*a".repeat(100_000));
    assert!(!Filter::new("description", [hostile]).unwrap().matches(&image));
}

#[test]
fn queries_choose_and_hide() {
    let public = image();
    let private = {
        let ami = public.ami().copy_to(public.ami().region(), &account(OWNER), "private").unwrap();
        Image::new(ami)
    };
    let old = {
        let ami = public.ami().copy_to(public.ami().region(), &account(OWNER), "old").unwrap();
        let mut image = Image::new(ami);
        image.launch_permissions_mut().add(account(VIEWER));
        image.set_deprecation(Timestamp::from_unix_millis(1000));
        image
    };
    let (before, after) =
        (Timestamp::from_unix_millis(999).unwrap(), Timestamp::from_unix_millis(1000).unwrap());
    let filter = |name: &str, value: &str| Filter::new(name, [value]).unwrap();
    let (owner, viewer) = (account(OWNER), account(VIEWER));
    // Query; names of those that it lists.
    let cases: Vec<(Query, &[&str])> = vec![
        (Query::all(), &["old", "private", "windows [1]"]),
        (Query::all().owner(owner), &["old", "private", "windows [1]"]),
        (Query::all().owner(viewer), &[]),
        (Query::all().owner(viewer).owner_alias(OwnerAlias::Amazon), &["windows [1]"]),
        (Query::all().visible_to(viewer), &["old", "windows [1]"]),
        (Query::all().visible_to(viewer).hide_deprecated(before), &["old", "windows [1]"]),
        (Query::all().visible_to(viewer).hide_deprecated(after), &["windows [1]"]),
        (Query::all().visible_to(owner).hide_deprecated(after), &["old", "private", "windows [1]"]),
        (Query::all().hide_deprecated(after), &["private", "windows [1]"]),
        (Query::all().in_category(viewer, Category::Shared), &["old"]),
        (Query::all().in_category(viewer, Category::QuickStart), &["windows [1]"]),
        (Query::all().in_category(owner, Category::MyAmis), &["old", "private", "windows [1]"]),
        (Query::all().id(private.id()).id(old.id()), &["old", "private"]),
        (Query::all().filter(filter("is-public", "false")).filter(filter("name", "*a*")), &["private"]),
    ];
    let images = [public, private, old];
    for (query, expected) in cases {
        let mut found: Vec<_> =
            query.select(&images).iter().map(|image| image.ami().name().to_owned()).collect();
        found.sort();
        assert_eq!(found, expected, "{query:?}");
    }

    let mut pages = Vec::new();
    let mut query = Query::all().limit(2);
    loop {
        let page = query.select(&images);
        let Some(last) = page.last() else { break };
        query = query.after(last.id());
        pages.push(page.iter().map(Image::id).collect::<Vec<_>>());
    }
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
    assert!(pages.concat().is_sorted(), "pages go up by id");
}

//! Images as a region knows them: identity, architecture, and the attributes that change.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::{
    AccountId, Action, Ami, AnyAmi, Architecture, Arm64, BlockDeviceMapping, Category, Digest, ErrorKind,
    Image, ImageState, OwnerAlias, ProductCode, ProductCodeKind, RegionName, Tags, Timestamp, X86, X86_64,
};
use serde_json::{Value, json};

const OWNER: &str = "111111111111";
const FRIEND: &str = "222222222222";
const STRANGER: &str = "333333333333";

fn account(text: &str) -> AccountId {
    text.parse().unwrap()
}

fn region(text: &str) -> RegionName {
    text.parse().unwrap()
}

fn ami() -> Ami<X86_64> {
    Ami::builder("web")
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
        .build(&region("us-east-1"), &account(OWNER))
        .unwrap()
}

/// An image shared with FRIEND.
fn shared() -> Image {
    let mut image = Image::new(ami());
    image.launch_permissions_mut().add(account(FRIEND));
    image
}

#[test]
fn everything_that_makes_an_image_this_one_makes_its_id() {
    let ami = ami();
    let here = region("us-east-1");
    let same = ami.copy_to(&here, ami.owner(), ami.name()).unwrap();
    assert_eq!((same.id(), &same), (ami.id(), &ami));
    let others = [
        ami.copy_to(&region("us-east-2"), ami.owner(), ami.name()).unwrap(),
        ami.copy_to(&here, &account(FRIEND), ami.name()).unwrap(),
        ami.copy_to(&here, ami.owner(), "Web").unwrap(),
    ];
    for (place, other) in others.iter().enumerate() {
        assert_eq!(other.digest(), ami.digest());
        assert_ne!(other, &ami);
        assert!(others[..place].iter().chain([&ami]).all(|ami| ami.id() != other.id()));
    }
    let rebuilt = Ami::<X86_64>::builder("web")
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"another root"), 8))
        .build(&here, ami.owner())
        .unwrap();
    assert!(rebuilt.id() != ami.id() && rebuilt.digest() != ami.digest());
}

#[test]
fn an_image_has_the_architecture_it_was_built_with() {
    let any: AnyAmi = ami().into();
    assert_eq!(any, ami());
    assert_eq!(any.architecture(), Architecture::X86_64);
    assert_eq!(any.typed::<X86_64>().unwrap(), any);
    assert_eq!(any.typed::<ami_core::AnyArch>().unwrap(), any);
    let err = any.typed::<Arm64>().unwrap_err();
    assert_eq!(err.to_string(), format!("the architecture of {} is x86_64, not arm64", any.id()));
    assert!(Ami::<X86>::try_from(any.clone()).is_err());

    let json = serde_json::to_string(&any).unwrap();
    assert_eq!(serde_json::from_str::<Ami<X86_64>>(&json).unwrap(), any);
    assert!(serde_json::from_str::<Ami<Arm64>>(&json).unwrap_err().to_string().contains("not arm64"));
    for architecture in Architecture::ALL {
        let builder = AnyAmi::builder_for(architecture, "any").root_device("/dev/sda1");
        let builder = builder.block_device(BlockDeviceMapping::ebs("/dev/sda1", Digest::of(b"root"), 8));
        assert_eq!(builder.build_manifest().unwrap().architecture(), architecture);
    }
    let err = AnyAmi::builder("which").root_device("/dev/sda1").build_manifest().unwrap_err();
    assert_eq!(
        (err.kind(), err.to_string()),
        (ErrorKind::MissingParameter, "the image has no architecture".into())
    );
}

#[test]
fn an_image_that_is_read_is_what_it_says() {
    let image = serde_json::to_value(shared()).unwrap();
    let other = Digest::of(b"other");
    let cases = [
        ("/ami/id", json!("ami-0123456789abcdef0"), "the image is ami-"),
        ("/ami/region", json!("us-east-2"), "the image is ami-"),
        ("/ami/owner", json!(FRIEND), "the image is ami-"),
        ("/ami/name", json!("other"), "the image is ami-"),
        ("/ami/name", json!("w"), "is no name of an image"),
        ("/ami/digest", json!(other), "the manifest of ami-"),
        ("/ami/manifest/parent", json!(other), "the manifest of ami-"),
        ("/ami/manifest/rootDeviceName", json!("/dev/sdb"), "is not mapped"),
        ("/ami/created", json!("yesterday"), "is no time"),
        ("/ami/colour", json!("red"), "unknown field"),
        ("/colour", json!("red"), "unknown field"),
        ("/state", json!("gone"), "unknown variant"),
        ("/description", json!("x".repeat(256)), "more than 255 characters"),
        ("/tags", json!({"aws:x": "y"}), "which is reserved"),
        ("/launchPermissions/accounts", json!(["1"]), "is no account id"),
        ("/productCodes", json!([{"id": "", "kind": "marketplace"}]), "must be 1 to 255 bytes"),
    ];
    assert_eq!(serde_json::from_value::<Image>(image.clone()).unwrap(), shared());
    for (pointer, value, text) in cases {
        let mut changed = image.clone();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let Some(Value::Object(map)) = changed.pointer_mut(parent) else { panic!("{pointer}") };
        map.insert(key.to_owned(), value);
        let err = serde_json::from_value::<Image>(changed).expect_err(pointer);
        assert!(err.to_string().contains(text), "{pointer}: {err}: not {text:?}");
    }
}

#[test]
fn states_follow_the_table() {
    use ImageState::*;
    let allowed: &[(ImageState, &[ImageState])] = &[
        (Pending, &[Available, Transient, Failed, Error, Invalid, Deregistered]),
        (Transient, &[Pending, Available, Failed, Error, Invalid, Deregistered]),
        (Available, &[Disabled, Invalid, Deregistered]),
        (Disabled, &[Available, Deregistered]),
        (Invalid, &[Deregistered]),
        (Failed, &[Deregistered]),
        (Error, &[Deregistered]),
        (Deregistered, &[]),
    ];
    assert_eq!(allowed.len(), ImageState::ALL.len());
    for (from, next) in allowed {
        for to in ImageState::ALL {
            assert_eq!(from.can_become(*to), next.contains(to), "{from} to {to}");
        }
    }
    let mut image = Image::pending(ami());
    assert_eq!(image.set_state(Disabled).unwrap_err().code(), "IncorrectState");
    assert_eq!(image.state(), Pending);
    image.set_state(Available).unwrap();
}

#[test]
fn who_may_launch() {
    let public = || {
        let mut image = Image::new(ami());
        image.launch_permissions_mut().set_public(true);
        image
    };
    let disabled = || {
        let mut image = shared();
        image.set_state(ImageState::Disabled).unwrap();
        image
    };
    let (no, off) = (Some("AuthFailure"), Some("InvalidAMIID.Unavailable"));
    // Image; owner, friend, stranger.
    let cases = [
        (Image::new(ami()), [None, no, no]),
        (shared(), [None, None, no]),
        (public(), [None, None, None]),
        (Image::pending(ami()), [off, no, no]),
        (disabled(), [off, off, no]),
    ];
    for (image, expected) in cases {
        for (who, code) in [OWNER, FRIEND, STRANGER].into_iter().zip(expected) {
            assert_eq!(
                image.authorize(&account(who), Action::Launch).err().map(|err| err.code()),
                code,
                "{who}: {image:?}"
            );
            assert_eq!(image.may_launch(&account(who)), code.is_none());
        }
    }
    // A deprecated image launches all the same.
    let mut old = shared();
    old.set_deprecation(Some(Timestamp::MIN));
    assert!(old.is_deprecated(Timestamp::now()) && old.may_launch(&account(FRIEND)));
}

#[test]
fn categories_follow_the_table() {
    use Category::{Community, Marketplace, MyAmis, QuickStart, Shared};
    let (amazon, seller) = (Some(OwnerAlias::Amazon), Some(OwnerAlias::AwsMarketplace));
    // Alias, public, shared with the friend; category for owner, friend, stranger.
    let cases = [
        (None, false, false, [Some(MyAmis), None, None]),
        (None, false, true, [Some(MyAmis), Some(Shared), None]),
        (None, true, false, [Some(MyAmis), Some(Community), Some(Community)]),
        (None, true, true, [Some(MyAmis), Some(Shared), Some(Community)]),
        (amazon, true, false, [Some(MyAmis), Some(QuickStart), Some(QuickStart)]),
        (amazon, false, true, [Some(MyAmis), Some(QuickStart), None]),
        (seller, true, false, [Some(MyAmis), Some(Marketplace), Some(Marketplace)]),
        (Some(OwnerAlias::AwsBackupVault), true, false, [Some(MyAmis), Some(Community), Some(Community)]),
    ];
    for (alias, public, shared, expected) in cases {
        let mut image = Image::new(ami());
        image.set_owner_alias(alias);
        image.launch_permissions_mut().set_public(public);
        if shared {
            image.launch_permissions_mut().add(account(FRIEND));
        }
        let found = [OWNER, FRIEND, STRANGER].map(|who| image.category(&account(who)));
        assert_eq!(found, expected, "{alias:?}, public {public}, shared {shared}");
        image.set_state(ImageState::Disabled).unwrap();
        let found = [OWNER, FRIEND, STRANGER].map(|who| image.category(&account(who)));
        assert_eq!(found, [Some(MyAmis), None, None], "a disabled image is its owner's alone to see");
    }
}

#[test]
fn a_copy_keeps_the_content_and_not_the_permissions() {
    let mut image = shared();
    image.tags_mut().insert("stage", "production").unwrap();
    image.set_description("described").unwrap();
    let there = region("eu-west-1");
    let before = loop {
        let now = Timestamp::now();
        if now > image.ami().created() {
            break now;
        }
    };
    let copy = image.copy_to(&account(FRIEND), &there, "mine").unwrap();
    assert!((before..=Timestamp::now()).contains(&copy.ami().created()), "it was made when it was copied");
    assert_eq!(
        (copy.ami().owner(), copy.ami().region(), copy.ami().name()),
        (&account(FRIEND), &there, "mine")
    );
    assert_eq!((copy.ami().digest(), copy.state()), (image.ami().digest(), ImageState::Pending));
    assert_eq!((copy.description(), copy.tags().len()), ("described", 0));
    assert_eq!(
        (copy.launch_permissions().is_public(), copy.launch_permissions().accounts().len()),
        (false, 0)
    );

    let code = |who, name| image.copy_to(&account(who), &there, name).unwrap_err().code();
    assert_eq!(code(STRANGER, "mine"), "AuthFailure");
    assert_eq!(code(FRIEND, "m"), "InvalidAMIName.Malformed");
    image.add_product_code(ProductCode { id: "p".into(), kind: ProductCodeKind::Marketplace }).unwrap();
    assert_eq!(image.copy_to(&account(FRIEND), &there, "mine").unwrap_err().code(), "AuthFailure");
    let own = image.copy_to(&account(OWNER), &there, "mine").unwrap();
    assert_eq!(own.product_codes().len(), 1, "a product code goes along");
}

#[test]
fn tags_and_descriptions_have_limits() {
    let long = |n: usize| "é".repeat(n);
    let cases = [
        ("key".into(), String::new(), None),
        (long(128), long(256), None),
        (String::new(), "v".into(), Some("InvalidTagKey.Malformed")),
        (long(129), "v".into(), Some("InvalidTagKey.Malformed")),
        ("aws:x".into(), "v".into(), Some("InvalidTagKey.Malformed")),
        ("AWS:x".into(), "v".into(), Some("InvalidTagKey.Malformed")),
        ("aws".into(), "v".into(), None),
        ("awsé".into(), "v".into(), None),
        ("key".into(), long(257), Some("InvalidParameterValue")),
    ];
    for (key, value, code) in cases {
        let result = Tags::new().insert(key.clone(), value);
        assert_eq!(result.err().map(|err| err.code()), code, "{key}");
    }
    let mut tags = Tags::new();
    (0..Tags::MAX).for_each(|n| assert_eq!(tags.insert(format!("key{n}"), "v").unwrap(), None));
    assert_eq!(tags.insert("one more", "v").unwrap_err().code(), "TagLimitExceeded");
    assert_eq!(tags.insert("key0", "w").unwrap().as_deref(), Some("v"), "a tag that is there can be set");
    assert_eq!(tags.remove("key1").as_deref(), Some("v"));
    tags.insert("one more", "v").unwrap();

    let mut image = Image::new(ami());
    image.set_description(long(255)).unwrap();
    assert_eq!(image.set_description(long(256)).unwrap_err().code(), "InvalidParameterValue");
    assert_eq!(image.description(), long(255));
}

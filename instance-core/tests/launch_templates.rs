//! Launch templates: their versions, what is launched from them, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{Ami, LaunchTemplateId, X86_64};
use common::{TestRegion, check, open, world};
use instance_core::{
    BlockDeviceMappingRequest, DescribeLaunchTemplateVersions, DescribeLaunchTemplates, DescribeTags,
    ErrorKind, Instance, LaunchSpec, LaunchTemplateRef, LaunchTemplateVersionSpec, MetadataOptions, Result,
    ShutdownBehavior, TemplateVersion,
};

const FRIEND: &str = "222222222222";

fn nano() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// All that a template can say.
fn full(ami: &Ami<X86_64>) -> LaunchSpec {
    let mut metadata = MetadataOptions::default();
    metadata.http_put_response_hop_limit = 7;
    nano()
        .image_id(ami.id())
        .user_data(vec![0, 159, 146, 150])
        .key_name("laptop")
        .tag("Name", "of the template")
        .tag("stage", "test")
        .volume_tag("Name", "disk")
        .block_device(BlockDeviceMappingRequest::new("/dev/sdf").size_gib(3))
        .shutdown_behavior(ShutdownBehavior::Terminate)
        .termination_protection(true)
        .stop_protection(true)
        .metadata_options(metadata)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, code: &str) {
    check(&result.unwrap_err(), kind, code, &[]);
}

const NO_ID: (ErrorKind, &str) = (ErrorKind::LaunchTemplateNotFound, "InvalidLaunchTemplateId.NotFound");
const NO_NAME: (ErrorKind, &str) =
    (ErrorKind::LaunchTemplateNotFound, "InvalidLaunchTemplateName.NotFoundException");
const NO_VERSION: (ErrorKind, &str) =
    (ErrorKind::LaunchTemplateVersionNotFound, "InvalidLaunchTemplateId.VersionNotFound");

fn one(region: &TestRegion, version: impl Into<TemplateVersion>, overrides: LaunchSpec) -> Instance {
    let mut made = region.launch_from_template("web", version, overrides).unwrap().instances;
    assert_eq!(made.len(), 1);
    made.remove(0)
}

#[test]
fn what_a_template_says_is_launched_and_an_override_takes_its_place() {
    let (dir, region, ami) = world();
    region.create_launch_template("web", full(&ami)).unwrap();
    drop(region);
    let region = open(dir.path()); // what is stored is all that was said
    let kept = region.describe_launch_template_versions(&DescribeLaunchTemplateVersions::of("web")).unwrap();
    assert_eq!(kept.items[0].data, full(&ami));

    let as_said = one(&region, TemplateVersion::Default, LaunchSpec::default());
    let told = as_said.describe();
    assert_eq!(as_said.user_data().as_deref(), Some(&[0, 159, 146, 150][..]));
    assert_eq!((told.image_id, told.key_name.as_deref()), (ami.id(), Some("laptop")));
    assert_eq!((told.tags["Name"].as_str(), told.tags["stage"].as_str()), ("of the template", "test"));
    assert_eq!(told.shutdown_behavior, ShutdownBehavior::Terminate);
    assert!(told.termination_protection && told.stop_protection);
    assert_eq!(told.metadata_options.http_put_response_hop_limit, 7);
    let size = |instance: &Instance| {
        let volume = instance.describe().attachments[1].volume_id;
        let found = region.describe_volumes(&instance_core::Describe::new().id(volume)).unwrap();
        (found.items[0].size_gib, found.items[0].tags.get("Name").map(ToOwned::to_owned))
    };
    assert_eq!(size(&as_said), (3, Some("disk".to_owned())));

    let overrides = LaunchSpec::new("t2.micro".parse().unwrap())
        .user_data("other")
        .key_name("desk")
        .tag("Name", "mine")
        .block_device(BlockDeviceMappingRequest::new("/dev/sdf").size_gib(2))
        .shutdown_behavior(ShutdownBehavior::Stop)
        .termination_protection(false)
        .stop_protection(false)
        .metadata_options(MetadataOptions::default());
    let changed = one(&region, 1, overrides);
    let told = changed.describe();
    assert_eq!((told.instance_type.name(), told.key_name.as_deref()), ("t2.micro", Some("desk")));
    assert_eq!(told.tags.iter().collect::<Vec<_>>(), [(&"Name".to_owned(), &"mine".to_owned())]);
    assert_eq!(changed.user_data().as_deref(), Some(&b"other"[..]));
    assert_eq!(told.shutdown_behavior, ShutdownBehavior::Stop);
    assert!(!told.termination_protection && !told.stop_protection);
    assert_eq!(told.metadata_options, MetadataOptions::default());
    assert_eq!(size(&changed), (2, Some("disk".to_owned())), "what is not overridden is the template's");
}

#[test]
fn versions_are_numbered_once_and_the_default_one_stays() {
    let (dir, region, ami) = world();
    let template = region.create_launch_template("web", nano().image_id(ami.id())).unwrap();
    assert_eq!((template.default_version, template.latest_version), (1, 1));
    let of = |name: &str| LaunchSpec::new(name.parse().unwrap());
    let plain = region.create_launch_template_version("web", of("t2.micro")).unwrap();
    assert_eq!((plain.version, plain.is_default, plain.data.image_id), (2, false, None));
    let child = LaunchTemplateVersionSpec::new(of("t2.small")).source(1.into()).description("of the first");
    let child = region.create_launch_template_version(template.id, child).unwrap();
    assert_eq!(
        (child.version, child.data.image_id, &*child.description),
        (3, Some(ami.id()), "of the first")
    );

    let hardware = |version: TemplateVersion| {
        let launched = one(&region, version, LaunchSpec::default().image_id(ami.id()));
        launched.describe().instance_type.name().to_owned()
    };
    assert_eq!(hardware(TemplateVersion::Default), "t2.nano");
    assert_eq!(hardware(TemplateVersion::Latest), "t2.small");
    assert_eq!(hardware(2.into()), "t2.micro");
    assert_eq!(region.modify_launch_template("web", 2).unwrap().default_version, 2);
    assert_eq!(hardware(TemplateVersion::Default), "t2.micro");
    refused(region.modify_launch_template("web", 4), NO_VERSION.0, NO_VERSION.1);

    let gone = region.delete_launch_template_versions("web", &[3, 2, 9, 3]).unwrap();
    let codes: Vec<_> = gone.iter().map(|(n, done)| (*n, done.as_ref().err().map(|e| e.code()))).collect();
    let (default, missing) = (Some("OperationNotPermitted"), Some(NO_VERSION.1));
    assert_eq!(codes, [(3, None), (2, default), (9, missing), (3, missing)]);
    let told = region.launch_template("web").unwrap();
    assert_eq!((told.default_version, told.latest_version), (2, 2));
    drop(region);
    let region = open(dir.path());
    assert_eq!(region.create_launch_template_version("web", nano()).unwrap().version, 4);
    let left = region.describe_launch_template_versions(&DescribeLaunchTemplateVersions::of("web")).unwrap();
    let left: Vec<(u64, bool)> = left.items.iter().map(|v| (v.version, v.is_default)).collect();
    assert_eq!(left, [(1, false), (2, true), (4, false)]);

    let deleted = region.delete_launch_template(template.id).unwrap();
    assert_eq!(deleted.id, template.id);
    refused(region.launch_template("web"), NO_NAME.0, NO_NAME.1);
    // The next one of that name begins anew.
    assert_ne!(region.create_launch_template("web", nano()).unwrap().id, template.id);
    let versions = DescribeLaunchTemplateVersions::of("web");
    assert_eq!(region.describe_launch_template_versions(&versions).unwrap().items.len(), 1);
}

#[test]
fn templates_are_described_in_pages_and_by_filters() {
    let (_dir, region, ami) = world();
    for n in 1..=5 {
        let template = region.create_launch_template(&format!("web-{n}"), nano().image_id(ami.id())).unwrap();
        region.create_tags(&[template.id.into()], &[("n", &n.to_string())]).unwrap();
        region.create_launch_template_version(template.id, nano()).unwrap();
    }
    region.modify_launch_template("web-2", 2).unwrap();
    let mut seen = Vec::new();
    let mut request = DescribeLaunchTemplates::new().filter("launch-template-name", ["web-*"]).max_results(2);
    loop {
        let page = region.describe_launch_templates(&request).unwrap();
        assert!(page.items.len() <= 2);
        seen.extend(page.items.into_iter().map(|t| t.name));
        match page.next_token {
            Some(token) => request = request.next_token(token),
            None => break,
        }
    }
    seen.sort();
    assert_eq!(seen, ["web-1", "web-2", "web-3", "web-4", "web-5"]);
    let by_tag = DescribeLaunchTemplates::new().filter("tag:n", ["4"]);
    assert_eq!(region.describe_launch_templates(&by_tag).unwrap().items[0].name, "web-4");
    let tags = DescribeTags::new().filter("resource-type", ["launch-template"]);
    assert_eq!(region.describe_tags(&tags).unwrap().items.len(), 5);

    let all = |request: DescribeLaunchTemplateVersions| {
        region.describe_launch_template_versions(&request).unwrap().items
    };
    let latest = all(DescribeLaunchTemplateVersions::of_all(TemplateVersion::Latest));
    assert_eq!(latest.iter().map(|v| v.version).collect::<Vec<_>>(), [2; 5]);
    let with_image = DescribeLaunchTemplateVersions::of_all(TemplateVersion::Default)
        .filter("image-id", [ami.id().to_string()]);
    assert_eq!(all(with_image).len(), 4, "the default version of one names none");
    let both = DescribeLaunchTemplateVersions::of("web-2").version(1).version(TemplateVersion::Default);
    assert_eq!(
        all(both).iter().map(|v| (v.version, v.is_default)).collect::<Vec<_>>(),
        [(1, false), (2, true)]
    );
    let first = DescribeLaunchTemplateVersions::of("web-1").max_version(1);
    assert_eq!(all(first).len(), 1);
    let page = DescribeLaunchTemplateVersions::of("web-1").max_results(1);
    let first = region.describe_launch_template_versions(&page).unwrap();
    let second =
        region.describe_launch_template_versions(&page.next_token(first.next_token.unwrap())).unwrap();
    assert_eq!((first.items[0].version, second.items[0].version, second.next_token), (1, 2, None));
}

#[test]
fn a_launch_with_a_token_happens_once_whatever_becomes_of_the_template() {
    let (dir, region, ami) = world();
    region.create_launch_template("web", nano().image_id(ami.id())).unwrap();
    let token = || LaunchSpec::default().client_token("once");
    let first = one(&region, TemplateVersion::Latest, token());
    region.create_launch_template_version("web", LaunchSpec::new("t2.micro".parse().unwrap())).unwrap();
    assert_eq!(one(&region, TemplateVersion::Latest, token()).id(), first.id());
    let id = first.id();
    drop((first, region));
    let region = open(dir.path());
    assert_eq!(one(&region, TemplateVersion::Latest, token()).id(), id);
    let changed = region.launch_from_template("web", TemplateVersion::Latest, token().key_name("other"));
    refused(changed, ErrorKind::IdempotentParameterMismatch, "IdempotentParameterMismatch");

    // By its name and by its id, in this process and in the next, and where another has the name.
    let template = region.delete_launch_template("web").unwrap().id;
    let again = |region: &TestRegion| {
        assert_eq!(one(region, TemplateVersion::Latest, token()).id(), id);
        let by_id = region.launch_from_template(template, TemplateVersion::Latest, token()).unwrap();
        assert_eq!(by_id.instances[0].id(), id);
        let changed = region.launch_from_template("web", TemplateVersion::Latest, token().key_name("other"));
        refused(changed, ErrorKind::IdempotentParameterMismatch, "IdempotentParameterMismatch");
        assert_eq!(region.instances().len(), 1);
    };
    again(&region);
    drop(region);
    let region = open(dir.path());
    again(&region);
    let unknown = region.launch_from_template("web", 1, LaunchSpec::default().client_token("twice"));
    refused(unknown, NO_NAME.0, NO_NAME.1);
    let unknown = region.launch_from_template(template, 1, LaunchSpec::default().client_token("twice"));
    refused(unknown, NO_ID.0, NO_ID.1);
    region.create_launch_template("web", nano().image_id(ami.id())).unwrap();
    again(&region);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let (_dir, region, ami) = world();
    let malformed = (ErrorKind::MalformedLaunchTemplateName, "InvalidLaunchTemplateName.MalformedException");
    for name in ["", "ab", "a b c", "wéb", &"x".repeat(129)] {
        refused(region.create_launch_template(name, nano()), malformed.0, malformed.1);
    }
    for name in ["abc", "(a).-/_Z9", &"x".repeat(128)] {
        region.create_launch_template(name, nano()).unwrap();
    }
    let taken = (ErrorKind::LaunchTemplateNameDuplicate, "InvalidLaunchTemplateName.AlreadyExistsException");
    refused(region.create_launch_template("abc", nano()), taken.0, taken.1);

    let combination = (ErrorKind::InvalidParameterCombination, "InvalidParameterCombination");
    for data in [nano().count(1, 1), nano().client_token("x"), nano().dry_run(true)] {
        refused(region.create_launch_template("new", data.clone()), combination.0, combination.1);
        refused(region.create_launch_template_version("abc", data), combination.0, combination.1);
    }
    let sourced = LaunchTemplateVersionSpec::new(nano()).source(TemplateVersion::Latest);
    refused(region.create_launch_template("new", sourced), combination.0, combination.1);
    let value = (ErrorKind::InvalidParameter, "InvalidParameterValue");
    let long = LaunchTemplateVersionSpec::new(nano()).description("x".repeat(256));
    refused(region.create_launch_template("new", long), value.0, value.1);
    refused(region.create_launch_template("new", nano().user_data(vec![0; 16_385])), value.0, value.1);
    refused(region.create_launch_template("new", nano().key_name("")), value.0, value.1);
    let tagged = region.create_launch_template("new", nano().tag("aws:x", "y"));
    refused(tagged, ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed");
    let twice = BlockDeviceMappingRequest::new("/dev/sdf").size_gib(1);
    let twice = region.create_launch_template("new", nano().block_device(twice.clone()).block_device(twice));
    refused(twice, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping");
    refused(region.launch_template("new"), NO_NAME.0, NO_NAME.1);

    let nobody = LaunchTemplateRef::from(LaunchTemplateId::from_bytes([7; 16]));
    refused(region.launch_template(nobody.clone()), NO_ID.0, NO_ID.1);
    refused(region.launch_from_template("new", 1, nano()), NO_NAME.0, NO_NAME.1);
    refused(region.delete_launch_template(nobody), NO_ID.0, NO_ID.1);
    refused(region.launch_from_template("abc", 2, nano().image_id(ami.id())), NO_VERSION.0, NO_VERSION.1);
    let missing = (ErrorKind::MissingParameter, "MissingParameter");
    refused(region.launch_from_template("abc", 1, LaunchSpec::default()), missing.0, missing.1);
    refused(region.launch(&ami, LaunchSpec::default()), missing.0, missing.1);
    region.create_launch_template("no-type", LaunchSpec::default().image_id(ami.id())).unwrap();
    refused(region.launch_from_template("no-type", 1, LaunchSpec::default()), missing.0, missing.1);
    let other = region.copy_image(ami.id(), "other").unwrap();
    refused(region.launch(&ami, nano().image_id(other.id())), combination.0, combination.1);

    refused(region.delete_launch_template_versions("abc", &[]), missing.0, missing.1);
    refused(region.delete_launch_template_versions("abc", &[1; 201]), value.0, value.1);
    let numbers = DescribeLaunchTemplateVersions::of_all(1.into());
    refused(region.describe_launch_template_versions(&numbers), combination.0, combination.1);
    let both = DescribeLaunchTemplateVersions::of("abc").version(1).min_version(1).max_version(1);
    refused(region.describe_launch_template_versions(&both), combination.0, combination.1);
    let many = DescribeLaunchTemplateVersions::of("abc").max_results(201);
    refused(region.describe_launch_template_versions(&many), value.0, value.1);

    // Another account has templates of its own.
    let friend = region.as_account(FRIEND.parse().unwrap());
    refused(friend.launch_template("abc"), NO_NAME.0, NO_NAME.1);
    let id = region.launch_template("abc").unwrap().id;
    refused(friend.delete_launch_template(id), NO_ID.0, NO_ID.1);
    refused(friend.create_tags(&[id.into()], &[("a", "b")]), NO_ID.0, NO_ID.1);
    friend.create_launch_template("abc", nano().image_id(ami.id())).unwrap();
    let denied = friend.launch_from_template("abc", 1, LaunchSpec::default());
    refused(denied, ErrorKind::AuthFailure, "AuthFailure");
    assert_eq!(region.describe_launch_templates(&DescribeLaunchTemplates::new()).unwrap().items.len(), 4);
}

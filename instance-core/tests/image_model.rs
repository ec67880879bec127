//! What is known of images beside what they are: of what they were made, what they are made for, and ids that are not used
//! again.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{
    Ami, AmiId, Boot, BootMode, Catalog, CatalogExt, DescribeImages, Filter, Image, ImageState, ImdsSupport,
    ModifyImageAttribute, TpmSupport, X86_64,
};
use common::{TestRegion, check, disk, ext4, launch, open, register, world};
use instance_core::testing::tiny_elf;
use instance_core::{
    CopyImage, DirectBoot, ErrorKind, HttpTokens, ImageSource, LaunchSpec, MetadataOptions, VolumeSpec,
};
use storage_block::MemoryDisk;

/// The names of the images that fit, by pages of one.
fn found(region: &TestRegion, name: &str, value: impl ToString) -> Vec<String> {
    let (mut names, mut token) = (Vec::new(), None::<String>);
    loop {
        let filter = Filter::new(name, [value.to_string()]).unwrap();
        let mut request = DescribeImages::new().filter(filter).max_results(1);
        if let Some(token) = token {
            request = request.next_token(token);
        }
        let page = region.describe_images(&request).unwrap();
        names.extend(page.items.iter().map(|image| image.ami().name().to_owned()));
        token = page.next_token;
        if token.is_none() {
            names.sort();
            return names;
        }
    }
}

#[test]
fn an_image_says_of_what_it_was_made() {
    let (dir, region, base) = world();
    let server = launch(&region, &base).unwrap();
    let made = server.create_image("made").unwrap().ami;
    let again = server.create_image("again").unwrap().ami;
    let copy = region.copy_image(made.id(), "copy").unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
    let snapshot = region.create_snapshot(volume.id, "").unwrap();
    let boot = DirectBoot::new(tiny_elf(), None, "");
    let source = ImageSource::of_snapshot(snapshot.id).boot(boot);
    region.register_image(Ami::<X86_64>::builder("of-a-snapshot"), source).unwrap();

    let says = |region: &TestRegion| {
        let image = region.image(made.id()).unwrap();
        let source = image.source_image().unwrap();
        assert_eq!((source.id, &source.region), (base.id(), region.name()));
        assert_eq!(image.source_instance(), Some(server.id()));
        assert_eq!(found(region, "source-instance-id", server.id()), ["again", "made"]);
        assert_eq!(found(region, "source-image-id", base.id()), ["again", "made"]);
        // A copy is one of the image, and of no instance.
        assert_eq!(found(region, "source-image-id", made.id()), ["copy"]);
        assert_eq!(region.image(copy.id()).unwrap().source_instance(), None);
        assert_eq!(found(region, "block-device-mapping.snapshot-id", snapshot.id), ["of-a-snapshot"]);
        assert_eq!(found(region, "block-device-mapping.snapshot-id", "snap-*"), ["of-a-snapshot"]);
        assert_eq!(found(region, "image-type", "machine").len(), 5);
        assert_eq!(found(region, "manifest-location", format!("{}/ma*", region.account())), ["made"]);
    };
    says(&region);
    // What else is changed of it leaves that as it is.
    let change = ModifyImageAttribute::new().description("changed");
    region.modify_image_attribute(made.id(), &change).unwrap();
    region.create_tags(&[made.id().into()], &[("stage", "test")]).unwrap();
    says(&region);
    drop(server.clone());
    let id = server.id();
    drop((server, region));
    let region = open(dir.path());
    assert_eq!(region.image(made.id()).unwrap().source_instance(), Some(id));
    assert_eq!(found(&region, "block-device-mapping.snapshot-id", snapshot.id), ["of-a-snapshot"]);
    // An image of what came of it, also once it is gone itself.
    let next = launch(&region, &made.typed::<X86_64>().unwrap()).unwrap();
    region.deregister_image(made.id()).unwrap();
    let image = region.image(next.create_image("next").unwrap().ami.id()).unwrap();
    assert_eq!((image.source_image().unwrap().id, image.source_instance()), (made.id(), Some(next.id())));
    assert_eq!(again.manifest().parent(), Some(&base.digest()));
}

#[test]
fn support_for_the_metadata_service_is_kept_and_goes_with_the_content() {
    let (dir, region, base) = world();
    let content = disk(1, 9);
    let boot = || DirectBoot::new(tiny_elf(), None, "");
    let source = ImageSource::new(&content).boot(boot()).imds_support(ImdsSupport::V2_0);
    let new = region.register_image(Ami::<X86_64>::builder("new"), source).unwrap();
    let server = launch(&region, &new).unwrap();
    region.create_tags(&[new.id().into()], &[("stage", "test")]).unwrap();
    server.create_image("made").unwrap();
    region.deregister_image(new.id()).unwrap();
    server.create_image("made-later").unwrap();
    assert_eq!(found(&region, "imds-support", "v2.0"), ["made", "made-later"]);

    let change = ModifyImageAttribute::new().imds_support(ImdsSupport::V2_0);
    assert_eq!(region.image(base.id()).unwrap().imds_support(), None);
    region.modify_image_attribute(base.id(), &change).unwrap();
    region.copy_image(base.id(), "copy").unwrap();
    let other = open(&dir.path().join("other"));
    let far = other.copy_image_from(&region, base.id(), CopyImage::new("far")).unwrap();
    assert_eq!(other.image(far.id()).unwrap().imds_support(), Some(ImdsSupport::V2_0));
    drop((server, region));
    let region = open(dir.path());
    assert_eq!(found(&region, "imds-support", "v2.0"), ["base", "copy", "made", "made-later"]);

    // Tokens are asked for unless the launch says otherwise, as in EC2.
    let tokens =
        |spec: LaunchSpec| region.launch(&base, spec).unwrap().describe().metadata_options.http_tokens;
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    assert_eq!(tokens(spec()), HttpTokens::Required);
    let mut options = MetadataOptions::default();
    options.http_tokens = HttpTokens::Optional;
    assert_eq!(tokens(spec().metadata_options(options)), HttpTokens::Optional);
}

#[test]
fn an_image_that_is_made_for_a_tpm_is_kept_and_not_launched() {
    let Some(bytes) = ext4(&[("boot/vmlinuz-6", &tiny_elf())]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let region = open(&dir.path().join("here"));
    let content = MemoryDisk::from_vec(bytes).unwrap().into_disk();
    let builder = |name: &str| Ami::<X86_64>::builder(name).boot(Boot::root_volume().mode(BootMode::Uefi));
    let register = |builder| region.register_image(builder, ImageSource::new(&content));
    let plain = register(builder("plain")).unwrap();
    let vault = register(builder("vault").tpm_support(TpmSupport::V2_0)).unwrap();
    assert_ne!(plain.digest(), vault.digest(), "it is a part of what an image is");
    launch(&region, &plain).unwrap();
    let refused = launch(&region, &vault).unwrap_err();
    check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", &["a TPM v2.0", "no instance here has"]);
    let dry = LaunchSpec::new("t2.nano".parse().unwrap()).dry_run(true);
    assert_eq!(region.launch(&vault, dry).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(region.instances().len(), 1);
    region.copy_image(vault.id(), "copy").unwrap();
    assert_eq!(found(&region, "tpm-support", "v2.0"), ["copy", "vault"]);
    drop(region);
    let region = open(&dir.path().join("here"));
    assert_eq!(found(&region, "tpm-support", "*"), ["copy", "vault"]);

    // It is found by UEFI: what passes no firmware, or another, has none.
    let source = ImageSource::new(&content).boot(DirectBoot::new(tiny_elf(), None, ""));
    for (name, builder, source) in [
        ("legacy", Ami::<X86_64>::builder("legacy"), ImageSource::new(&content)),
        ("direct", builder("direct"), source),
    ] {
        let refused = region.register_image(builder.tpm_support(TpmSupport::V2_0), source).unwrap_err();
        assert_eq!(refused.code(), "InvalidParameterCombination", "{name}: {refused}");
    }
}

/// Whoever kept the id of an image that is gone finds no other by it, whichever way that would come.
#[test]
fn an_image_that_is_gone_is_not_put_back() {
    let (dir, region, base) = world();
    let image = |region: &TestRegion, id: AmiId| region.catalog().get(&id).unwrap();
    let put = |region: &TestRegion, image: &Image| region.catalog().put(image.clone());
    let refused = |region: &TestRegion, image: &Image| {
        let refused = put(region, image).unwrap_err();
        assert_eq!(refused.kind(), ami_core::ErrorKind::DuplicateName, "{refused}");
        assert!(region.catalog().get(&image.id()).is_err(), "and it is not there");
    };
    let first = image(&region, base.id());
    let server = launch(&region, &base).unwrap();
    region.deregister_image(base.id()).unwrap();
    refused(&region, &first);
    server.terminate().unwrap();
    refused(&region, &first);
    drop((server, region));
    let region = open(dir.path());
    refused(&region, &first);

    // The same after it is another image, and registering takes the next id as well.
    let second = first.clone().with_incarnation(1);
    put(&region, &second).unwrap();
    assert_eq!(image(&region, second.id()), second);
    region.catalog().remove(&second.id()).unwrap();
    refused(&region, &second);
    let third = register(&region, "base", &disk(1, 7)).unwrap();
    assert_eq!((third.incarnation(), third.digest()), (2, base.digest()));
    refused(&region, &first);
    // Nor does a change bring one back.
    let gone = region.catalog().update(&first, first.clone()).unwrap_err();
    assert_eq!(gone.kind(), ami_core::ErrorKind::NotFound);
    let mut next = first.clone();
    next.set_state(ImageState::Disabled).unwrap();
    let changed = region.catalog().as_account(*region.account()).enable(&first.id()).unwrap_err();
    assert_eq!(changed.kind(), ami_core::ErrorKind::NotFound);
}

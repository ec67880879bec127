//! Files written once that must give the same digests and ids for ever.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::{
    Ami, Arm64, BlockDeviceMapping, Boot, BootMode, Digest, Image, ImageState, ImdsSupport, Manifest,
    OperatingSystem, Software, SourceImage, StateReason, TpmSupport, VolumeType, X86_64,
};

const SMALL: &[u8] = include_bytes!("golden/small.manifest.json");
const SMALL_DIGEST: &str = "sha256:28d9a70b56327366a0ac28f66f38e48841060093ed2a55c7711549982c6f4a20";
const FULL: &[u8] = include_bytes!("golden/full.manifest.json");
const FULL_DIGEST: &str = "sha256:3ae96a5de4bff4de348d66c13f80906be4e80126486e8a26bf99f057e3391dad";
const STORE: &[u8] = include_bytes!("golden/store.manifest.json");
const STORE_DIGEST: &str = "sha256:9c02dd46a5c495144713ce4ac5d80f93f1e005383e70cf8863b3a2edb02540b0";
const TPM: &[u8] = include_bytes!("golden/tpm.manifest.json");
const TPM_DIGEST: &str = "sha256:ee8e4e6f5ce18eac4aa7b53a7d82789882bcde1a1107b92b11290219da582edc";
const MADE: &[u8] = include_bytes!("golden/made.json");
const IMAGE: &[u8] = include_bytes!("golden/image.json");
const COPY: &[u8] = include_bytes!("golden/copy.json");
const AGAIN: &[u8] = include_bytes!("golden/again.json");
const AGAIN_ID: &str = "ami-5983270533b32483c";
const COPY_ID: &str = "ami-294517ac247000e61";
const IMAGE_ID: &str = "ami-56bcde7a68bbd0b45";

fn small() -> Manifest {
    Ami::<X86_64>::builder("small")
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
        .build_manifest()
        .unwrap()
}

/// What came later: a root device of instance store.
fn store() -> Manifest {
    Ami::<X86_64>::builder("store")
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::instance_store_root("/dev/xvda", Digest::of(b"root"), 8))
        .build_manifest()
        .unwrap()
}

/// What came later: a TPM, with the boot mode that it is found by.
fn tpm() -> Manifest {
    Ami::<X86_64>::builder("tpm")
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
        .boot(Boot::root_volume().mode(BootMode::Uefi))
        .tpm_support(TpmSupport::V2_0)
        .build_manifest()
        .unwrap()
}

/// Every field, every kind of device but that, and characters that JSON has to escape.
fn full() -> Manifest {
    Ami::<Arm64>::builder("full")
        .operating_system(OperatingSystem::linux("debian", "12"))
        .root_device("/dev/sda1")
        .block_device(BlockDeviceMapping::no_device("/dev/sdd"))
        .block_device(BlockDeviceMapping::ephemeral("/dev/sdc", "ephemeral0"))
        .block_device(BlockDeviceMapping::ebs("/dev/sda1", Digest::of(b"root"), 65_536).encrypted(true))
        .block_device(
            BlockDeviceMapping::blank("/dev/sdb", 125)
                .volume_type(VolumeType::St1)
                .delete_on_termination(false),
        )
        .boot(Boot::direct(Digest::of(b"kernel"), Some(Digest::of(b"initrd")), r#"quiet x="a\b" é €"#))
        .software(Software::new("openssh-server", "1:9.2p1-2+deb12u3"))
        .software(Software::new("nginx", ""))
        .parent(small().digest())
        .build_manifest()
        .unwrap()
}

#[test]
fn manifests_keep_their_bytes_and_digests() {
    for (golden, digest, built) in [
        (SMALL, SMALL_DIGEST, small()),
        (FULL, FULL_DIGEST, full()),
        (STORE, STORE_DIGEST, store()),
        (TPM, TPM_DIGEST, tpm()),
    ] {
        let read = Manifest::from_canonical_json(golden).unwrap();
        assert_eq!(read, built);
        assert_eq!(String::from_utf8(built.to_canonical_json()).unwrap(), String::from_utf8_lossy(golden));
        assert_eq!(read.digest().to_string(), digest);
        assert_eq!(Digest::of(golden).to_string(), digest, "the digest is that of the file");
    }
}

#[test]
fn an_image_keeps_its_id() {
    let image: Image = serde_json::from_slice(IMAGE).unwrap();
    assert_eq!(image.id().to_string(), IMAGE_ID);
    assert_eq!(image.ami().manifest(), &full());
    let again = image.ami().copy_to(image.ami().region(), image.ami().owner(), image.ami().name()).unwrap();
    assert_eq!(again.id().to_string(), IMAGE_ID, "the id is derived from what it always was");
    let rewritten = serde_json::to_value(&image).unwrap();
    assert_eq!(rewritten, serde_json::from_slice::<serde_json::Value>(IMAGE).unwrap());
}

#[test]
fn an_image_that_comes_after_others_keeps_its_id() {
    let (image, again): (Image, Image) =
        (serde_json::from_slice(IMAGE).unwrap(), serde_json::from_slice(AGAIN).unwrap());
    assert_eq!((again.id().to_string().as_str(), again.ami().incarnation()), (AGAIN_ID, 2));
    assert_eq!((again.ami().digest(), &again.with_incarnation(0)), (image.ami().digest(), &image));
    let rewritten = serde_json::to_value(image.with_incarnation(2)).unwrap();
    assert_eq!(rewritten, serde_json::from_slice::<serde_json::Value>(AGAIN).unwrap());
    let mut other = rewritten.clone();
    other["ami"]["incarnation"] = 1.into();
    assert!(serde_json::from_value::<Image>(other).is_err(), "it is a part of the id");
}

#[test]
fn a_copy_says_what_it_is_a_copy_of() {
    let copy: Image = serde_json::from_slice(COPY).unwrap();
    let image: Image = serde_json::from_slice(IMAGE).unwrap();
    let mut again = image.copy_to(image.ami().owner(), copy.ami().region(), copy.ami().name()).unwrap();
    again.set_state(ImageState::Available).unwrap();
    assert_eq!((copy.id().to_string().as_str(), &again), (COPY_ID, &copy));
    let source = copy.source_image().unwrap();
    assert_eq!((source.id.to_string().as_str(), &source.region), (IMAGE_ID, image.ami().region()));
    let rewritten = serde_json::to_value(&copy).unwrap();
    assert_eq!(rewritten, serde_json::from_slice::<serde_json::Value>(COPY).unwrap());
}

/// What came later of what is known of an image: of what it was made, which metadata it is made for, and why it is in its
/// state.
#[test]
fn an_image_of_an_instance_says_of_which() {
    let (made, mut image): (Image, Image) =
        (serde_json::from_slice(MADE).unwrap(), serde_json::from_slice(IMAGE).unwrap());
    let source =
        SourceImage { region: "us-east-1".parse().unwrap(), id: "ami-0123456789abcdef0".parse().unwrap() };
    image.set_source(Some(source), "i-0123456789abcdef0".parse().ok());
    image.set_snapshots(["snap-0123456789abcdef0".parse().unwrap()]);
    image.set_imds_support(ImdsSupport::V2_0);
    image.set_state_reason(Some(StateReason::new("Client.UserInitiated", "set aside")));
    assert_eq!(made, image);
    let rewritten = serde_json::to_value(&made).unwrap();
    assert_eq!(rewritten, serde_json::from_slice::<serde_json::Value>(MADE).unwrap());
}

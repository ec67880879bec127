//! The codes of EC2's that this crate's source gives to errors, each raised once by what earns it: most by a call of a
//! region, those of a network by one that refuses, and [some](RAISED_ELSEWHERE) by other tests.
//!
//! What passes through it may have more of them: those that `ami-core` gives to ids of other kinds than a region has are not
//! looked for here, nor are those that a network gives to its own calls.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::{BTreeSet, HashSet};
use std::fmt::Debug;
use std::time::Duration;

use ami_core::{
    AccountId, Ami, BlockDeviceMapping, CopyImageTaskId, CreateImageTaskId, DescribeImages,
    ExportImageTaskId, Grantee, ImportImageTaskId, InstanceId, LaunchTemplateId, MalformedId,
    ModifyImageAttribute, NetworkInterfaceId, ProductCode, ProductCodeKind, ResourceId, SecurityGroupId,
    SnapshotId, SubnetId, VolumeId, VolumeType, X86_64,
};
use common::{TestRegion, disk, register, soon};
use instance_core::machine::NetSpec;
use instance_core::network::{Guest, Network, NetworkPlacement, PlacementRequest};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, Capacity, DescribeImportImageTasks, DescribeInstances, DescribeVolumes,
    DirectBoot, Error, ErrorKind, ImageSource, InstanceType, LaunchSpec, ModifyVolume, RegionOptions, Result,
    TemplateVersion, VolumeSpec,
};

/// A network in which nothing can be had, each for its own reason.
#[derive(Debug)]
struct Refusing;

impl Network for Refusing {
    fn public_key(&self, name: &str) -> Result<String> {
        Err(Error::new(ErrorKind::KeyPairNotFound, format!("no key pair {name}")))
    }

    fn place(&self, _: InstanceId, request: &PlacementRequest) -> Result<NetworkPlacement> {
        let kind = match request {
            PlacementRequest { interface_id: Some(id), .. } if *id == gone("eni") => {
                ErrorKind::NetworkInterfaceNotFound
            }
            PlacementRequest { interface_id: Some(_), .. } => ErrorKind::NetworkInterfaceInUse,
            PlacementRequest { subnet_id: Some(_), .. } => ErrorKind::SubnetNotFound,
            PlacementRequest { private_ip: Some(address), .. } => match address.octets()[3] {
                1 => ErrorKind::VpcNotSpecified,
                2 => ErrorKind::SubnetNotSpecified,
                _ => ErrorKind::AddressInUse,
            },
            PlacementRequest { public_ip: Some(true), .. } => ErrorKind::InsufficientAddressCapacity,
            PlacementRequest { public_ip: Some(false), .. } => ErrorKind::AddressLimitExceeded,
            PlacementRequest { security_groups, .. } if !security_groups.is_empty() => {
                ErrorKind::SecurityGroupNotFound
            }
            _ => ErrorKind::SubnetFull,
        };
        Err(Error::new(kind, "refused"))
    }

    fn plug(&self, _: Guest<'_>) -> Result<NetSpec> {
        Err(Error::new(ErrorKind::Internal, "refused"))
    }

    fn update(&self, _: Guest<'_>) {}

    fn release(&self, _: &NetworkPlacement) -> Result<()> {
        Ok(())
    }

    fn keep_only(&self, _: &HashSet<NetworkInterfaceId>) -> Result<()> {
        Ok(())
    }
}

/// What has been raised.
#[derive(Default)]
struct Raised(BTreeSet<&'static str>);

impl Raised {
    #[track_caller]
    fn by<T: Debug>(&mut self, code: &'static str, result: Result<T>) {
        let error = result.unwrap_err();
        // Whoever matches on the kind need not look at the code, but for launch templates by their names.
        if !code.starts_with("InvalidLaunchTemplateName.") {
            assert_eq!(Error::new(error.kind(), "").code(), code, "{:?}", error.kind());
        }
        self.said(code, error.code());
    }

    #[track_caller]
    fn by_id<T: Debug>(&mut self, code: &'static str, parsed: Result<T, MalformedId>) {
        let malformed = parsed.unwrap_err();
        // It is the same when it goes through a call of this crate's, and has a kind of its own.
        let error = Error::from(malformed);
        assert_eq!(Error::new(error.kind(), "").code(), code, "{:?}", error.kind());
        self.said(code, error.code());
    }

    #[track_caller]
    fn said(&mut self, code: &'static str, said: &str) {
        assert_eq!(said, code);
        self.0.insert(code);
    }
}

fn nano() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn gone<T: std::str::FromStr>(prefix: &str) -> T
where
    T::Err: Debug,
{
    format!("{prefix}-0123456789abcdef0").parse().unwrap()
}

fn builder(name: &str) -> ami_core::AmiBuilder<X86_64> {
    Ami::<X86_64>::builder(name)
}

fn of_images(raised: &mut Raised, region: &TestRegion, friend: &TestRegion, ami: &Ami<X86_64>) {
    let raw = disk(1, 3);
    let with_kernel = || ImageSource::new(&raw).boot(DirectBoot::new(tiny_elf(), None, ""));
    let register = |name: &str, source| region.register_image(builder(name), source);
    raised.by("ImportFailed.UnsupportedDisk", register("new", ImageSource::new(&raw)));
    raised.by("InvalidAMIName.Duplicate", register("base", with_kernel()));
    raised.by("InvalidAMIName.Malformed", register("x", with_kernel()));
    raised.by("InvalidAMIID.NotFound", region.image(gone("ami")));
    raised.by("AuthFailure", friend.launch(ami, nano()));
    let refused = friend.launch(ami, nano().dry_run(true));
    raised.by("UnauthorizedOperation", refused);
    raised.by("DryRunOperation", region.launch(ami, nano().dry_run(true)));
    raised.by("IncorrectState", region.enable_image(ami.id()));
    let sold = register("sold", with_kernel()).unwrap();
    let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    let offer = ModifyImageAttribute::new().add_product_code(code).add_launch_permission(Grantee::All);
    region.modify_image_attribute(sold.id(), &offer).unwrap();
    raised.by("OptInRequired", friend.launch(&sold, nano()));
    let manifest = ami_core::Manifest::from_json(b"{}").map(drop).map_err(Error::from);
    raised.by("InvalidManifest", manifest);
    region.disable_image(ami.id()).unwrap();
    raised.by("InvalidAMIID.Unavailable", region.launch(ami, nano()));
    region.enable_image(ami.id()).unwrap();
    raised.by("InvalidNextToken", region.describe_images(&DescribeImages::new().next_token("x")));
    let unknown = ami_core::Digest::of(b"unknown");
    let unknown = builder("new").block_device(BlockDeviceMapping::ebs("/dev/sdf", unknown, 8));
    raised.by("InvalidSnapshot.NotFound", region.register_image(unknown, with_kernel()));
}

fn of_instances(raised: &mut Raised, region: &TestRegion, ami: &Ami<X86_64>) {
    raised.by("InvalidInstanceID.NotFound", region.instance(gone("i")));
    raised.by("InvalidParameterValue", region.launch(ami, nano().count(0, 0)));
    raised.by("InvalidParameterCombination", region.launch(ami, nano().count(1, 2)));
    raised.by("ResourceCountExceeded", region.run_instances(ami, nano().count(1, u32::MAX)));
    raised.by("MissingParameter", region.launch(ami, LaunchSpec::default()));
    raised.by("InvalidTagKey.Malformed", region.launch(ami, nano().tag("aws:x", "")));
    let many = (0..51).fold(nano(), |spec, n| spec.tag(n.to_string(), ""));
    raised.by("TagLimitExceeded", region.launch(ami, many));
    let device = nano().block_device(BlockDeviceMappingRequest::new("/dev/none").size_gib(1));
    raised.by("InvalidBlockDeviceMapping", region.launch(ami, device));
    let hidden = nano().block_device(BlockDeviceMappingRequest::new("/dev/sdg").size_gib(1).encrypted(true));
    raised.by("InvalidKMSKey.InvalidState", region.launch(ami, hidden));
    raised.by("UnsupportedOperation", region.launch(ami, nano().subnet(gone("subnet"))));
    let large = InstanceType::custom("large", 1.try_into().unwrap(), (1 << 30).try_into().unwrap());
    raised.by("InsufficientInstanceCapacity", region.launch(ami, LaunchSpec::new(large)));
    let once = region.launch(ami, nano().client_token("once").stop_protection(true)).unwrap();
    raised.by("IdempotentParameterMismatch", region.launch(ami, nano().client_token("once")));
    raised.by("OperationNotPermitted", once.terminate());
    once.set_stop_protection(false).unwrap();
    raised.by("UnsupportedHibernationConfiguration", once.hibernate(Duration::ZERO));
    once.stop(Duration::ZERO).unwrap();
    raised.by("IncorrectInstanceState", once.reboot());
    once.terminate().unwrap();
    let again = nano().client_token("once").stop_protection(true);
    raised.by("IdempotentInstanceTerminated", region.launch(ami, again));
}

fn of_volumes(raised: &mut Raised, region: &TestRegion, ami: &Ami<X86_64>) {
    raised.by("InvalidVolume.NotFound", region.delete_volume(gone("vol")));
    raised.by("InvalidSnapshot.NotFound", region.delete_snapshot(gone("snap")));
    let server = region.launch(ami, nano()).unwrap();
    let attached = server.describe().attachments[0].volume_id;
    raised.by("VolumeInUse", region.delete_volume(attached));
    let slow = ModifyVolume::new().size_gib(125).volume_type(VolumeType::St1);
    raised.by("BootForVolumeTypeUnsupported", region.modify_volume(attached, slow));
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let request = DescribeVolumes::new().id(volume);
    raised.by("InvalidVolumeModification.NotFound", region.describe_volumes_modifications(&request));
    let snapshot = region.create_snapshot(volume, "").unwrap().id;
    let source = ImageSource::of_snapshot(snapshot).boot(DirectBoot::new(tiny_elf(), None, ""));
    region.register_image(builder("of-a-snapshot"), source).unwrap();
    raised.by("InvalidSnapshot.InUse", region.delete_snapshot(snapshot));
    raised.by("InvalidID", "x-1".parse::<ResourceId>().map_err(Error::from));
    let account = "12".parse::<AccountId>().map_err(Error::from);
    raised.by("InvalidUserID.Malformed", account);
    let grantee = "12".parse::<Grantee>().map_err(Error::from);
    raised.by("InvalidAMIAttributeItemValue", grantee);
}

fn of_templates_and_tasks(raised: &mut Raised, region: &TestRegion, ami: &Ami<X86_64>) {
    let create = |name: &str| region.create_launch_template(name, nano());
    create("web").unwrap();
    raised.by("InvalidLaunchTemplateName.AlreadyExistsException", create("web"));
    raised.by("InvalidLaunchTemplateName.MalformedException", create("a b"));
    raised.by("InvalidLaunchTemplateName.NotFoundException", region.launch_template("none"));
    raised.by("InvalidLaunchTemplateId.NotFound", region.launch_template(gone::<LaunchTemplateId>("lt")));
    let none = region.launch_from_template("web", TemplateVersion::Number(2), nano());
    raised.by("InvalidLaunchTemplateId.VersionNotFound", none);
    let missing = DescribeImportImageTasks::new().id(gone("import-ami"));
    raised.by("InvalidConversionTaskId", region.describe_import_image_tasks(&missing));
    raised.by("InvalidExportTaskID.NotFound", region.export_image_task(gone("export-ami")));
    let wait = |_: &storage_block::Disk, tell: &mut instance_core::Tell<'_>| {
        while tell(0, 1).is_continue() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    let tasks: Vec<_> = (0..20).map(|_| region.export_image(ami.id(), "/dev/xvda", wait).unwrap()).collect();
    raised.by("ResourceLimitExceeded", region.export_image(ami.id(), "/dev/xvda", wait));
    for task in tasks {
        task.cancel().unwrap();
        task.watch().wait(soon(), |task| task.status.has_ended()).unwrap();
    }
}

fn of_ids(raised: &mut Raised) {
    raised.by_id("InvalidAMIID.Malformed", "x".parse::<ami_core::AmiId>());
    raised.by_id("InvalidInstanceID.Malformed", "x".parse::<InstanceId>());
    raised.by_id("InvalidReservationID.Malformed", "x".parse::<ami_core::ReservationId>());
    raised.by_id("InvalidVolumeID.Malformed", "x".parse::<VolumeId>());
    raised.by_id("InvalidSnapshotID.Malformed", "x".parse::<SnapshotId>());
    raised.by_id("InvalidSubnetID.Malformed", "x".parse::<SubnetId>());
    raised.by_id("InvalidLaunchTemplateId.Malformed", "x".parse::<LaunchTemplateId>());
    raised.by_id("InvalidConversionTaskId.Malformed", "x".parse::<ImportImageTaskId>());
    raised.by_id("InvalidConversionTaskId.Malformed", "x".parse::<CopyImageTaskId>());
    raised.by_id("InvalidConversionTaskId.Malformed", "x".parse::<CreateImageTaskId>());
    raised.by_id("InvalidExportTaskID.Malformed", "x".parse::<ExportImageTaskId>());
}

fn of_networks(raised: &mut Raised, dir: &std::path::Path) {
    let region = RegionOptions::new().network(Refusing).open(dir, FakeHypervisor::new()).unwrap();
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let launch = |spec| region.launch(&ami, spec);
    raised.by("InvalidKeyPair.NotFound", launch(nano().key_name("none")));
    raised.by("InvalidSubnetID.NotFound", launch(nano().subnet(gone::<SubnetId>("subnet"))));
    raised.by("InvalidGroup.NotFound", launch(nano().security_group(gone::<SecurityGroupId>("sg"))));
    raised.by("VPCIdNotSpecified", launch(nano().private_ip([10, 0, 0, 1].into())));
    raised.by("MissingInput", launch(nano().private_ip([10, 0, 0, 2].into())));
    raised.by("InvalidIPAddress.InUse", launch(nano().private_ip([10, 0, 0, 9].into())));
    raised.by("InsufficientAddressCapacity", launch(nano().associate_public_ip_address(true)));
    raised.by("AddressLimitExceeded", launch(nano().associate_public_ip_address(false)));
    raised.by("InsufficientFreeAddressesInSubnet", launch(nano()));
    let interface = |id| launch(nano().network_interface(id));
    raised.by("InvalidNetworkInterfaceID.NotFound", interface(gone("eni")));
    raised.by("InvalidNetworkInterface.InUse", interface("eni-00000000000000001".parse().unwrap()));
    let two = nano().network_interface(gone("eni")).network_interface(gone("eni"));
    raised.by("AttachmentLimitExceeded", launch(two));
    assert!(region.instances().is_empty());
}

#[test]
fn every_code_is_raised_by_a_call_that_earns_it() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = FakeHypervisor::new();
    let path = dir.path().join("region");
    let capacity = Capacity::new(64, 1 << 20);
    let region = RegionOptions::new().capacity(capacity).open(&path, hypervisor.clone()).unwrap();
    let friend = region.as_account("222222222222".parse().unwrap());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let mut raised = Raised::default();
    of_images(&mut raised, &region, &friend, &ami);
    of_instances(&mut raised, &region, &ami);
    of_volumes(&mut raised, &region, &ami);
    of_templates_and_tasks(&mut raised, &region, &ami);
    of_ids(&mut raised);
    of_networks(&mut raised, &dir.path().join("networked"));
    raised.by("ResourceInUse", common::try_open(&path));
    hypervisor.fail_next_create();
    raised.by("InternalError", region.launch(&ami, nano()));
    let pages = DescribeInstances::new().max_results(1);
    raised.by("InvalidParameterValue", region.describe_instances(&pages));
    let many = || vec!["*"; ami_core::Filter::MAX_VALUES + 1];
    let images = ami_core::Filter::new("name", many()).map_err(Error::from);
    raised.by("FilterLimitExceeded", images);
    let instances = DescribeInstances::new().filter("instance-type", many());
    raised.by("FilterLimitExceeded", region.describe_instances(&instances));

    let is_missed = |code: &&str| !raised.0.contains(code) && !RAISED_ELSEWHERE.contains(code);
    let missed: Vec<&str> = codes().into_iter().filter(is_missed).collect();
    assert_eq!(missed, [""; 0]);
}

/// Codes whose tests are elsewhere, with what is theirs alone.
const RAISED_ELSEWHERE: &[&str] = &[
    // It takes thousands of records to reach these: `launch_template/tests.rs`.
    "MaxTemplateLimitExceeded",
    "MaxTemplateVersionLimitExceeded",
    // As many snapshots are pending at once: `snapshots/pending.rs`.
    "PendingSnapshotLimitExceeded",
    // It takes a file system that is full: `tests/full_disk.rs`.
    "InsufficientVolumeCapacity",
];

/// All codes that this crate's source gives to errors, so that none is added without being raised here.
fn codes() -> BTreeSet<&'static str> {
    let kinds = include_str!("../src/error.rs");
    let (begin, end) = (kinds.find("pub fn code(").unwrap(), kinds.find("pub(crate) fn io(").unwrap());
    let quoted = |text: &'static str| text.split('"').skip(1).step_by(2);
    let mut all: BTreeSet<&str> = quoted(&kinds[begin..end]).collect();
    let templates = include_str!("../src/launch_template/mod.rs");
    all.extend(templates.split("with_code(\"").skip(1).filter_map(|rest| rest.split('"').next()));
    assert!(all.len() > 40, "{all:?}");
    all
}

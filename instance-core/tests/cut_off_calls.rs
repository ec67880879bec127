//! Every call that commits, cut off before and after each of its commits: the region is then opened, and all that it tells
//! is what it told before the call, or what it tells after it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/crashes.rs"]
mod crashes;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::time::Duration;

use ami_core::{
    Ami, AnyAmi, Catalog, Grantee, Image, ModifyImageAttribute, ProductCode, ProductCodeKind, ResourceId,
    VolumeType, X86_64,
};
use common::{TestRegion, ask, disk, register, soon};
use crashes::{Shared, open};
use instance_core::testing::tiny_elf;
use instance_core::{
    BlockDeviceMappingRequest, CopyImage, CreateSnapshots, DescribeCopyImageTasks, DescribeCreateImageTasks,
    DescribeExportImageTasks, DescribeImportImageTasks, DescribeLaunchTemplateVersions,
    DescribeLaunchTemplates, DescribeSnapshots, DescribeTags, DescribeVolumes, DirectBoot, Instance,
    InstanceState, LaunchSpec, MetadataOptions, ModifyVolume, Reservation, ShutdownBehavior, SnapshotState,
    TaskDescription, TaskStatus, TemplateVersion, VolumeDescription, VolumeSpec,
};
use storage_block::{Store, Volume};

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// The launch with this client token.
fn with_token(region: &TestRegion, ami: &Ami<X86_64>, token: &str) -> instance_core::Result<Reservation> {
    let spec = spec().client_token(token).count(2, 2);
    match token {
        "by template" => region.launch_from_template("often", TemplateVersion::Latest, spec),
        _ => region.run_instances(ami, spec),
    }
}

/// Everything that a region tells, in words that do not depend on whether a machine was lost. What was launched of this image
/// with a token is asked for again.
fn told(region: &TestRegion, ami: Option<&Ami<X86_64>>) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for image in region.images().unwrap() {
        let (id, state, shared) = (image.id(), image.state(), image.launch_permissions().is_public());
        let (description, old) = (image.description(), image.deprecation());
        let name = image.ami().name();
        let codes: Vec<_> = image.product_codes().collect();
        all.insert(format!("image {id} {name} {description:?} is {state}, shared: {shared}, until {old:?}"));
        all.insert(format!("image {id} is of {codes:?}"));
    }
    for instance in region.instances() {
        let told = instance.describe();
        let terminated = told.state == InstanceState::Terminated;
        let protected = (told.termination_protection, told.stop_protection);
        let (hardware, data) = (told.instance_type.name(), instance.user_data());
        let is = format!("terminated: {terminated}, protected: {protected:?}, {hardware}, {data:?}");
        all.insert(format!("{} {is}, {:?}", told.id, told.attachments));
        let offers = (told.shutdown_behavior, told.metadata_options);
        all.insert(format!("{} offers {offers:?}, {:?}", told.id, told.product_codes));
        if let Some((token, ami)) = told.client_token.as_deref().zip(ami) {
            let again = with_token(region, ami, token).unwrap().instances;
            let again: Vec<_> = again.iter().map(Instance::id).collect();
            all.insert(format!("{token} has launched {again:?}"));
        }
    }
    for volume in region.describe_volumes(&DescribeVolumes::new()).unwrap().items {
        let at = volume.attachment.map(|a| (a.instance_id, a.device_name, a.delete_on_termination));
        let VolumeDescription { id, volume_type, size_gib, product_codes, .. } = volume;
        all.insert(format!("{id} {volume_type} of {size_gib} GiB and {product_codes:?} at {at:?}"));
    }
    let snapshots = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items;
    // That one has come to nothing is told as well, as of tasks.
    let (snapshots, failed): (Vec<_>, Vec<_>) =
        snapshots.into_iter().partition(|one| one.state == SnapshotState::Completed);
    let has_failed = |id: ResourceId| failed.iter().any(|one| ResourceId::from(one.id) == id);
    for snapshot in snapshots {
        all.insert(format!("{} of {}", snapshot.id, snapshot.volume_id));
    }
    let tags = region.describe_tags(&DescribeTags::new()).unwrap().items;
    for tag in tags.into_iter().filter(|tag| !has_failed(tag.resource_id)) {
        all.insert(format!("{} has {}={}", tag.resource_id, tag.key, tag.value));
    }
    for template in region.describe_launch_templates(&DescribeLaunchTemplates::new()).unwrap().items {
        all.insert(format!("{} {} {}", template.id, template.name, template.default_version));
        let versions = DescribeLaunchTemplateVersions::of(template.id);
        for version in region.describe_launch_template_versions(&versions).unwrap().items {
            all.insert(format!("version {} of {}", version.version, template.id));
        }
    }
    all.extend(region.accepted_terms().unwrap().into_iter().map(|code| format!("the terms of {code}")));
    all.extend(completed(
        region.describe_import_image_tasks(&DescribeImportImageTasks::new()).unwrap().items,
    ));
    all.extend(completed(
        region.describe_export_image_tasks(&DescribeExportImageTasks::new()).unwrap().items,
    ));
    all.extend(completed(region.describe_copy_image_tasks(&DescribeCopyImageTasks::new()).unwrap().items));
    all.extend(completed(
        region.describe_create_image_tasks(&DescribeCreateImageTasks::new()).unwrap().items,
    ));
    all
}

/// What has come of tasks. Those that have come to nothing are told of as well: that they have is no part of what a call does.
fn completed<Id: Display>(tasks: Vec<TaskDescription<Id>>) -> impl Iterator<Item = String> {
    let tasks = tasks.into_iter().filter(|task| task.status == TaskStatus::Completed);
    tasks.map(|task| format!("{} has made {:?}", task.id, task.image_id))
}

/// That the disks of all volumes are as large as these are said to be. The region is closed.
fn check_sizes(dir: &Path, told: &[VolumeDescription], when: &str) {
    let blocks = Store::open(dir.join("blocks")).unwrap();
    for volume in told {
        match Volume::open(&dir.join("volumes").join(volume.id.to_string()), &blocks) {
            Ok(open) => assert_eq!(open.size(), volume.size_gib << 30, "{when}: {volume:?}"),
            // Nobody has written to it.
            Err(e) => assert_eq!(e.kind(), storage_block::ErrorKind::NotFound, "{when}: {volume:?}"),
        }
    }
}

/// The volumes that have files, and the snapshots that are stored.
fn files(dir: &Path) -> BTreeSet<String> {
    let names = |sub: &str| {
        let all = fs::read_dir(dir.join(sub)).unwrap().map(|file| file.unwrap().file_name());
        all.map(|name| name.into_string().unwrap()).collect::<Vec<_>>()
    };
    // A mark beside a volume is none.
    let volumes = names("volumes").into_iter().filter(|name| name.starts_with("vol-"));
    volumes.chain(names("blocks/snapshots")).collect()
}

struct World {
    dir: tempfile::TempDir,
    store: Shared,
    region: TestRegion,
    /// What is launched with client tokens.
    ami: Option<Ami<X86_64>>,
    commits: Vec<(&'static str, usize)>,
}

impl World {
    /// Makes a call, and looks at what each crash in it leaves.
    fn call<T>(
        &mut self,
        name: &'static str,
        make: impl FnOnce(&TestRegion) -> instance_core::Result<T>,
    ) -> T {
        let before = told(&self.region, self.ami.as_ref());
        self.store.watch(self.dir.path());
        let made = make(&self.region).unwrap_or_else(|e| panic!("{name}: {e}"));
        let crashes = self.store.crashes();
        let after = told(&self.region, self.ami.as_ref());
        self.commits.push((name, crashes.len() / 2));
        let mut done = false;
        for (number, (_after, copy, kept)) in crashes.into_iter().enumerate() {
            let when = format!("{name}, cut off at {number}");
            let region = open(&copy, kept.clone());
            let found = told(&region, self.ami.as_ref());
            assert!(
                found == before || found == after,
                "{when}:\n{found:#?}\nis neither\n{before:#?}\nnor\n{after:#?}"
            );
            // What was done once is not undone by a crash that comes later.
            assert!(!done || found == after || before == after, "{when}: it was done before");
            done = found == after;
            let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
            drop(region);
            check_sizes(&copy, &volumes, &when);
            let left = files(&copy);
            let region = open(&copy, kept);
            assert_eq!(told(&region, self.ami.as_ref()), found, "{when}: opened again");
            let known = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
            let known: BTreeSet<String> = known.iter().map(|volume| volume.id.to_string()).collect();
            let orphans = left.iter().filter(|name| name.starts_with("vol-") && !known.contains(*name));
            assert_eq!(orphans.count(), 0, "{when}: {left:?}, of which are known {known:?}");
            drop(region);
            assert_eq!(files(&copy), left, "{when}: something was left to collect");
        }
        made
    }
}

#[test]
fn a_call_that_is_cut_off_is_done_or_has_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let mut world = World { dir, store, region, ami: None, commits: Vec::new() };

    let ami = world.call("register", |r| register(r, "base", &disk(1, 7)));
    world.ami = Some(ami.clone());
    let kept = BlockDeviceMappingRequest::new("/dev/sdk").size_gib(1).delete_on_termination(false);
    let two = spec().count(2, 2).tag("Name", "two").volume_tag("of", "two").block_device(kept);
    let launched = world.call("run instances", |r| r.run_instances(&ami, two)).instances;
    let [one, other] = &launched[..] else { panic!("{launched:?}") };
    ask(one, "write 0 0 word", "wrote");
    world.call("protect", |_| one.set_termination_protection(true));
    world.call("unprotect", |_| one.set_termination_protection(false));
    world.call("protect from being stopped", |_| one.set_stop_protection(true));
    world.call("protect from being stopped no more", |_| one.set_stop_protection(false));
    world.call("shutdown behavior", |_| other.set_shutdown_behavior(ShutdownBehavior::Terminate));
    let mut tagged = MetadataOptions::default();
    (tagged.instance_metadata_tags, tagged.http_put_response_hop_limit) = (true, 3);
    world.call("metadata options", |_| one.set_metadata_options(tagged));
    world.call("stop", |_| one.stop(Duration::ZERO));
    world.call("another type", |_| one.set_instance_type("t2.micro".parse().unwrap()));
    world.call("user data", |_| one.set_user_data(Some(b"hello".to_vec())));
    world.call("start", |_| one.start());
    world.call("reboot", |_| one.reboot());
    let volume = world.call("create volume", |r| r.create_volume(VolumeSpec::new(1).tag("a", "b"))).id;
    world.call("attach", |r| r.attach_volume(volume, one.id(), "/dev/sdm"));
    world.call("grow", |r| r.grow_volume(volume, 2));
    let slower = ModifyVolume::new().volume_type(VolumeType::Gp2);
    world.call("another type of a volume", |r| r.modify_volume(volume, slower));
    let larger = ModifyVolume::new().volume_type(VolumeType::Standard).size_gib(3);
    world.call("grow and another type", |r| r.modify_volume(volume, larger));
    let own = one.describe().attachments[0].volume_id;
    world.call("grow a root volume", |r| r.grow_volume(own, 2));
    world.call("tag", |r| r.create_tags(&[volume.into(), one.id().into()], &[("stage", "test")]));
    world.call("untag", |r| r.delete_tags(&[volume.into(), one.id().into()], &[("stage", None)]));
    let snapshot = world.call("create snapshot", |r| r.create_snapshot(volume, "of it")).id;
    let begun = world.call("begin create snapshot", |r| r.begin_create_snapshot(volume, "")?.wait(soon())).id;
    world.call("delete what was begun", |r| r.delete_snapshot(begun));
    let of_all = CreateSnapshots::new(one.id()).exclude_boot_volume(true).tag("of", "all");
    world.call("create snapshots", |r| r.create_snapshots(&of_all));
    world.call("begin create snapshots", |r| {
        let begun = r.begin_create_snapshots(&of_all)?;
        begun.iter().map(|one| one.wait(soon())).collect::<instance_core::Result<Vec<_>>>()
    });
    world.call("detach", |r| r.detach_volume(volume));
    world.call("attach again", |r| r.attach_volume(volume, one.id(), "/dev/sdm"));
    world.call("force detach", |r| r.force_detach_volume(volume));
    world.call("delete volume", |r| r.delete_volume(volume));
    world.call("delete snapshot", |r| r.delete_snapshot(snapshot));
    let made: AnyAmi = world.call("create image", |_| one.create_image("made")).ami;
    let public = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
    world.call("share", |r| r.modify_image_attribute(made.id(), &public));
    world.call("disable", |r| r.disable_image(made.id()));
    world.call("enable", |r| r.enable_image(made.id()));
    world.call("deprecate", |r| r.enable_image_deprecation(made.id(), None));
    world.call("deprecate no more", |r| r.disable_image_deprecation(made.id()));
    world.call("create image task", |_| one.begin_create_image("by-task")?.wait(soon()));
    world.call("import task", |r| {
        let kernel = Some(DirectBoot::new(tiny_elf(), None, ""));
        r.import_image(Ami::<X86_64>::builder("imported"), disk(1, 9), kernel)?.wait(soon())
    });
    world.call("export task", |r| r.export_image(made.id(), "/dev/xvda", |_, _| Ok(()))?.wait(soon()));
    let alone = Ami::<X86_64>::builder("alone")
        .root_device("/dev/xvda")
        .block_device(ami.manifest().root_device().unwrap().clone())
        .build(world.region.name(), world.region.account());
    let alone = Image::new(alone.unwrap().into_any());
    world.call("put", |r| r.catalog().put(alone.clone()).map_err(Into::into));
    let mut described = alone.clone();
    described.set_description("by update").unwrap();
    world.call("update", |r| r.catalog().update(&alone, described).map_err(Into::into));
    world.call("accept terms", |r| r.accept_terms("8vk2x"));
    world.call("copy", |r| r.copy_image(made.id(), "copy"));
    let from = world.region.clone();
    world.call("copy from", |r| r.copy_image_from(&from, made.id(), CopyImage::new("copied")));
    let copying = CopyImage::new("copied-by-task");
    world.call("copy task", |r| r.begin_copy_image_from(&from, made.id(), copying)?.wait(soon()));
    drop(from);
    let template = world.call("create template", |r| r.create_launch_template("web", spec())).id;
    world.call("create version", |r| r.create_launch_template_version(template, spec().key_name("me")));
    world.call("another default", |r| r.modify_launch_template(template, 2));
    world.call("the first default", |r| r.modify_launch_template(template, 1));
    world.call("delete versions", |r| r.delete_launch_template_versions(template, &[2]));
    world.call("delete template", |r| r.delete_launch_template(template));
    let often = spec().image_id(ami.id());
    let template =
        world.call("create a whole template", |r| r.create_launch_template("often", often.clone())).id;
    world.call("launch from a template", |r| r.launch_from_template("often", 1, spec()));
    let twice = world.call("launch from a template with a token", |r| with_token(r, &ami, "by template"));
    world.call("another latest", |r| r.create_launch_template_version(template, often.key_name("me")));
    world.call("delete what was launched from", |r| r.delete_launch_template(template));
    world.call("terminate one of two", |_| twice.instances[0].terminate());
    world.call("launch with a token", |r| with_token(r, &ami, "once"));
    let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    let product = ModifyImageAttribute::new().add_product_code(code);
    world.call("product code", |r| r.modify_image_attribute(made.id(), &product));
    let product = made.typed::<X86_64>().unwrap();
    world.call("launch a product", |r| r.launch(&product, spec()));
    let sleeper = world.call("launch what hibernates", |r| r.launch(&ami, spec().hibernation(true)));
    world.call("hibernate", |_| sleeper.hibernate(Duration::ZERO));
    world.call("wake", |_| sleeper.start());
    world.call("power off", |_| {
        one.console().write_all(b"poweroff\n", soon()).unwrap();
        one.wait_for(InstanceState::Stopped, soon())
    });
    let gone = spec().shutdown_behavior(ShutdownBehavior::Terminate);
    let gone = world.call("launch what ends itself", |r| r.launch(&ami, gone));
    world.call("power off for good", |_| {
        gone.console().write_all(b"poweroff\n", soon()).unwrap();
        gone.wait_for(InstanceState::Terminated, soon())
    });
    world.call("terminate", |_| one.terminate());
    world.call("deregister", |r| r.deregister_image(made.id()));
    world.call("deregister what an instance was made of", |r| r.deregister_image(ami.id()));
    world.call("terminate its last", |_| other.terminate());

    eprintln!("commits: {:?}", world.commits);
    let without: Vec<_> = world.commits.iter().filter(|(_, commits)| *commits == 0).collect();
    let expected = [("reboot", 0)];
    assert!(without.iter().all(|one| expected.contains(one)), "{without:?} commit nothing");
}

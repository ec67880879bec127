//! Every call that commits, cut off before and after each of its commits: the region is then opened, and all that it tells
//! is what it told before the call, or what it tells after it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/crashes.rs"]
mod crashes;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use ami_core::{AnyAmi, BlockDeviceMapping, Grantee, ModifyImageAttribute};
use common::{TestRegion, ask, disk, register};
use crashes::{Shared, open};
use instance_core::{
    CopyImage, DescribeLaunchTemplateVersions, DescribeLaunchTemplates, DescribeSnapshots, DescribeTags,
    DescribeVolumes, InstanceState, LaunchSpec, VolumeSpec,
};

/// Everything that a region tells, in words that do not depend on whether a machine was lost.
fn told(region: &TestRegion) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for image in region.images().unwrap() {
        let (id, state, shared) = (image.id(), image.state(), image.launch_permissions().is_public());
        all.insert(format!("image {id} {} is {state}, shared: {shared}", image.ami().name()));
    }
    for instance in region.instances() {
        let told = instance.describe();
        let terminated = told.state == InstanceState::Terminated;
        let volumes: Vec<_> = told.attachments.iter().map(|a| (&a.device_name, a.volume_id)).collect();
        let volumes = if terminated { Vec::new() } else { volumes };
        let protected = told.termination_protection;
        all.insert(format!("{} terminated: {terminated}, protected: {protected}, {volumes:?}", told.id));
    }
    for volume in region.describe_volumes(&DescribeVolumes::new()).unwrap().items {
        let at = volume.attachment.map(|a| (a.instance_id, a.device_name));
        all.insert(format!("{} of {} GiB at {at:?}", volume.id, volume.size_gib));
    }
    for snapshot in region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items {
        all.insert(format!("{} of {}", snapshot.id, snapshot.volume_id));
    }
    for tag in region.describe_tags(&DescribeTags::new()).unwrap().items {
        all.insert(format!("{} has {}={}", tag.resource_id, tag.key, tag.value));
    }
    for template in region.describe_launch_templates(&DescribeLaunchTemplates::new()).unwrap().items {
        all.insert(format!("{} {}", template.id, template.name));
        let versions = DescribeLaunchTemplateVersions::of(template.id);
        for version in region.describe_launch_template_versions(&versions).unwrap().items {
            all.insert(format!("version {} of {}", version.version, template.id));
        }
    }
    all
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
    commits: Vec<(&'static str, usize)>,
}

impl World {
    /// Makes a call, and looks at what each crash in it leaves.
    fn call<T>(
        &mut self,
        name: &'static str,
        make: impl FnOnce(&TestRegion) -> instance_core::Result<T>,
    ) -> T {
        let before = told(&self.region);
        self.store.watch(self.dir.path());
        let made = make(&self.region).unwrap_or_else(|e| panic!("{name}: {e}"));
        let crashes = self.store.crashes();
        let after = told(&self.region);
        self.commits.push((name, crashes.len() / 2));
        let mut done = false;
        for (number, (_after, copy, kept)) in crashes.into_iter().enumerate() {
            let when = format!("{name}, cut off at {number}");
            let region = open(&copy, kept.clone());
            let found = told(&region);
            assert!(
                found == before || found == after,
                "{when}:\n{found:#?}\nis neither\n{before:#?}\nnor\n{after:#?}"
            );
            // What was done once is not undone by a crash that comes later.
            assert!(!done || found == after || before == after, "{when}: it was done before");
            done = found == after;
            drop(region);
            let left = files(&copy);
            let region = open(&copy, kept);
            assert_eq!(told(&region), found, "{when}: opened again");
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
    let mut world = World { dir, store, region, commits: Vec::new() };
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());

    let ami = world.call("register", |r| register(r, "base", &disk(1, 7)));
    let kept = BlockDeviceMapping::blank("/dev/sdk", 1).delete_on_termination(false);
    let two = spec().count(2, 2).tag("Name", "two").volume_tag("of", "two").block_device(kept);
    let launched = world.call("run instances", |r| r.run_instances(&ami, two)).instances;
    let [one, other] = &launched[..] else { panic!("{launched:?}") };
    ask(one, "write 0 0 word", "wrote");
    world.call("protect", |_| one.set_termination_protection(true));
    world.call("unprotect", |_| one.set_termination_protection(false));
    world.call("stop", |_| one.stop(Duration::ZERO));
    world.call("start", |_| one.start());
    world.call("reboot", |_| one.reboot());
    let volume = world.call("create volume", |r| r.create_volume(VolumeSpec::new(1).tag("a", "b"))).id;
    world.call("attach", |r| r.attach_volume(volume, one.id(), "/dev/sdm"));
    world.call("grow", |r| r.grow_volume(volume, 2));
    world.call("tag", |r| r.create_tags(&[volume.into(), one.id().into()], &[("stage", "test")]));
    world.call("untag", |r| r.delete_tags(&[volume.into(), one.id().into()], &[("stage", None)]));
    let snapshot = world.call("create snapshot", |r| r.create_snapshot(volume, "of it")).id;
    world.call("detach", |r| r.detach_volume(volume));
    world.call("delete volume", |r| r.delete_volume(volume));
    world.call("delete snapshot", |r| r.delete_snapshot(snapshot));
    let made: AnyAmi = world.call("create image", |_| one.create_image("made")).ami;
    let public = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
    world.call("share", |r| r.modify_image_attribute(made.id(), &public));
    world.call("disable", |r| r.disable_image(made.id()));
    world.call("enable", |r| r.enable_image(made.id()));
    world.call("copy", |r| r.copy_image(made.id(), "copy"));
    let from = world.region.clone();
    world.call("copy from", |r| r.copy_image_from(&from, made.id(), CopyImage::new("copied")));
    drop(from);
    let template = world.call("create template", |r| r.create_launch_template("web", spec())).id;
    world.call("create version", |r| r.create_launch_template_version(template, spec().key_name("me")));
    world.call("delete versions", |r| r.delete_launch_template_versions(template, &[2]));
    world.call("delete template", |r| r.delete_launch_template(template));
    world.call("terminate", |_| one.terminate());
    world.call("deregister", |r| r.deregister_image(made.id()));
    world.call("deregister what an instance was made of", |r| r.deregister_image(ami.id()));
    world.call("terminate its last", |_| other.terminate());

    eprintln!("commits: {:?}", world.commits);
    let without: Vec<_> = world.commits.iter().filter(|(_, commits)| *commits == 0).collect();
    let expected = [("reboot", 0)];
    assert!(without.iter().all(|one| expected.contains(one)), "{without:?} commit nothing");
}

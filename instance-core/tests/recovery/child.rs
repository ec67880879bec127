//! The process that is killed.

use std::io::Write;
use std::time::Duration;

use ami_core::{Ami, AmiId, AnyAmi, BlockDeviceMapping, X86_64};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeSnapshots, DescribeVolumes, DirectBoot, ImageSource, Instance, InstanceState, LaunchSpec, Region,
    Result, SnapshotState, VolumeSpec, VolumeState,
};
use storage_block::MemoryDisk;

use super::model::HIBERNATED;
use super::{CHILD, PLACES, Random, TestRegion, ask, soon};

/// The kernel with this number.
pub(crate) fn kernel(number: usize) -> Vec<u8> {
    let mut kernel = tiny_elf();
    kernel.extend(number.to_le_bytes());
    kernel
}

/// A launch of two instances that happens once.
pub(crate) fn two_once(token: &str) -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap()).count(2, 2).client_token(token)
}

/// Not a test of its own: what is killed by the one in `main.rs`.
#[test]
#[ignore = "run by `nothing_acknowledged_is_lost_and_nothing_else_is_left`"]
fn work() {
    let Ok(how) = std::env::var(CHILD) else { return };
    let (seed, dir) = how.split_once(' ').unwrap();
    let region = Region::open(dir, FakeHypervisor::new()).unwrap();
    let mut random = Random(seed.parse().unwrap());
    // Ends the line that the harness has begun.
    println!();
    loop {
        act(&region, &mut random).unwrap_or_else(|e| panic!("{e}: {:?}", std::error::Error::source(&e)));
    }
}

/// Says a line at once and whole.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

fn act(region: &TestRegion, random: &mut Random) -> Result<()> {
    let images: Vec<AmiId> = region.images()?.iter().map(|i| i.ami().id()).collect();
    let mut instances = region.instances();
    instances.retain(|i| i.state() != InstanceState::Terminated);
    let word = format!("w{}", random.below(1_000_000));
    let any_image = random.one(&images).copied();
    match (random.below(34), random.one(&instances)) {
        (0 | 1, _) if images.len() < 4 => register(region, random, &word)?,
        (2..=4, _) if instances.len() < 3 => {
            let Some(id) = any_image else { return Ok(()) };
            say(&format!("begin launch {id}"));
            let ami = region.image(id)?.ami().typed::<X86_64>().unwrap();
            let spec = LaunchSpec::new("t2.nano".parse()?).hibernation(true);
            let instance = region.launch(&ami, spec)?;
            let volumes = instance.describe().attachments;
            let volumes: Vec<String> = volumes.iter().map(|a| a.volume_id.to_string()).collect();
            say(&format!("done {} {}", instance.id(), volumes.join(" ")));
        }
        (24, _) if instances.len() < 2 => {
            let Some(id) = any_image else { return Ok(()) };
            say(&format!("begin run {id} {word}"));
            let ami = region.image(id)?.ami().typed::<X86_64>().unwrap();
            let spec = two_once(&word);
            let words: Vec<String> = (region.run_instances(&ami, spec)?.instances.iter())
                .flat_map(|i| {
                    let volumes = i.describe().attachments.into_iter().map(|a| a.volume_id.to_string());
                    [i.id().to_string()].into_iter().chain(volumes)
                })
                .collect();
            say(&format!("done {}", words.join(" ")));
        }
        (25..=31, instance) => act_on_resources(region, random, instance, &word)?,
        (5, Some(_)) if images.len() > 2 => {
            let Some(id) = any_image else { return Ok(()) };
            say(&format!("begin deregister {id}"));
            region.deregister_image(id)?;
            say("done");
        }
        // With an extra volume the image would have three disks, of which the model knows nothing.
        (6 | 7, Some(instance)) if images.len() < 5 && instance.describe().attachments.len() == 2 => {
            say(&format!("begin create {} {word}", instance.id()));
            say(&format!("done {}", described(&instance.create_image(&word)?.ami)));
        }
        (8, Some(instance)) => act_on(instance, "terminate", Instance::terminate)?,
        (9, Some(instance)) => act_on(instance, "stop", |i| i.stop(Duration::ZERO))?,
        (10, Some(instance)) => act_on(instance, "stop", |i| i.stop(Duration::from_secs(30)))?,
        (what, Some(instance)) => match (what, instance.state()) {
            (_, InstanceState::Stopped) => act_on(instance, "start", Instance::start)?,
            (11, _) => act_on(instance, "reboot", Instance::reboot)?,
            (17..=19, _) if instance.describe().hibernation => {
                act_on(instance, &format!("hibernate {word}"), |i| {
                    ask(i, &format!("remember {word}"), "remembered");
                    i.hibernate(Duration::ZERO)
                })?;
            }
            (12, _) => act_on(instance, "poweroff", |i| {
                i.console().write_all(b"poweroff\n", soon()).unwrap();
                i.wait_for(InstanceState::Stopped, soon())
            })?,
            (13..=16, _) => act_on(instance, "flush", |i| {
                for disk in 0..2 {
                    ask(i, &format!("flush {disk}"), "flushed");
                }
                Ok(())
            })?,
            _ => {
                let place = random.below(PLACES.len());
                let (disk, sector) = PLACES[place];
                act_on(instance, &format!("write {place} {word}"), |i| {
                    ask(i, &format!("write {disk} {sector} {word}"), "wrote");
                    Ok(())
                })?;
            }
        },
        _ => {}
    }
    Ok(())
}

/// Something with a volume, a snapshot or a tag.
fn act_on_resources(
    region: &TestRegion,
    random: &mut Random,
    instance: Option<&Instance>,
    word: &str,
) -> Result<()> {
    let volumes = region.describe_volumes(&DescribeVolumes::new())?.items;
    let mut snapshots = region.describe_snapshots(&DescribeSnapshots::new())?.items;
    // What a kill has cut off is no more than its name.
    snapshots.retain(|snapshot| snapshot.state == SnapshotState::Completed);
    let free: Vec<_> = volumes.iter().filter(|v| v.state == VolumeState::Available).collect();
    let of_snapshot = random.one(&snapshots).map(|s| s.id);
    match random.below(7) {
        0 if free.len() < 6 => {
            let snapshot = of_snapshot.filter(|_| random.below(2) == 0);
            let base = snapshot.map_or("-".to_owned(), |id| id.to_string());
            say(&format!("begin volume {base}"));
            let spec = snapshot.map_or(VolumeSpec::new(1), VolumeSpec::of_snapshot);
            say(&format!("done {}", region.create_volume(spec)?.id));
        }
        1 if !free.is_empty() => {
            let id = free[random.below(free.len())].id;
            say(&format!("begin delete-volume {id}"));
            region.delete_volume(id)?;
            say("done");
        }
        2 if snapshots.len() < 4 => {
            let Some(volume) = random.one(&volumes) else { return Ok(()) };
            say(&format!("begin snapshot {}", volume.id));
            let made = match random.below(2) {
                0 => region.create_snapshot(volume.id, word)?,
                _ => region.begin_create_snapshot(volume.id, word)?.wait(soon())?,
            };
            say(&format!(
                "done {} {}",
                made.id,
                made.digest.map(|digest| digest.to_hex()).unwrap_or_default()
            ));
        }
        3 => {
            let Some(id) = of_snapshot else { return Ok(()) };
            say(&format!("begin delete-snapshot {id}"));
            region.delete_snapshot(id)?;
            say("done");
        }
        4 => {
            let Some(instance) = instance else { return Ok(()) };
            act_on(instance, &format!("tag {word}"), |i| {
                region.create_tags(&[i.id().into()], &[("word", word)])
            })?;
        }
        5 => {
            let settled = instance.filter(is_settled);
            let (Some(instance), Some(volume)) = (settled, free.first()) else { return Ok(()) };
            if instance.describe().attachments.len() == 2 {
                act_on(instance, &format!("attach {}", volume.id), |i| {
                    region.attach_volume(volume.id, i.id(), "/dev/sdg")
                })?;
            }
        }
        _ => {
            let settled = instance.filter(is_settled);
            let extra = settled.and_then(|i| i.describe().attachments.get(2).map(|a| (i, a.volume_id)));
            if let Some((instance, volume)) = extra {
                act_on(instance, &format!("detach {volume}"), |_| region.detach_volume(volume))?;
            }
        }
    }
    Ok(())
}

/// Whether its volumes can come and go.
fn is_settled(instance: &&Instance) -> bool {
    let description = instance.describe();
    let hibernates = description.state_reason.is_some_and(|reason| reason.code == HIBERNATED);
    matches!(description.state, InstanceState::Stopped | InstanceState::Running) && !hibernates
}

fn act_on(instance: &Instance, what: &str, act: impl FnOnce(&Instance) -> Result<()>) -> Result<()> {
    let (action, rest) = what.split_once(' ').unwrap_or((what, ""));
    say(&format!("begin {action} {} {rest}", instance.id()));
    act(instance)?;
    say("done");
    Ok(())
}

fn register(region: &TestRegion, random: &mut Random, word: &str) -> Result<()> {
    let number = random.below(3);
    say(&format!("begin register {word} {number}"));
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    disk.write_at(word.as_bytes(), 0).unwrap();
    let source = ImageSource::new(&disk).boot(DirectBoot::new(kernel(number), None, word));
    // A second disk, which is kept when its instance is terminated.
    let data = BlockDeviceMapping::blank("/dev/sdf", 1).delete_on_termination(false);
    let ami = region.register_image(Ami::<X86_64>::builder(word).block_device(data), source)?;
    say(&format!("done {}", described(&ami.into_any())));
    Ok(())
}

/// The id of an image and the digests of its snapshots.
fn described(ami: &AnyAmi) -> String {
    let snapshots = super::model::snapshots_of(ami).into_iter().map(|s| s.to_hex());
    [ami.id().to_string()].into_iter().chain(snapshots).collect::<Vec<_>>().join(" ")
}

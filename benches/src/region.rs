//! What a region itself costs: its durability, its describing, its launching from many threads. The machines
//! run nothing and have no threads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ami_core::{Ami, Architecture, InstanceId, X86_64};
use anyhow::{Context as _, ensure};
use instance_core::machine::{
    Capabilities, Execution, ExitCause, Hypervisor, Machine, MachineError, MachineSpec, MachineState, Runs,
};
use instance_core::testing::tiny_elf;
use instance_core::watch::{Publisher, Watch};
use instance_core::{
    Capacity, DescribeInstances, DirectBoot, ImageSource, LaunchSpec, Region, RegionOptions,
};
use storage_block::MemoryDisk;
use tempfile::TempDir;

use crate::samples::{Measurement, Rounds, median, median_ratio};

/// What an append is that a launch is compared with.
const APPENDED: usize = 4096;
const THREADS: usize = 16;
const LAUNCHES: usize = 1000;
const PAGE: usize = 100;

/// Makes machines that run nothing.
#[derive(Debug, Clone)]
struct Nothing;

#[derive(Debug)]
struct NoMachine(Publisher<MachineState>);

impl Hypervisor for Nothing {
    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::new("nothing", vec![Architecture::X86_64]);
        can.max_disks = 16;
        can
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        Ok(Execution::Emulated { measured: "runs nothing".to_owned() })
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        Ok(Box::new(NoMachine(Publisher::new(MachineState::Created))))
    }
}

impl Runs<X86_64> for Nothing {}

impl NoMachine {
    fn become_(&self, next: MachineState) -> Result<(), MachineError> {
        self.0.set(next);
        Ok(())
    }
}

impl Machine for NoMachine {
    fn state(&self) -> Watch<MachineState> {
        self.0.watch()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.become_(MachineState::Running)
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.become_(MachineState::Paused)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.become_(MachineState::Running)
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.become_(MachineState::Exited(ExitCause::PowerOff))
    }

    fn reset(&self) -> Result<(), MachineError> {
        self.become_(MachineState::Exited(ExitCause::Reset))
    }

    fn kill(&self) {
        self.0.set(MachineState::Exited(ExitCause::Killed));
    }
}

/// A region with an image to launch.
#[derive(Debug)]
struct World {
    region: Region<Nothing>,
    image: Ami<X86_64>,
    // Declared last, so that the region is closed before its directory goes.
    dir: TempDir,
}

impl World {
    fn new(dir: TempDir) -> anyhow::Result<Self> {
        let region = open(dir.path())?;
        let disk = MemoryDisk::new(1 << 20)?.into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let image = region.register_image(Ami::<X86_64>::builder("measured"), source)?;
        Ok(Self { region, image, dir })
    }

    fn launch(&self) -> anyhow::Result<InstanceId> {
        Ok(self.region.launch(&self.image, LaunchSpec::new("t2.nano".parse()?))?.id())
    }
}

fn open(dir: &Path) -> anyhow::Result<Region<Nothing>> {
    Ok(RegionOptions::new().capacity(Capacity::unlimited()).open(dir, Nothing)?)
}

/// From the call of `launch` to its return, when all is durable, as a multiple of one append to a file that
/// is made durable, on the same file system.
///
/// # Errors
///
/// Those of the file system and the region.
pub fn launch_over_append() -> anyhow::Result<Measurement> {
    let world = World::new(tempfile::tempdir()?)?;
    let dir = tempfile::tempdir()?;
    let mut file = File::create(dir.path().join("appended"))?;
    median_ratio(
        Rounds { rounds: 60, batch: 4 },
        ("launch", &mut || {
            let begun = Instant::now();
            let id = world.launch()?;
            let took = begun.elapsed();
            world.region.instance(id)?.terminate()?;
            Ok(took)
        }),
        ("append", &mut || {
            let begun = Instant::now();
            file.write_all(&[0xa5; APPENDED])?;
            file.sync_all()?;
            Ok(begun.elapsed())
        }),
    )
}

/// A region with so many instances, every tenth of which has a tag. In memory, for nothing is written when it
/// is measured.
fn crowd(instances: usize) -> anyhow::Result<World> {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? };
    let world = World::new(dir)?;
    for batch in 0..instances.div_ceil(PAGE) {
        let count = u32::try_from(PAGE.min(instances - batch * PAGE))?;
        let spec = LaunchSpec::new("t2.nano".parse()?).count(count, count).tag("batch", batch.to_string());
        let spec = if batch % 10 == 0 { spec.tag("stage", "production") } else { spec };
        for instance in world.region.run_instances(&world.image, spec)?.instances {
            // One that runs has its volumes open.
            instance.stop(Duration::ZERO)?;
        }
    }
    Ok(world)
}

/// How long a page of the instances takes that are stopped and have a tag.
fn describe(world: &World) -> anyhow::Result<Duration> {
    let request = DescribeInstances::new()
        .filter("instance-state-name", ["stopped"])
        .filter("tag:stage", ["production"])
        .max_results(PAGE);
    let begun = Instant::now();
    let page = world.region.describe_instances(&request)?;
    let took = begun.elapsed();
    ensure!(page.items.len() == PAGE, "a page of {} instances", page.items.len());
    Ok(took)
}

/// A page of 100 of 10,000 instances by a filter, in milliseconds.
///
/// # Errors
///
/// Those of the region.
pub fn describe_10000() -> anyhow::Result<Measurement> {
    let world = crowd(10_000)?;
    let samples = (0..200).map(|_| Ok(describe(&world)?.as_secs_f64()));
    let samples = samples.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Measurement {
        value: 1e3 * median(samples.clone()),
        noise: None,
        samples: [("describe".to_owned(), samples)].into(),
    })
}

/// The same page as a multiple of that of a region with 100 instances.
///
/// # Errors
///
/// Those of the region.
pub fn describe_10000_over_100() -> anyhow::Result<Measurement> {
    let (large, small) = (crowd(10_000)?, crowd(100)?);
    median_ratio(
        Rounds { rounds: 60, batch: 4 },
        ("10,000", &mut || describe(&large)),
        ("100", &mut || describe(&small)),
    )
}

/// The time that a launch takes of 1,000 from 16 threads, as a part of what it takes of some from one thread:
/// each is durable when its call returns. None is lost and none is there twice, also after the region was
/// opened again.
///
/// # Errors
///
/// Those of the region, and if one is lost.
pub fn launch_16_threads_over_1() -> anyhow::Result<Measurement> {
    const ALONE: usize = LAUNCHES / 10;
    let world = World::new(tempfile::tempdir()?)?;
    let made = RefCell::new(BTreeSet::new());
    let is_new = |id| {
        ensure!(made.borrow_mut().insert(id), "{id} was made twice");
        Ok(())
    };
    let measured = median_ratio(
        Rounds { rounds: 9, batch: 1 },
        ("together", &mut || {
            let (took, launched) = launch_together(&world)?;
            launched.into_iter().try_for_each(is_new)?;
            Ok(took / LAUNCHES as u32)
        }),
        ("alone", &mut || {
            let begun = Instant::now();
            let launched = (0..ALONE).map(|_| world.launch()).collect::<anyhow::Result<Vec<_>>>()?;
            let took = begun.elapsed();
            launched.into_iter().try_for_each(is_new)?;
            Ok(took / ALONE as u32)
        }),
    )?;
    let made = made.take();
    let World { region, image: _, dir } = world;
    let found = |region: &Region<Nothing>| region.instances().iter().map(|i| i.id()).collect::<BTreeSet<_>>();
    ensure!(found(&region) == made, "an instance is lost");
    drop(region);
    let region = open(dir.path()).context("the region does not open again")?;
    ensure!(found(&region) == made, "an instance is lost over a restart");
    Ok(measured)
}

/// How long launches from many threads take, and what they made.
fn launch_together(world: &World) -> anyhow::Result<(Duration, Vec<InstanceId>)> {
    let next = AtomicUsize::new(0);
    let launch = || -> anyhow::Result<Vec<InstanceId>> {
        let mut ids = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < LAUNCHES {
            ids.push(world.launch()?);
        }
        Ok(ids)
    };
    let begun = Instant::now();
    let launched = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(launch)).collect();
        let joined =
            threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?);
        joined.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let took = begun.elapsed();
    Ok((took, launched.into_iter().flatten().collect()))
}

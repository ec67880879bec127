//! `cargo xtask quickstart`: the whole of it, from packages to two equal live servers.
//!
//! Everything after the root disk goes through the public API of the crates alone.

mod display;
mod left;
mod report;
mod states;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ami_core::{AnyAmi, Architecture};
use anyhow::{Context, Result, bail, ensure};
use hypervisor_kvm::Kvm;
use hypervisor_qemu::Qemu;
use instance_core::machine::Hypervisor;
use instance_core::shell::Shell;
use instance_core::{Instance, InstanceState, LaunchSpec, Region};
use storage_block::Progress;

use crate::guest::{self, Artifacts};
use crate::prerequisites::{self, QEMU_X86_64};
use left::{Before, Held};
use report::{Report, in_words};
use states::Watcher;

/// How many steps it has, for the display.
const STEPS: usize = 11;

/// How long a guest may take to come up under emulation on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// How long a command in the guest may take.
const COMMAND_PATIENCE: Duration = Duration::from_secs(60);

const PAGE: &str = "/srv/employee-directory/index.html";
const DATA: &str = "/srv/employee-directory/employees.csv";
const PAGE_CONTENT: &str = include_str!("../guest/employee-directory/index.html");
const DATA_CONTENT: &str = include_str!("../guest/employee-directory/employees.csv");

/// Do the whole of it: from packages to two equal live servers
///
/// Builds a root disk of the host distribution's packages, registers it as an image, launches it, installs an
/// application, makes an image of the running instance, launches that one too and compares the two,
/// and checks that nothing is left of it all but the images. The exit status is 0 if every check held.
#[derive(clap::Args)]
pub(crate) struct QuickstartArgs {
    /// What runs the machines
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    hypervisor: Choice,
    /// Keep the region in this directory (a temporary one otherwise)
    #[arg(long)]
    region: Option<PathBuf>,
    /// Print the results as one JSON object, also when it fails
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Choice {
    /// KVM where guest kernels run on hardware, else QEMU
    Auto,
    /// KVM, in this process
    Kvm,
    /// QEMU, as a child process
    Qemu,
}

/// The command.
pub(crate) fn run(args: &QuickstartArgs) -> Result<ExitCode> {
    let mut report = Report::new(STEPS);
    let outcome = whole(args, &mut report);
    report.print(&outcome, args.json)?;
    outcome.map(|()| ExitCode::SUCCESS)
}

fn whole(args: &QuickstartArgs, report: &mut Report) -> Result<()> {
    let hypervisor = choose(args.hypervisor, |line| report.say(line))?;
    let artifacts = report.step("build the root disk", guest::ensure)?;
    report.display().animate();
    let temporary = tempfile::tempdir().context("cannot make a directory for the region")?;
    let dir = args.region.clone().unwrap_or_else(|| temporary.path().join("region"));
    report.hypervisor(hypervisor.as_ref())?;
    let held = Held::now()?;
    let before = in_region(&dir, hypervisor, &artifacts, report)?;
    let made: Vec<_> = report.image_ids().map(str::to_owned).collect();
    let left = report.step("check that nothing is left", || {
        held.check()?;
        before.check(&dir, made.iter().map(String::as_str))
    })?;
    report.left(left);
    Ok(())
}

/// What goes on while the region is open. Answers what was in it at first.
fn in_region(
    dir: &Path,
    hypervisor: Box<dyn Hypervisor>,
    artifacts: &Artifacts,
    report: &mut Report,
) -> Result<Before> {
    let region = Region::open(dir, hypervisor)?;
    let before = Before::of(&region, dir)?;
    let watcher = Watcher::start(region.state_changes(), report.display().clone());
    let outcome = steps(&region, artifacts, report);
    let instances: Vec<_> = region.instances().iter().map(Instance::describe).collect();
    drop(region);
    report.instances(&instances, watcher.finish()?);
    outcome.map(|()| before)
}

/// The hypervisor to use, with all that has to be installed for the quick start on it. `auto` measures: a
/// KVM that emulates guest kernels is no use to them.
pub(crate) fn choose(choice: Choice, say: impl Fn(&str)) -> Result<Box<dyn Hypervisor>> {
    match choice {
        Choice::Qemu => {}
        Choice::Kvm => return Ok(Box::new(Kvm::open()?)),
        Choice::Auto => match Kvm::open() {
            Ok(kvm) => match kvm.execution() {
                Ok(execution) if execution.is_hardware() => return Ok(Box::new(kvm)),
                Ok(execution) => {
                    let (_, measured) = in_words(&execution);
                    say(&format!("not using KVM, which emulates guest kernels here: {measured}"));
                }
                Err(error) => say(&format!("not using KVM: {error}")),
            },
            Err(error) => say(&format!("not using KVM: {error}")),
        },
    }
    prerequisites::require(&[&[QEMU_X86_64][..], guest::tools()].concat())?;
    Ok(Box::new(Qemu::find()?))
}

fn steps(region: &Region, artifacts: &Artifacts, report: &mut Report) -> Result<()> {
    let suffix = region.images()?.len();
    let display = report.display().clone();
    let base = report.step("register the image", || {
        let mut progress = |p: Progress| display.bytes("register the image", p.done, p.total);
        Ok(artifacts.quick_start().register_with(region, &mut progress)?.ami().clone())
    })?;
    report.image(&base);

    let first = launch(region, &base, report, "launch the first instance")?;
    report.step("install the application", || {
        let mut shell = shell(&first)?;
        shell.must("mkdir -p /srv/employee-directory", soon())?;
        for (path, content) in [(PAGE, PAGE_CONTENT), (DATA, DATA_CONTENT)] {
            shell.write_file(path, content.as_bytes(), soon())?;
            let read = shell.read_file(path, soon())?;
            ensure!(read == content.as_bytes(), "{path} reads back differently");
        }
        shell.must("sync", soon()).map(drop).context("cannot flush the guest's file systems")
    })?;

    let created = report.step("make an image of the running instance", || {
        Ok(first.create_image(format!("employee-directory-{suffix}"))?)
    })?;
    report.image_of(&first, &created);

    let second = launch(region, &created.ami, report, "launch the second instance")?;
    report.step("compare the two", || {
        let (mut one, mut two) = (shell(&first)?, shell(&second)?);
        for (path, content) in [(PAGE, PAGE_CONTENT), (DATA, DATA_CONTENT)] {
            let read = two.read_file(path, soon())?;
            ensure!(read == content.as_bytes(), "{path} differs in the second instance");
        }
        two.must(&format!("echo changed > {DATA} && sync"), soon())?;
        let read = one.read_file(DATA, soon())?;
        ensure!(read == DATA_CONTENT.as_bytes(), "a change in the second instance appears in the first");
        Ok(())
    })?;

    let third = launch(region, &base, report, "launch the first image again")?;
    report.step("check that it is as it was", || {
        let found = shell(&third)?.run(&format!("test -e {PAGE}"), soon())?;
        ensure!(found.status != 0, "the first image holds the application");
        Ok(())
    })?;
    report.step("terminate everything", || [first, second, third].iter().try_for_each(|i| Ok(i.terminate()?)))
}

fn launch(region: &Region, ami: &AnyAmi, report: &mut Report, what: &str) -> Result<Instance> {
    ensure!(ami.architecture() == Architecture::X86_64, "the quick start is for x86_64");
    report.step(what, || {
        let instance = region.launch(ami, LaunchSpec::new("t2.nano".parse()?))?;
        wait_until_up(&instance).with_context(|| format!("{} did not come up", instance.id()))?;
        Ok(instance)
    })
}

/// Waits for the guest to say that it is up, unless its machine ends before.
fn wait_until_up(instance: &Instance) -> Result<()> {
    const LOOK: Duration = Duration::from_secs(1);
    let deadline = Instant::now() + BOOT_PATIENCE;
    loop {
        // A reader of its own each time, which begins with the oldest line.
        let said =
            instance.console().reader().wait_for("AMI GUEST READY", deadline.min(Instant::now() + LOOK));
        let description = instance.describe();
        match said {
            Ok(_) => return Ok(()),
            Err(_) if description.state != InstanceState::Running => {
                let why = description.state_reason.map_or_else(String::new, |reason| reason.to_string());
                bail!("it is {}: {why}", description.state);
            }
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => {}
        }
    }
}

fn shell(instance: &Instance) -> Result<Shell> {
    Shell::connect(&instance.console(), soon())
        .with_context(|| format!("no shell answers in {}", instance.id()))
}

fn soon() -> Instant {
    Instant::now() + COMMAND_PATIENCE
}

//! `cargo xtask quickstart`: the whole of it, from Debian's packages to two equal live servers.
//!
//! Everything after the root disk goes through the public API of the crates alone.

mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ami_core::{Ami, AnyAmi, Architecture, OperatingSystem, X86_64};
use anyhow::{Context, Result, ensure};
use hypervisor_qemu::Qemu;
use instance_core::machine::Hypervisor;
use instance_core::shell::Shell;
use instance_core::{ImageSource, Instance, LaunchSpec, Region};
use storage_block::RawFile;

use crate::guest;
use crate::prerequisites::{self, QEMU_X86_64};
use report::{Held, Report};

/// How long a guest may take to come up under emulation on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// How long a command in the guest may take.
const COMMAND_PATIENCE: Duration = Duration::from_secs(60);

const PAGE: &str = "/srv/employee-directory/index.html";
const DATA: &str = "/srv/employee-directory/employees.csv";
const PAGE_CONTENT: &str = include_str!("../guest/employee-directory/index.html");
const DATA_CONTENT: &str = include_str!("../guest/employee-directory/employees.csv");

/// Arguments of `cargo xtask quickstart`.
#[derive(clap::Args)]
pub(crate) struct QuickstartArgs {
    /// What runs the machines
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    hypervisor: Choice,
    /// Keep the region in this directory (a temporary one otherwise)
    #[arg(long)]
    region: Option<PathBuf>,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    /// KVM where guest kernels run on hardware, else QEMU
    Auto,
    /// KVM, in this process
    Kvm,
    /// QEMU, as a child process
    Qemu,
}

/// The command.
pub(crate) fn run(args: &QuickstartArgs) -> Result<ExitCode> {
    let mut report = Report::new(args.json);
    let artifacts = report.step("build the root disk", guest::ensure)?;
    let held = Held::now()?;
    let temporary = tempfile::tempdir()?;
    let dir = args.region.clone().unwrap_or_else(|| temporary.path().join("region"));
    {
        let region = Region::open(&dir, choose(args.hypervisor, &report)?)?;
        report.watch(region.state_changes());
        let outcome = seven_steps(&region, &artifacts.disk(), &mut report);
        report.stop_watching(|| drop(region));
        outcome?;
    }
    report.step("check that nothing is left", || {
        held.check()?;
        for empty in ["volumes", "instances"] {
            let left = std::fs::read_dir(dir.join(empty))?.count();
            ensure!(left == 0, "{left} files are left in {}", dir.join(empty).display());
        }
        Ok(())
    })?;
    report.print_table();
    Ok(ExitCode::SUCCESS)
}

/// The hypervisor to use. `auto` measures: a KVM that emulates guest kernels is no use to them.
fn choose(choice: Choice, report: &Report) -> Result<Box<dyn Hypervisor>> {
    match choice {
        Choice::Kvm => anyhow::bail!("the KVM machine is not finished; use --hypervisor qemu"),
        Choice::Auto => report.say("the KVM machine is not finished; using QEMU"),
        Choice::Qemu => {}
    }
    prerequisites::require(&[QEMU_X86_64])?;
    Ok(Box::new(Qemu::find()?))
}

fn seven_steps(region: &Region, disk: &std::path::Path, report: &mut Report) -> Result<()> {
    let suffix = region.images()?.len();
    let base = report.step("register the image", || {
        let disk = RawFile::open(disk, true)?.into_disk();
        let builder = Ami::<X86_64>::builder(format!("quick-start-{suffix}"))
            .operating_system(OperatingSystem::linux("debian", "12"));
        Ok(region.register_image(builder, ImageSource::new(&disk))?.into_any())
    })?;
    tell(report, &base);

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
        Ok(first.create_image(&format!("employee-directory-{suffix}"))?)
    })?;
    tell(report, &created.ami);
    let (changed, stored) = (created.changed_bytes, created.stored_bytes);
    report
        .say(&format!("  {changed} bytes changed, {stored} bytes stored, paused for {:.1?}", created.paused));

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
        let up = instance.console().reader().wait_for("AMI GUEST READY", Instant::now() + BOOT_PATIENCE);
        up.with_context(|| format!("{} did not come up", instance.id()))?;
        Ok(instance)
    })
}

fn shell(instance: &Instance) -> Result<Shell> {
    Shell::connect(&instance.console(), soon())
        .with_context(|| format!("no shell answers in {}", instance.id()))
}

fn soon() -> Instant {
    Instant::now() + COMMAND_PATIENCE
}

fn tell(report: &Report, ami: &AnyAmi) {
    report.say(&format!("  {} {} {} {}", ami.id(), ami.architecture(), ami.name(), ami.digest()));
}

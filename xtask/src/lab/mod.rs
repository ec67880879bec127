//! `cargo xtask lab`: runs a command in a virtual machine that has a true `/dev/kvm`, on any host.
//!
//! QEMU emulates a processor with hardware virtualisation, nested paging included, down to the last
//! instruction; the guests' kernel in it loads its KVM module and offers what a bare-metal host
//! would. What a test of a hypervisor finds there does not depend on the machine the test runs on. With
//! `--icount` time in the lab is counted in executed instructions, so that measurements repeat on a
//! busy machine.
//!
//! ```text
//! cargo xtask lab -- quickstart --hypervisor kvm     this program's own commands
//! cargo xtask lab --exec target/debug/deps/machine-0123 --nocapture
//! cargo xtask lab --file data.raw:/data.raw --out /trace:trace.txt --exec ./program /data.raw
//! cargo xtask lab --network --memory 6144 --program curl --program ssh -- employee-directory --hypervisor kvm
//! ```
//!
//! A program comes with its shared libraries, and the guest artifacts with this program's own commands.
//! The command runs as root on an ext4 file system of its own, beside busybox and nothing else; its
//! environment has `AMI_LAB=1`. Output arrives while it runs, the exit status is the command's. A lab
//! that cannot do its work says so and ends with 125, and with 124 where the command is late.
//!
//! [`Lab`] is the same for other modules of this program.

mod closure;
mod machine;
mod payload;
mod pulse;
mod work;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::prerequisites::{self, FAKEROOT, LDD, MKE2FS, QEMU_X86_64, SETPRIV, Tool};
use crate::{guest, process, workspace};
use work::WorkDir;

/// What a lab calls, besides what makes the guest artifacts.
pub(crate) const TOOLS: [Tool; 5] = [QEMU_X86_64, SETPRIV, LDD, FAKEROOT, MKE2FS];

/// Where the guest artifacts lie in the lab.
pub(crate) const GUEST_DIR: &str = "/lab/guest";
/// Exit statuses of the lab itself, as in timeout(1).
const EXIT_LATE: u8 = 124;
const EXIT_FAILED: u8 = 125;

/// What `--help` says after the options.
const HELP: &str = "\
Examples:
  cargo xtask lab -- quickstart --hypervisor kvm
  cargo xtask lab --guest --exec target/debug/deps/linux-0123 --nocapture
  cargo xtask lab --file data.raw:/data.raw --out /trace:trace.txt --exec ./program /data.raw
  cargo xtask lab --icount --exec ./benchmark
  cargo xtask lab --network --memory 6144 --program curl --program ssh -- employee-directory --hypervisor kvm

Without --exec, COMMAND is one of this program's own, and the guest artifacts are there for it. With
--exec it is a program of the host with its arguments. Either runs as root in /root, on a disk of its
own that holds what is brought in and busybox's commands; AMI_LAB=1 is in its environment. Nothing of
the disk is kept but what --out names.

Exit status: the command's own (128 + N where signal N ended it); 124 where it was not done by its
deadline; 125 where the lab could not do its work, with the reason on standard error.";

/// Run a command in a virtual machine that has a true /dev/kvm
///
/// The machine is emulated, its hardware virtualisation included, so that it is the same on every
/// host, with or without KVM. It takes about four seconds to come up.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct LabArgs {
    /// COMMAND is a program of the host, by path or found on PATH, and comes with its shared libraries
    #[arg(long)]
    exec: bool,
    /// Bring the guest artifacts in for --exec too, and name them in AMI_GUEST_DIR
    #[arg(long)]
    guest: bool,
    /// Count time in executed instructions, one a nanosecond, on one processor: measurements repeat
    #[arg(long)]
    icount: bool,
    /// Let the lab reach what this host reaches, over sockets of QEMU's
    #[arg(long)]
    network: bool,
    /// The lab's processors; guests in a lab of several have been seen to stand still
    #[arg(long, value_name = "N", default_value_t = Lab::CPUS, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// The lab's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = Lab::MEMORY_MIB, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// End the lab when the command takes longer, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u64>,
    /// Bring in a file or directory, to /root unless LAB is given; may be repeated
    #[arg(long, value_name = "HOST[:LAB]", value_parser = parse_file)]
    file: Vec<(PathBuf, PathBuf)>,
    /// Bring in another program with its libraries, as /lab/bin/NAME, on PATH; may be repeated
    #[arg(long, value_name = "PROGRAM")]
    program: Vec<PathBuf>,
    /// Bring a file back when the command has ended, however it ended; may be repeated
    #[arg(long, value_name = "LAB:HOST", value_parser = parse_out)]
    out: Vec<(PathBuf, PathBuf)>,
    /// Set an environment variable; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, OsString)>,
    /// What to run, with its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// The command.
pub(crate) fn run(args: LabArgs) -> anyhow::Result<ExitCode> {
    match lab_of(args).and_then(|lab| lab.run(io::stdout(), io::stderr())) {
        Ok(Ended::Exit(status)) => Ok(ExitCode::from(status)),
        Ok(Ended::Late) => {
            eprintln!("error: the command was not done by its deadline");
            Ok(ExitCode::from(EXIT_LATE))
        }
        Ok(Ended::StoodStill) => {
            eprintln!("error: the lab stood still, which is QEMU's fault and not the command's; try again");
            Ok(ExitCode::from(EXIT_FAILED))
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            Ok(ExitCode::from(EXIT_FAILED))
        }
    }
}

fn lab_of(args: LabArgs) -> anyhow::Result<Lab> {
    let mut lab = if args.exec {
        let (program, rest) = args.command.split_first().context("no command")?;
        Lab::new(find_program(Path::new(program))?).args(rest)
    } else {
        Lab::new(std::env::current_exe().context("cannot find this program")?).args(&args.command)
    };
    if args.guest || !args.exec {
        lab = lab.guest_artifacts();
    }
    // What only commands of this program use, and is large.
    if let Some(cloud) = guest::find_cloud().filter(|_| !args.exec) {
        lab = lab.file(cloud.dir(), Path::new(GUEST_DIR).join(guest::CLOUD));
    }
    lab = lab.network(args.network).icount(args.icount).cpus(args.cpus).memory_mib(args.memory);
    if let Some(seconds) = args.deadline {
        lab = lab.deadline(Duration::from_secs(seconds));
    }
    for program in args.program {
        lab = lab.program(find_program(&program)?);
    }
    lab = args.file.into_iter().fold(lab, |lab, (from, to)| lab.file(from, to));
    lab = args.out.into_iter().fold(lab, |lab, (from, to)| lab.bring_back(from, to));
    Ok(args.env.into_iter().fold(lab, |lab, (name, value)| lab.env(name, value)))
}

/// The file of a program that was named as in a shell: by a path, or to be found on `PATH`.
fn find_program(name: &Path) -> anyhow::Result<PathBuf> {
    let is_path = name.components().count() > 1 || name.is_absolute();
    if is_path {
        return Ok(name.to_owned());
    }
    process::find(name).with_context(|| format!("there is no program {} on PATH", name.display()))
}

/// A command that is to run in the lab.
#[derive(Clone)]
pub(crate) struct Lab {
    program: PathBuf,
    args: Vec<OsString>,
    programs: Vec<PathBuf>,
    files: Vec<(PathBuf, PathBuf)>,
    outputs: Vec<(PathBuf, PathBuf)>,
    env: Vec<(String, OsString)>,
    guest_artifacts: bool,
    network: bool,
    icount: bool,
    cpus: u32,
    memory_mib: u32,
    deadline: Option<Duration>,
}

/// How a command in the lab ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this exit status.
    Exit(u8),
    /// Not before the deadline.
    Late,
    /// Not at all: the lab stood still, which is the emulator's fault and says nothing of the command.
    StoodStill,
}

impl Lab {
    /// One, for the emulator has faults with more. With two that run in threads of their own, one of
    /// six runs of KVM's Linux tests came to a standstill in its first guest; with two that take turns
    /// in one thread, guests of two processors stood still in every run. One did all of it every time,
    /// and took a tenth to a fifth longer.
    const CPUS: u32 = 1;
    const MEMORY_MIB: u32 = 2048;

    /// A lab that runs the host's `program`.
    pub(crate) fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            programs: Vec::new(),
            files: Vec::new(),
            outputs: Vec::new(),
            env: Vec::new(),
            guest_artifacts: false,
            network: false,
            icount: false,
            cpus: Self::CPUS,
            memory_mib: Self::MEMORY_MIB,
            deadline: None,
        }
    }

    /// The program's arguments.
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Brings in another program of the host with its libraries, as `/lab/bin/NAME`, which is on `PATH`.
    pub(crate) fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.programs.push(program.into());
        self
    }

    /// Brings in the host's file or directory `from` as `to`.
    pub(crate) fn file(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// Brings the lab's file `from` back as `to`, whatever the exit status.
    pub(crate) fn bring_back(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.outputs.push((from.into(), to.into()));
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: impl Into<String>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Brings in the guest artifacts and names them in `AMI_GUEST_DIR`.
    pub(crate) fn guest_artifacts(mut self) -> Self {
        self.guest_artifacts = true;
        self
    }

    /// Lets it reach what this host reaches, as 10.0.2.15.
    pub(crate) fn network(mut self, network: bool) -> Self {
        self.network = network;
        self
    }

    /// Counts time in executed instructions, a nanosecond each, on one processor.
    pub(crate) fn icount(mut self, icount: bool) -> Self {
        self.icount = icount;
        self
    }

    /// The number of processors, where instructions aren't counted.
    pub(crate) fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The lab's memory.
    pub(crate) fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Ends the lab if the command takes longer.
    pub(crate) fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Runs the command and hands on what it writes, while it writes it.
    pub(crate) fn run(
        mut self,
        output: impl Write + Send,
        errors: impl Write + Send,
    ) -> anyhow::Result<Ended> {
        prerequisites::require(&[&TOOLS[..], guest::tools()].concat())?;
        let artifacts = guest::ensure()?;
        if self.guest_artifacts {
            self = self
                .file(artifacts.dir(), Path::new(GUEST_DIR).join("amd64"))
                .env("AMI_GUEST_DIR", GUEST_DIR);
        }
        let (disk, dir) = self.build_disk()?;
        let finished = machine::run(&self, &artifacts, (&disk, dir), output, errors)?;
        let ended = ended(&finished)?;
        if matches!(ended, Ended::Exit(_)) {
            self.unpack(&finished.files)?;
        }
        Ok(ended)
    }

    fn build_disk(&self) -> anyhow::Result<(PathBuf, WorkDir)> {
        let dir = WorkDir::new(&workspace::target("lab"))?;
        let (disk, tree) = (dir.path().join("disk.raw"), dir.path().join("tree"));
        payload::build(self, &tree, &disk)?;
        fs::remove_dir_all(&tree).context("cannot remove the lab's files")?;
        Ok((disk, dir))
    }

    /// Puts the files brought back where they belong.
    fn unpack(&self, archive: &[u8]) -> anyhow::Result<()> {
        let mut missing: Vec<_> = self.outputs.iter().collect();
        for entry in tar::Archive::new(archive).entries().context("cannot read the lab's archive")? {
            let mut entry = entry.context("cannot read the lab's archive")?;
            let path = entry.path().context("cannot read the lab's archive")?.into_owned();
            let Some(index) = missing.iter().position(|(from, _)| payload::relative(from) == path) else {
                continue;
            };
            let (_, to) = missing.swap_remove(index);
            ensure!(entry.header().entry_type().is_file(), "{} is no file in the lab", path.display());
            let mut file = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
            io::copy(&mut entry, &mut file).with_context(|| format!("cannot write {}", to.display()))?;
        }
        match missing.first() {
            Some((from, _)) => bail!("the command left no file {}", from.display()),
            None => Ok(()),
        }
    }
}

/// What the lab's init said, as a result.
fn ended(finished: &machine::Finished) -> anyhow::Result<Ended> {
    for line in finished.status.lines() {
        if let Some(status) = line.strip_prefix("exit ") {
            let status = status.trim().parse().with_context(|| format!("odd exit status {status:?}"))?;
            return Ok(Ended::Exit(status));
        }
        if let Some(why) = line.strip_prefix("failed ") {
            bail!("the lab failed: {why}");
        }
    }
    let what = match finished.end {
        machine::End::Late => return Ok(Ended::Late),
        machine::End::StoodStill => return Ok(Ended::StoodStill),
        machine::End::NotUp => "the lab did not come up",
        machine::End::Own => "the lab ended before its command did",
    };
    match finished.console.trim() {
        "" => bail!("{what}, and its console said nothing"),
        console => bail!("{what}; its console said:\n{console}"),
    }
}

fn parse_file(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (from, to) = text.rsplit_once(':').unwrap_or((text, ""));
    let from = Path::new(from);
    let to = match (to, from.file_name()) {
        ("", Some(name)) => Path::new("/root").join(name),
        ("", None) => return Err("names no file".to_owned()),
        (to, _) => PathBuf::from(to),
    };
    Ok((from.to_owned(), to))
}

fn parse_out(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (from, to) = text.split_once(':').ok_or("expected LAB:HOST")?;
    Ok((from.into(), to.into()))
}

fn parse_env(text: &str) -> Result<(String, OsString), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(valid) {
        return Err(format!("{name:?} is no variable name"));
    }
    Ok((name.to_owned(), value.into()))
}

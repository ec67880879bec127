//! What every hypervisor has to do, as tests.
//!
//! The suite boots a small guest that obeys one-line commands on its serial console, and compares
//! what it answers and how its machine ends with what the [`Machine`] contract says. Whoever
//! implements [`Hypervisor`] brings such a guest and calls [`TestBed::run`]; it panics at the first
//! check that fails, naming it.
//!
//! # The guest
//!
//! It prints `GUEST READY` when it is up. Then it answers each line with one line:
//!
//! | command | answer |
//! |---|---|
//! | `ping WORD` | `pong WORD` |
//! | `cpus`, `memory`, `disks` | `cpus N`, `memory MIB` (within a fifth), `disks N` |
//! | `dmi FIELD` | `dmi TEXT`: a field of the SMBIOS tables, by its name in Linux's `/sys/class/dmi/id` |
//! | `size D`, `serial D` | `size BYTES`, `serial TEXT` of disk `D`, counted from 0 |
//! | `read D S` | `data TEXT`: sector `S` up to its first zero byte, from the disk itself |
//! | `write D S WORD` | `wrote`, after sector `S` holds `WORD` and zeroes |
//! | `flush D` | `flushed` |
//! | `nets` | `nets N`: how many network ports it has |
//! | `mac N`, `mtu N` | `mac ADDRESS`, `mtu BYTES` of port `N`, counted from 0 |
//! | `up N IP` | `up`; from then on port `N` answers ARP and ICMP echo requests for that address |
//! | `remember WORD` | `remembered`, after it holds the word in its memory |
//! | `recall` | `recalled WORD` |
//! | any of these that the disk refuses | `error` |
//! | `poweroff`, `reboot` | none: it does so |
//! | `crash`, `panic` | none: it has a triple fault, or says that its kernel panicked (`unsupported` if it cannot) |
//! | `spin` | `spinning`, and never again anything |

mod disks;
mod hot_plug;
mod life;
mod net_hot_plug;
mod nets;
mod save;

use std::num::NonZeroU32;
use std::path::Path;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use storage_block::{Disk, MemoryDisk};

use crate::console::{Console, ConsoleReader};
use crate::machine::{
    Boot, BootFile, DiskSpec, ExitCause, Hypervisor, Identity, Machine, MachineErrorKind, MachineSpec,
    MachineState,
};
use crate::net::{self, NetPort};

/// A hypervisor under test, and the guest it is tested with.
///
/// The checks count the process's threads and descriptors, so run it alone in its process: one
/// `#[test]` in a file of its own.
///
/// ```no_run
/// use std::time::Duration;
/// use ami_core::Architecture;
/// use instance_core::machine::Boot;
/// use instance_core::testing::{FakeHypervisor, conformance::{Link, TestBed}, fake_kernel};
///
/// let bed = TestBed {
///     hypervisor: &FakeHypervisor::new(),
///     boot: Boot::new(fake_kernel("the conformance guest")?, None, ""),
///     architecture: Architecture::X86_64,
///     foreign_architecture: Architecture::Arm64,
///     patience: Duration::from_secs(10),
///     kill_within: Duration::from_secs(1),
///     vcpus: 2,
///     memory_mib: 128,
///     link: Link::cable,
/// };
/// bed.run();
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct TestBed<'a> {
    /// The hypervisor.
    pub hypervisor: &'a dyn Hypervisor,
    /// The guest.
    pub boot: Boot,
    /// The guest's architecture.
    pub architecture: Architecture,
    /// An architecture that the hypervisor does not run.
    pub foreign_architecture: Architecture,
    /// How long the guest may take to come up or to answer.
    pub patience: Duration,
    /// Within what time a guest that spins must be dead after [`Machine::kill`] and [`Machine::reset`].
    pub kill_within: Duration,
    /// How many vCPUs the multiprocessor check asks for.
    pub vcpus: u32,
    /// The memory of each machine, in MiB.
    pub memory_mib: u32,
    /// What a network port is plugged into by.
    pub link: fn() -> Link,
}

/// A way between a machine and what its network port is plugged into.
#[allow(missing_debug_implementations, reason = "it is taken apart at once")]
pub struct Link {
    /// The machine's end.
    pub machine: NetPort,
    /// The other end, by which complete frames come and go.
    pub network: NetPort,
    /// Whether anybody still has the machine's end.
    pub is_held: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Link {
    /// A [cable](net::link).
    ///
    /// ```
    /// use instance_core::testing::conformance::Link;
    ///
    /// let Link { machine, is_held, .. } = Link::cable();
    /// drop(machine);
    /// assert!(!is_held());
    /// ```
    pub fn cable() -> Self {
        let (machine, network) = net::link();
        let other = network.clone();
        Self { machine, network, is_held: Box::new(move || other.is_connected()) }
    }
}

type Check = (&'static str, fn(&TestBed<'_>));

const CHECKS: &[Check] = &[
    ("says how it runs guest code", says_how_it_runs_guest_code),
    ("refuses what it cannot do", refuses_what_it_cannot_do),
    ("refuses a kernel that is none", refuses_a_kernel_that_is_none),
    ("walks the states of its life", life::walks_the_states_of_its_life),
    ("talks on the console", talks_on_the_console),
    ("shows the guest its hardware", shows_the_guest_its_hardware),
    ("tells the guest who it is", tells_the_guest_who_it_is),
    ("reads and writes disks", disks::reads_and_writes_disks),
    ("flushes when the guest does", disks::flushes_when_the_guest_does),
    ("tells the guest of a disk that fails", disks::tells_the_guest_of_a_disk_that_fails),
    ("refuses writes to a read-only disk", disks::refuses_writes_to_a_read_only_disk),
    ("sees a power-off", life::sees_a_power_off),
    ("sees a reboot", life::sees_a_reboot),
    ("sees a triple fault", life::sees_a_triple_fault),
    ("sees a panic", life::sees_a_panic),
    ("kills a guest that spins", life::kills_a_guest_that_spins),
    ("resets a guest that spins", life::resets_a_guest_that_spins),
    ("resets a guest that is paused", life::resets_a_guest_that_is_paused),
    ("stands still while paused", life::stands_still_while_paused),
    ("delivers the power button", life::delivers_the_power_button),
    ("runs two machines side by side", life::runs_two_machines_side_by_side),
    ("attaches and detaches disks as it runs", hot_plug::attaches_and_detaches),
    ("takes a disk from a guest that holds it", hot_plug::takes_a_disk_that_is_held),
    ("tells the guest that a disk has grown", hot_plug::grows),
    ("refuses network ports that cannot be", nets::refuses_ports_that_cannot_be),
    ("carries frames to and from network ports", nets::carries_frames),
    ("moves no frame of a network port while paused", nets::moves_no_frame_while_paused),
    ("holds network ports to limits", nets::holds_ports_to_limits),
    ("attaches and detaches network ports as it runs", net_hot_plug::attaches_and_detaches),
    ("takes a network port from a guest that holds it", net_hot_plug::takes_a_port_that_is_held),
    ("ends network ports with their machine", nets::ports_end_with_their_machine),
    ("refuses to save and restore what it cannot", save::refuses_what_it_cannot),
    ("saves a machine and restores several", save::saves_and_restores),
    ("restores a machine with its disks in any order", save::restores_with_disks_in_any_order),
    ("gives everything back", life::gives_everything_back),
];

impl TestBed<'_> {
    /// Runs every check, in order, naming each on standard output.
    ///
    /// # Panics
    ///
    /// At the first check that fails.
    pub fn run(&self) {
        self.run_those(|_| true);
    }

    /// Runs the checks whose names `wanted` picks, as [`run`](Self::run) does: for a second way to make machines
    /// that differ in one thing only.
    ///
    /// # Panics
    ///
    /// At the first check that fails, and where none is picked.
    pub fn run_those(&self, wanted: impl Fn(&str) -> bool) {
        let picked: Vec<_> = CHECKS.iter().filter(|(name, _)| wanted(name)).collect();
        assert!(!picked.is_empty(), "no check has such a name");
        for (name, check) in picked {
            let begun = Instant::now();
            println!("{}: {name} ...", self.hypervisor.capabilities().name);
            check(self);
            println!("{}: {name} ... ok ({:.1?})", self.hypervisor.capabilities().name, begun.elapsed());
        }
    }

    fn spec(&self, console: &Console, disks: Vec<DiskSpec>, runtime_dir: &Path) -> MachineSpec {
        let mut spec = MachineSpec::new("conformance", self.architecture, self.boot.clone(), console.port());
        spec.memory_mib = NonZeroU32::new(self.memory_mib).expect("the test bed gives memory");
        spec.disks = disks;
        spec.runtime_dir = own_dir(runtime_dir);
        spec
    }

    /// A guest that is up, with these disks.
    fn up(&self, disks: Vec<DiskSpec>) -> Guest {
        self.up_with(disks, |_| ())
    }

    fn up_with(&self, disks: Vec<DiskSpec>, change: impl FnOnce(&mut MachineSpec)) -> Guest {
        let runtime_dir = tempfile::tempdir().expect("a temporary directory");
        let console = Console::new();
        let mut spec = self.spec(&console, disks, runtime_dir.path());
        change(&mut spec);
        let machine = self.hypervisor.create(spec).expect("the machine is made");
        machine.start().expect("the machine starts");
        let reader = console.reader();
        let mut guest = Guest { machine, console, reader, patience: self.patience, runtime_dir };
        guest.hear("GUEST READY");
        guest.hear("\n");
        guest
    }
}

/// The machine's own directory, which is not there before the machine makes it.
fn own_dir(dir: &Path) -> std::path::PathBuf {
    dir.join("machine")
}

/// A guest under test.
struct Guest {
    // Dropped before the directory it uses.
    machine: Box<dyn Machine>,
    console: Console,
    reader: ConsoleReader,
    patience: Duration,
    runtime_dir: tempfile::TempDir,
}

impl Guest {
    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    fn tell(&self, line: &str) {
        self.console.write_all(format!("{line}\n").as_bytes(), self.deadline()).expect("the guest reads");
    }

    fn hear(&mut self, text: &str) -> String {
        let heard = self.reader.wait_for(text, self.deadline());
        let state = self.machine.state().get();
        let heard = heard.unwrap_or_else(|e| panic!("{e}; the machine is {state:?}"));
        String::from_utf8_lossy(&heard).into_owned()
    }

    /// Sends a command and returns the answer that begins with `kind`, without that word.
    fn ask(&mut self, line: &str, kind: &str) -> String {
        self.ask_any(line, &[kind])
    }

    /// The same where the answer may be of several kinds.
    fn ask_any(&mut self, line: &str, kinds: &[&str]) -> String {
        self.tell(line);
        loop {
            let heard = self.hear("\n");
            let heard = heard.trim();
            // A terminal may echo the command before the answer.
            match kinds.iter().find_map(|kind| heard.strip_prefix(kind)) {
                Some(rest) if heard != line => return rest.trim().to_owned(),
                _ => {}
            }
        }
    }

    #[track_caller]
    fn expect_answer(&mut self, line: &str, answer: &str) {
        let kind = answer.split(' ').next().unwrap_or_default();
        let rest = answer[kind.len()..].trim();
        assert_eq!(self.ask(line, kind), rest, "the answer to {line:?}");
    }

    #[track_caller]
    fn expect_exit(&self) -> ExitCause {
        let state = self.machine.state().wait(self.deadline(), |s| s.exit_cause().is_some());
        match state {
            Ok(MachineState::Exited(cause)) => cause,
            other => panic!("the machine did not end: {other:?}"),
        }
    }
}

fn disk(sectors: u64) -> Disk {
    MemoryDisk::new(sectors * 512).expect("a whole number of sectors").into_disk()
}

fn sector_of(word: &str) -> Vec<u8> {
    let mut bytes = word.as_bytes().to_vec();
    bytes.resize(512, 0);
    bytes
}

fn word_at(disk: &Disk, sector: u64) -> String {
    let mut bytes = [0; 512];
    disk.read_at(&mut bytes, sector * 512).expect("the disk can be read");
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

fn says_how_it_runs_guest_code(bed: &TestBed<'_>) {
    let said = bed.hypervisor.execution().expect("it can be told");
    // Measured once or each time, it is the same host.
    let again = bed.hypervisor.execution().expect("it can be told");
    assert_eq!(said.is_hardware(), again.is_hardware(), "{said:?}, then {again:?}");
}

fn refuses_what_it_cannot_do(bed: &TestBed<'_>) {
    let can = bed.hypervisor.capabilities();
    for what in ["architecture", "vCPUs", "half a core", "memory", "disks", "serial number", "identity"] {
        let mut spec = bed.spec(&Console::new(), Vec::new(), &std::env::temp_dir());
        match what {
            "architecture" => spec.architecture = bed.foreign_architecture,
            "vCPUs" => spec.vcpus = NonZeroU32::new(can.max_vcpus + 1).expect("more than none"),
            "half a core" => spec.threads_per_core = spec.vcpus.saturating_add(1),
            "memory" => spec.memory_mib = NonZeroU32::MAX,
            "disks" => spec.disks = vec![DiskSpec::new(disk(1), "many"); can.max_disks + 1],
            "serial number" => spec.disks = vec![DiskSpec::new(disk(1), "longer than 20 bytes.")],
            _ => {
                let mut bad = identity();
                bad.product = "line\nline".to_owned();
                spec.identity = Some(bad);
            }
        }
        let refused = bed.hypervisor.create(spec).expect_err(what);
        assert_eq!(refused.kind(), MachineErrorKind::Unsupported, "{what}: {refused}");
    }
}

fn refuses_a_kernel_that_is_none(bed: &TestBed<'_>) {
    use std::io::Write;
    for bytes in [&b""[..], b"not a kernel", &[0; 4096]] {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("it can be written");
        let mut spec = bed.spec(&Console::new(), Vec::new(), &std::env::temp_dir());
        spec.boot.kernel = BootFile::new(file).expect("it has a length");
        let refused = bed.hypervisor.create(spec).expect_err("a kernel of no format");
        assert_eq!(refused.kind(), MachineErrorKind::Boot, "{refused}");
    }
}

fn talks_on_the_console(bed: &TestBed<'_>) {
    let mut guest = bed.up(Vec::new());
    guest.expect_answer("ping hello", "pong hello");
    // Longer than any serial port's FIFO.
    let long = "0123456789".repeat(20);
    guest.expect_answer(&format!("ping {long}"), &format!("pong {long}"));
    for n in 0..20 {
        guest.expect_answer(&format!("ping {n}"), &format!("pong {n}"));
    }
}

fn shows_the_guest_its_hardware(bed: &TestBed<'_>) {
    let disks =
        vec![DiskSpec::new(disk(2048), "vol-first"), DiskSpec::new(disk(4096), "vol-0123456789abcdef")];
    let mut guest = bed.up_with(disks, |spec| {
        spec.vcpus = NonZeroU32::new(bed.vcpus).expect("the test bed gives vCPUs");
    });
    guest.expect_answer("cpus", &format!("cpus {}", bed.vcpus));
    let seen: u32 = guest.ask("memory", "memory").parse().expect("a number");
    let given = bed.memory_mib;
    assert!(seen <= given && seen >= given - given / 5, "{seen} of {given} MiB are seen");
    guest.expect_answer("disks", "disks 2");
    guest.expect_answer("size 0", "size 1048576");
    guest.expect_answer("size 1", "size 2097152");
    guest.expect_answer("serial 0", "serial vol-first");
    guest.expect_answer("serial 1", "serial vol-0123456789abcdef");
}

fn identity() -> Identity {
    let mut identity = Identity::new(*b"\xec\x2a\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab");
    identity.vendor = "Amazon EC2".to_owned();
    identity.product = "t2.nano, or so".to_owned();
    identity.asset_tag = "i-0123456789abcdef0".to_owned();
    identity
}

fn tells_the_guest_who_it_is(bed: &TestBed<'_>) {
    let uuid = "ec2a0123-4567-89ab-cdef-0123456789ab";
    let mut guest = bed.up_with(Vec::new(), |spec| spec.identity = Some(identity()));
    for (field, text) in [
        ("bios_vendor", "Amazon EC2"),
        ("sys_vendor", "Amazon EC2"),
        ("product_name", "t2.nano, or so"),
        ("product_uuid", uuid),
        ("product_serial", uuid),
        ("board_asset_tag", "i-0123456789abcdef0"),
        ("chassis_asset_tag", "Amazon EC2"),
    ] {
        guest.expect_answer(&format!("dmi {field}"), &format!("dmi {text}"));
    }
}

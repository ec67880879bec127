//! A hypervisor without a virtual machine.
//!
//! Its machines speak the conformance guest's protocol themselves (see
//! [`conformance`](super::conformance)), on real disks and a real console, so that a region and
//! everything above it can be tested without a kernel.

mod memory;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use ami_core::{Architecture, Arm64, X86, X86_64};
use memory::Memory;
use storage_block::SECTOR;

use crate::console::ConsolePort;
use crate::machine::{
    Boot, BootFile, Capabilities, Detach, DiskSpec, Execution, ExitCause, Hypervisor, Machine, MachineError,
    MachineErrorKind, MachineSpec, MachineState, NetSpec, RestoreSpec, Runs,
};
use crate::net::Frame;
use crate::testing::ping::Station;
use crate::watch::{Publisher, Watch};

const MAX_DISKS: usize = 32;
const MAX_NETS: usize = 15;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel that [`FakeHypervisor`] takes for one: an ELF header's first bytes and `text`, in an
/// unnamed temporary file.
///
/// ```
/// use instance_core::testing::fake_kernel;
///
/// assert_eq!(fake_kernel("mine")?.read()?, b"\x7fELFmine");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
///
/// What the operating system says when the temporary file is made.
pub fn fake_kernel(text: &str) -> io::Result<BootFile> {
    use std::io::Write;
    let mut file = tempfile::tempfile()?;
    file.write_all(&ELF_MAGIC)?;
    file.write_all(text.as_bytes())?;
    BootFile::new(file)
}

/// Bytes that an image can carry as its kernel: a bare ELF header for 64-bit x86.
///
/// ```
/// use instance_core::{DirectBoot, testing::tiny_elf};
///
/// let boot = DirectBoot::new(tiny_elf(), None, ""); // for an image whose machines are fake
/// assert_eq!(tiny_elf().len(), 64);
/// ```
pub fn tiny_elf() -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..4].copy_from_slice(&ELF_MAGIC);
    // ELFCLASS64, little endian, version 1; an executable for x86-64 (System V ABI, "ELF header").
    header[4..7].copy_from_slice(&[2, 1, 1]);
    header[16] = 2;
    header[18] = 62;
    header[20] = 1;
    header[52] = 64;
    header
}

/// Makes machines that run no guest code.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
/// use instance_core::machine::{Boot, Hypervisor, MachineSpec};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
///
/// let console = Console::new();
/// let boot = Boot::new(fake_kernel("")?, None, "");
/// let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, console.port());
/// let machine = FakeHypervisor::new().create(spec)?;
/// machine.start()?;
/// console.reader().wait_for("GUEST READY", Instant::now() + Duration::from_secs(10))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    architectures: Vec<Architecture>,
    fail_next: Arc<AtomicBool>,
}

impl FakeHypervisor {
    /// One that claims to run 64-bit x86.
    pub fn new() -> Self {
        Self::with_architectures(vec![Architecture::X86_64])
    }

    /// One that claims to run these.
    pub fn with_architectures(architectures: Vec<Architecture>) -> Self {
        Self { architectures, fail_next: Arc::default() }
    }

    /// Makes the next [`create`](Hypervisor::create) fail as if the host had refused.
    ///
    /// ```
    /// use ami_core::Architecture::Arm64;
    /// use instance_core::console::Console;
    /// use instance_core::machine::{Boot, Hypervisor, MachineErrorKind, MachineSpec};
    /// use instance_core::testing::{FakeHypervisor, fake_kernel};
    ///
    /// let hypervisor = FakeHypervisor::with_architectures(vec![Arm64]);
    /// let boot = Boot::new(fake_kernel("")?, None, "");
    /// let spec = MachineSpec::new("demo", Arm64, boot, Console::new().port());
    /// hypervisor.fail_next_create();
    /// let refused = hypervisor.create(spec.clone()).err().map(|e| e.kind());
    /// assert_eq!(refused, Some(MachineErrorKind::Host));
    /// assert!(hypervisor.create(spec).is_ok(), "only the next one fails");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn fail_next_create(&self) {
        self.fail_next.store(true, Ordering::SeqCst);
    }
}

impl Default for FakeHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl Runs<X86> for FakeHypervisor {}
impl Runs<X86_64> for FakeHypervisor {}
impl Runs<Arm64> for FakeHypervisor {}

impl Hypervisor for FakeHypervisor {
    fn capabilities(&self) -> Capabilities {
        let execution = Execution::Emulated { measured: "no guest code runs".to_owned() };
        let mut capabilities = Capabilities::new("fake", self.architectures.clone(), execution);
        capabilities.max_vcpus = 64;
        capabilities.max_disks = MAX_DISKS;
        capabilities.max_nets = MAX_NETS;
        capabilities.power_button = true;
        capabilities.hot_plug = true;
        capabilities.live_growth = true;
        capabilities.save = true;
        capabilities
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        if self.fail_next.swap(false, Ordering::SeqCst) {
            return Err(MachineError::new(MachineErrorKind::Host, "the fake host was told to refuse"));
        }
        check_kernel(&spec.boot)?;
        let memory = Memory::new(&spec);
        Ok(Box::new(FakeMachine::new(MachineState::Created, memory, spec.disks, spec.nets, spec.console)))
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        let memory = Memory::restore(&spec)?;
        let machine = FakeMachine::new(MachineState::Paused, memory, spec.disks, spec.nets, spec.console);
        machine.run_guest()?;
        Ok(Box::new(machine))
    }
}

fn check_kernel(boot: &Boot) -> Result<(), MachineError> {
    let kernel = boot
        .kernel
        .read()
        .map_err(|e| MachineError::new(MachineErrorKind::Boot, "cannot read the kernel").with_source(e))?;
    if kernel.starts_with(&ELF_MAGIC) {
        Ok(())
    } else {
        Err(MachineError::new(MachineErrorKind::Boot, "the kernel is not an ELF file"))
    }
}

/// What wakes the machine's thread.
#[derive(Debug, Default)]
struct Signals {
    waiting: Mutex<bool>,
    changed: Condvar,
}

impl Signals {
    fn raise(&self) {
        *lock(&self.waiting) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut waiting = lock(&self.waiting);
        while !*waiting {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting = false;
    }
}

#[derive(Debug)]
struct FakeMachine {
    state: Arc<Publisher<MachineState>>,
    signals: Arc<Signals>,
    power_button: Arc<AtomicBool>,
    console: ConsolePort,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Held by the guest while it serves a command, so that pausing waits for it.
    busy: Arc<Mutex<()>>,
    disks: Arc<Mutex<Vec<DiskSpec>>>,
    /// Whether the first disk is one of the specification, and stays.
    has_root: bool,
    memory: Arc<Mutex<Memory>>,
    /// The network ports, until the guest has them.
    nets: Mutex<Vec<NetSpec>>,
}

impl FakeMachine {
    fn new(
        state: MachineState,
        memory: Memory,
        disks: Vec<DiskSpec>,
        nets: Vec<NetSpec>,
        console: ConsolePort,
    ) -> Self {
        Self {
            has_root: !disks.is_empty(),
            disks: Arc::new(Mutex::new(disks)),
            state: Arc::new(Publisher::new(state)),
            signals: Arc::default(),
            power_button: Arc::default(),
            console,
            thread: Mutex::new(None),
            busy: Arc::default(),
            memory: Arc::new(Mutex::new(memory)),
            nets: Mutex::new(nets),
        }
    }

    /// Starts the guest's thread, which does what the machine's state says.
    fn run_guest(&self) -> Result<(), MachineError> {
        let signals = self.signals.clone();
        self.console.set_input_notifier(Some(Arc::new(move || signals.raise())));
        let nets = std::mem::take(&mut *lock(&self.nets));
        let guest = FakeGuest {
            state: self.state.clone(),
            signals: self.signals.clone(),
            power_button: self.power_button.clone(),
            busy: self.busy.clone(),
            console: self.console.clone(),
            disks: self.disks.clone(),
            memory: self.memory.clone(),
            nets: nets.into_iter().map(FakePort).collect(),
        };
        guest.take_up_nets();
        let spawned = std::thread::Builder::new().name("fake-machine".to_owned()).spawn(move || guest.run());
        *lock(&self.thread) = Some(spawned.map_err(|e| {
            MachineError::new(MachineErrorKind::Host, "cannot start the machine's thread").with_source(e)
        })?);
        Ok(())
    }

    fn go(&self, action: &str, from: MachineState, to: MachineState) -> Result<(), MachineError> {
        if self.state.update(|s| {
            *s == from && {
                *s = to;
                true
            }
        }) {
            self.signals.raise();
            Ok(())
        } else {
            Err(MachineError::wrong_state(action, &self.state.get()))
        }
    }
}

impl FakeMachine {
    /// The disks of a machine that is running or paused.
    fn live_disks(&self, action: &str) -> Result<MutexGuard<'_, Vec<DiskSpec>>, MachineError> {
        let disks = lock(&self.disks);
        match self.state.get() {
            MachineState::Running | MachineState::Paused => Ok(disks),
            state => Err(MachineError::wrong_state(action, &state)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in `disks` the one with this serial number is.
fn find(disks: &[DiskSpec], serial: &str) -> Result<usize, MachineError> {
    disks.iter().position(|disk| disk.serial == serial).ok_or_else(|| MachineError::no_such_disk(serial))
}

impl Machine for FakeMachine {
    fn state(&self) -> Watch<MachineState> {
        self.state.watch()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.go("start", MachineState::Created, MachineState::Running)?;
        self.run_guest()
    }

    fn pause(&self) -> Result<(), MachineError> {
        let _idle = lock(&self.busy);
        self.go("pause", MachineState::Running, MachineState::Paused)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.go("resume", MachineState::Paused, MachineState::Running)
    }

    fn power_button(&self) -> Result<(), MachineError> {
        if self.state.get() != MachineState::Running {
            return Err(MachineError::wrong_state("press the power button of", &self.state.get()));
        }
        self.power_button.store(true, Ordering::SeqCst);
        self.signals.raise();
        Ok(())
    }

    fn attach_disk(&self, disk: DiskSpec) -> Result<(), MachineError> {
        disk.check()?;
        let mut disks = self.live_disks("attach a disk to")?;
        if find(&disks, &disk.serial).is_ok() {
            return Err(MachineError::disk_exists(&disk.serial));
        }
        if disks.len() >= MAX_DISKS {
            let what = format!("a fake machine has at most {MAX_DISKS} disks");
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        disks.push(disk);
        Ok(())
    }

    fn detach_disk(&self, serial: &str, how: Detach) -> Result<(), MachineError> {
        let action = "detach a disk from";
        loop {
            // A command that the guest serves may use the disk.
            let busy = lock(&self.busy);
            let mut disks = self.live_disks(action)?;
            let n = find(&disks, serial)?;
            if n == 0 && self.has_root {
                let what = format!("disk {serial:?} is the root disk, which stays");
                return Err(MachineError::new(MachineErrorKind::Unsupported, what));
            }
            let until = match how {
                Detach::Ask { until } if self.state.get() == MachineState::Paused => until,
                _ => {
                    disks.remove(n);
                    return Ok(());
                }
            };
            drop((disks, busy));
            if self.state.watch().wait(until, |state| *state != MachineState::Paused).is_err() {
                return Err(MachineError::held(serial));
            }
        }
    }

    fn disk_grown(&self, serial: &str) -> Result<(), MachineError> {
        // The guest asks the disk for its size every time.
        find(&self.live_disks("grow a disk of")?, serial).map(drop)
    }

    fn save(&self, to: &File) -> Result<(), MachineError> {
        let _idle = lock(&self.busy);
        match self.state.get() {
            MachineState::Paused => lock(&self.memory).save(&lock(&self.disks), to),
            state => Err(MachineError::wrong_state("save", &state)),
        }
    }

    fn kill(&self) {
        exit(&self.state, ExitCause::Killed);
        self.signals.raise();
        if let Some(thread) = lock(&self.thread).take() {
            // A guest that panicked has nothing left to end.
            let _ = thread.join();
        }
        lock(&self.nets).clear();
        lock(&self.disks).clear();
        self.console.set_input_notifier(None);
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn exit(state: &Publisher<MachineState>, cause: ExitCause) {
    state.update(|s| {
        let alive = s.exit_cause().is_none();
        if alive {
            *s = MachineState::Exited(cause);
        }
        alive
    });
}

/// A network port in use.
struct FakePort(NetSpec);

impl FakePort {
    /// Answers a frame as who has `address`; says whether there was one.
    fn serve(&self, memory: &memory::Port) -> bool {
        let Some(address) = memory.address else { return false };
        let Some(frame) = self.0.port.recv() else { return false };
        let own = Station { mac: self.0.mac, address };
        if let Some(answer) = own.answer(&frame.data) {
            // Lost where there is no room, as on any network.
            let _ = self.0.port.send(Frame::new(answer));
        }
        true
    }
}

impl Drop for FakePort {
    fn drop(&mut self) {
        self.0.port.set_waker(None);
    }
}

struct FakeGuest {
    state: Arc<Publisher<MachineState>>,
    signals: Arc<Signals>,
    power_button: Arc<AtomicBool>,
    busy: Arc<Mutex<()>>,
    console: ConsolePort,
    disks: Arc<Mutex<Vec<DiskSpec>>>,
    memory: Arc<Mutex<Memory>>,
    /// Plugged in for as long as it runs.
    nets: Vec<FakePort>,
}

impl FakeGuest {
    fn run(self) {
        if !std::mem::replace(&mut lock(&self.memory).booted, true) {
            self.console.write_output(b"GUEST READY\n");
        }
        loop {
            match self.state.get() {
                MachineState::Exited(_) => return,
                MachineState::Running if self.power_button.load(Ordering::SeqCst) => {
                    return exit(&self.state, ExitCause::PowerOff);
                }
                MachineState::Running if self.serve() => {}
                _ => self.signals.wait(),
            }
        }
    }

    /// Handles one byte of input; says whether there was one.
    fn serve(&self) -> bool {
        let _busy = lock(&self.busy);
        if self.state.get() != MachineState::Running {
            return true;
        }
        let mut memory = lock(&self.memory);
        if self.nets.iter().zip(&memory.nets).any(|(net, memory)| net.serve(memory)) {
            return true;
        }
        let mut byte = [0];
        if self.console.read_input(&mut byte) == 0 {
            return false;
        }
        if !matches!(byte, [b'\n' | b'\r']) {
            memory.line.push(byte[0]);
        } else if !memory.line.is_empty() {
            let line = std::mem::take(&mut memory.line);
            if let Some(answer) = self.answer(&String::from_utf8_lossy(&line), &mut memory) {
                self.console.write_output(format!("{answer}\n").as_bytes());
            }
        }
        true
    }

    fn answer(&self, line: &str, memory: &mut Memory) -> Option<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["ping", word] => format!("pong {word}"),
            ["cpus"] => format!("cpus {}", memory.vcpus),
            ["memory"] => format!("memory {}", memory.memory_mib),
            ["remember", word] => {
                memory.word = word.to_owned();
                "remembered".to_owned()
            }
            ["recall"] => format!("recalled {}", memory.word),
            ["disks"] => format!("disks {}", lock(&self.disks).len()),
            ["dmi", field] => format!("dmi {}", memory.dmi.get(field).map_or("", String::as_str)),
            ["size", d] => self.on(d, |disk| Ok(format!("size {}", disk.disk.size()))),
            ["serial", d] => self.on(d, |disk| Ok(format!("serial {}", disk.serial))),
            ["read", d, s] => self.on(d, |disk| read(disk, s)),
            ["write", d, s, word] => self.on(d, |disk| write(disk, s, word)),
            ["flush", d] => self.on(d, |disk| disk.disk.flush().map(|()| "flushed".to_owned())),
            ["nets"] => format!("nets {}", memory.nets.len()),
            ["mac", n] => memory.net(n).map_or_else(error, |net| format!("mac {}", net.mac)),
            ["mtu", n] => memory.net(n).map_or_else(error, |net| format!("mtu {}", net.mtu)),
            ["up", n, address] => match (memory.net(n), address.parse()) {
                (Some(net), Ok(address)) => {
                    net.address = Some(address);
                    self.take_up_nets();
                    "up".to_owned()
                }
                _ => error(),
            },
            ["poweroff"] => return self.end(ExitCause::PowerOff),
            ["reboot"] => return self.end(ExitCause::Reset),
            ["crash"] => return self.end(ExitCause::TripleFault(None)),
            ["panic"] => return self.end(ExitCause::Panic),
            ["spin"] => "spinning".to_owned(),
            _ => "unknown".to_owned(),
        };
        Some(answer)
    }

    /// Has frames wake the guest.
    fn take_up_nets(&self) {
        for net in &self.nets {
            let signals = self.signals.clone();
            net.0.port.set_waker(Some(Arc::new(move || signals.raise())));
        }
    }

    fn end(&self, cause: ExitCause) -> Option<String> {
        exit(&self.state, cause);
        None
    }

    fn on(&self, index: &str, act: impl FnOnce(&DiskSpec) -> storage_block::Result<String>) -> String {
        let disk = index.parse().ok().and_then(|i: usize| lock(&self.disks).get(i).cloned());
        disk.and_then(|d| act(&d).ok()).unwrap_or_else(error)
    }
}

fn error() -> String {
    "error".to_owned()
}

fn read(disk: &DiskSpec, sector: &str) -> storage_block::Result<String> {
    let mut bytes = [0; SECTOR as usize];
    disk.disk.read_at(&mut bytes, offset(sector))?;
    let word = bytes.split(|b| *b == 0).next().unwrap_or_default();
    Ok(format!("data {}", String::from_utf8_lossy(word)))
}

fn write(disk: &DiskSpec, sector: &str, word: &str) -> storage_block::Result<String> {
    let mut bytes = word.as_bytes().to_vec();
    bytes.resize(SECTOR as usize, 0);
    disk.disk.write_at(&bytes, offset(sector))?;
    Ok("wrote".to_owned())
}

/// The byte offset of a sector; one that is no number lies outside every disk.
fn offset(sector: &str) -> u64 {
    sector.parse::<u64>().ok().and_then(|s| s.checked_mul(SECTOR)).unwrap_or(u64::MAX)
}

//! A machine: what its handle, its processors and its devices share, and how it begins and ends.

mod calls;
mod parts;
#[cfg(test)]
mod tests;
mod vm;

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{ptr, thread};

use instance_core::machine::{
    Detach, ExitCause, Machine, MachineError, MachineSpec, MachineState, RestoreSpec,
};
use instance_core::net::MacAddress;
use instance_core::watch::Publisher;
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use self::parts::{Parts, Places};
pub(crate) use self::vm::make_vm;
use crate::VhostNet;
use crate::boot::Plan;
use crate::bus::Devices;
use crate::confine::{self, Filter, Filters};
use crate::cpuid::Topology;
use crate::error::{HostContext, Result, unsupported};
use crate::exits::Exits;
use crate::gate::Gate;
use crate::memory::Memory;
use crate::pci::Bus;
use crate::saved::{self, Loaded, Platform, Processor, Speed};
use crate::slots::{Other, Placed, Role};
use crate::thread::{Stacks, Thread, let_others_go_on};
use crate::virtio::{Spares, Wish};
use crate::{Confinement, Kvm, Transport, acpi, cpu, generation, kick, memory, smbios, vcpu};

/// A machine's handle.
#[derive(Debug)]
pub(crate) struct KvmMachine {
    shared: Arc<Shared>,
    /// Held while a state change is asked for, so that each finds the state that it was checked against.
    actions: Mutex<()>,
}

/// What the threads of a machine share. Declared in the order in which it has to be given back: KVM's
/// virtual machine before the memory that it was given.
#[derive(Debug)]
pub(crate) struct Shared {
    name: String,
    /// Each in the hands of its thread while that runs it.
    processors: Vec<Mutex<VcpuFd>>,
    pub(crate) vm: VmFd,
    pub(crate) devices: Devices,
    /// In which place the balloon is, if there is one, and what is wanted of it.
    balloon: Option<(usize, Arc<Wish>)>,
    /// What the threads of devices are confined by.
    filter: Option<Filter>,
    pub(crate) memory: Memory,
    /// The model-specific registers that are saved, where machines can be.
    msrs: Option<Arc<[u32]>>,
    /// Who moves the frames of network ports on TAP devices.
    pub(crate) vhost_net: VhostNet,
    pub(crate) gate: Gate,
    pub(crate) state: Publisher<MachineState>,
    /// How often each processor has left its guest.
    exits: Vec<Exits>,
    stacks: Arc<Stacks>,
    /// The memory of long frames that is to be used again.
    pub(crate) spares: Arc<Spares>,
    threads: Mutex<Threads>,
    /// Held while a device comes, so that whoever ends the machine finds its thread.
    pub(crate) plugging: Mutex<()>,
}

thread_local! {
    /// The machine whose thread this is, which keeps it for as long; only to be compared.
    static WORKS_FOR: Cell<*const Shared> = const { Cell::new(ptr::null()) };
}

/// The threads that run the guest. Those of devices are in their places.
#[derive(Debug, Default)]
struct Threads {
    vcpus: Vec<Thread>,
}

impl KvmMachine {
    /// Makes the machine and its threads, which wait for [`start`](Machine::start).
    pub(crate) fn create(kvm: &Kvm, spec: &MachineSpec) -> Result<Self> {
        let topology = Topology::new(spec.vcpus, spec.threads_per_core)?;
        let filters = kvm.confinement().map(Confinement::compile).transpose()?;
        let memory = memory::allocate(spec.memory_mib)?;
        let plan = Plan::new(&spec.boot, spec.architecture, &memory)?;
        let vm = make_vm(kvm, &memory)?;
        let transport = kvm.transport();
        let places = Places::of_new(spec);
        acpi::write(&memory, topology.count(), transport, places.count())?;
        generation::write_new(&memory)?;
        if let Some(identity) = &spec.identity {
            smbios::write(&memory, identity)?;
        }
        let entry = plan.load(&memory)?;
        let processors = (0..topology.count())
            .map(|number| {
                let vcpu = vm.create_vcpu(number.into()).host("KVM did not make a processor")?;
                cpu::set_up(&vcpu, number, topology, kvm.cpu_model(), entry, &memory)?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>>>()?;
        let MachineSpec { name, disks, nets, console, .. } = spec;
        let (vsock, virtio_console) = (spec.vsock.as_ref(), spec.virtio_console.as_ref());
        let parts = Parts {
            name,
            transport,
            disks,
            nets,
            vsock,
            places,
            console,
            virtio_console,
            vm,
            memory,
            processors,
        };
        Self::run(parts.put_together(kvm, MachineState::Created)?, filters)
    }

    /// Makes a machine that goes on where another was saved, when it is [resumed](Machine::resume).
    pub(crate) fn restore(kvm: &Kvm, mut spec: RestoreSpec) -> Result<Self> {
        let filters = kvm.confinement().map(Confinement::compile).transpose()?;
        let loaded = Loaded::read(&spec.saved)?;
        let state = &loaded.state;
        spec.order_disks(state.disks.iter().map(|disk| disk.serial.as_str()));
        spec.order_nets(state.nets.iter().map(|port| MacAddress(port.mac)));
        let spec = &spec;
        state.check(spec, kvm.most_processors())?;
        let memory = loaded.memory(&spec.saved)?;
        let vm = make_vm(kvm, &memory)?;
        let processors = (0..state.processors.len())
            .map(|number| vm.create_vcpu(number as u64).host("KVM did not make a processor"))
            .collect::<Result<Vec<_>>>()?;
        state.check_processors(kvm.cpu_model(), loaded.version, &processors)?;
        let msrs = kvm.msrs();
        for (vcpu, processor) in processors.iter().zip(&state.processors) {
            processor.check_msrs(msrs.as_deref().unwrap_or_default())?;
            // Before its counter, which is what it is at this speed.
            state.speed.restore(kvm.device(), vcpu)?;
            processor.restore(vcpu)?;
        }
        state.platform.restore(&vm)?;
        let RestoreSpec { name, disks, nets, console, .. } = spec;
        let (vsock, virtio_console) = (spec.vsock.as_ref(), spec.virtio_console.as_ref());
        let parts = Parts {
            name,
            transport: state.transport,
            disks,
            nets,
            vsock,
            places: Places::of_saved(state),
            console,
            virtio_console,
            vm,
            memory,
            processors,
        };
        let mut shared = parts.put_together(kvm, MachineState::Paused)?;
        shared.devices.restore(&shared.vm, &shared.memory, state)?;
        // Nobody has asked this one's guest for memory.
        shared.refresh_balloon();
        shared.refresh_grown(&state.disks);
        Self::run(shared, filters)
    }

    /// Starts the threads.
    fn run(mut shared: Shared, filters: Option<Filters>) -> Result<Self> {
        shared.filter = filters.as_ref().map(|filters| filters.device.clone());
        // Dropped on the way out below, which ends the threads that were made.
        let machine = Self { shared: Arc::new(shared), actions: Mutex::default() };
        machine.shared.devices.serial.connect();
        // Whoever makes the threads is a worker until they are there: so there is one to leave last,
        // even where the first thread cannot be made.
        machine.shared.gate.join();
        let spawned = machine.spawn(filters.as_ref().map(|filters| &filters.processor));
        if let Err(error) = &spawned {
            machine.shared.end(ExitCause::HostFailure(error.to_string()));
        }
        machine.shared.leave();
        spawned.map(|()| machine)
    }

    fn spawn(&self, of_processors: Option<&Filter>) -> Result<()> {
        for n in 0..self.shared.processors.len() {
            self.shared.gate.join();
            let work = move |shared: &Shared| shared.run_vcpu(n);
            let thread = self.shared.spawn(&format!("vcpu{n}"), of_processors, || (), work)?;
            self.shared.threads().vcpus.push(thread);
        }
        for placed in self.shared.devices.virtio.all() {
            self.shared.gate.join();
            self.shared.spawn_device(&placed)?;
        }
        Ok(())
    }

    /// Checks that the state allows an action. Until the guard is dropped no other begins.
    fn begin(&self, action: &str, from: &MachineState) -> Result<MutexGuard<'_, ()>> {
        let one_at_a_time = self.actions.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.shared.state.get();
        if now != *from {
            return Err(MachineError::wrong_state(action, &now));
        }
        tracing::debug!(machine = %self.shared.name, action);
        Ok(one_at_a_time)
    }

    /// Holds off other actions while something is taken by force. To ask for it may take long, and changes nothing meanwhile.
    fn begin_force(&self, how: &Detach) -> Option<MutexGuard<'_, ()>> {
        matches!(how, Detach::Force).then(|| self.actions.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// That devices come and go, where it would otherwise be said what machines do not.
    fn check_hot_plug(&self, what: &str) -> Result<()> {
        if self.shared.devices.pci.is_some() {
            return Ok(());
        }
        Err(unsupported(format!(
            "machines on virtio-mmio {what} while they run; those on PCI, the default transport, do"
        )))
    }

    /// Publishes the next state, unless the machine has ended meanwhile.
    fn publish(&self, action: &str, to: MachineState) -> Result<()> {
        let moved = self.shared.state.update(|state| {
            let alive = state.exit_cause().is_none();
            if alive {
                *state = to;
            }
            alive
        });
        if moved { Ok(()) } else { Err(MachineError::wrong_state(action, &self.shared.state.get())) }
    }
}

impl Shared {
    /// Starts a thread, which has been counted as a worker of the machine, with all signals blocked, and confined by
    /// the filter. Before that it does `prepare`, for which it may need calls that the filter does not allow.
    fn spawn(
        self: &Arc<Self>,
        role: &str,
        filter: Option<&Filter>,
        prepare: fn(),
        work: impl FnOnce(&Self) + Send + 'static,
    ) -> Result<Thread> {
        // In all, at most the 15 bytes that the kernel keeps of a thread's name.
        let machine: String = self.name.chars().filter(char::is_ascii_graphic).take(8).collect();
        let name = format!("{machine}/{role}");
        let (shared, filter) = (self.clone(), filter.cloned());
        let body = move || {
            WORKS_FOR.set(ptr::from_ref(&*shared));
            let leaving = Leaving(&shared);
            prepare();
            match filter.as_ref().map_or(Ok(()), confine::enter) {
                Ok(()) => work(&shared),
                Err(error) => shared.end(ExitCause::HostFailure(error.to_string())),
            }
            drop(leaving);
        };
        let spawned = kick::with_signals_blocked(|| Thread::spawn(&self.stacks, &name, body));
        spawned.inspect_err(|_| self.leave()).host("cannot start a thread")
    }

    /// Whether the caller is one of its threads, also one that has no place yet, or has none any more.
    fn is_own_thread(&self) -> bool {
        ptr::eq(WORKS_FOR.get(), self)
    }

    /// The balloon, if there is one.
    fn balloon(&self) -> Result<&(usize, Arc<Wish>)> {
        self.balloon.as_ref().ok_or_else(|| unsupported("this machine was saved when there was no balloon"))
    }

    fn run_vcpu(&self, n: usize) {
        let done = vcpu::run(&self.processors[n], &self.vm, &self.devices, &self.gate, &self.exits[n]);
        if let Some(cause) = done {
            self.end(cause);
        }
    }

    /// The machine, but for its memory, while all its threads stand still.
    fn save(&self, msrs: &[u32]) -> Result<saved::State> {
        let processor = |vcpu: &Mutex<VcpuFd>| Processor::save(&lock(vcpu), msrs);
        let devices = &self.devices;
        let placed = devices.virtio.all();
        // Once: a disk may be found to have grown meanwhile.
        let virtio: Vec<_> = placed.iter().map(|placed| placed.save()).collect();
        let all = || placed.iter().zip(&virtio);
        Ok(saved::State {
            transport: if devices.pci.is_some() { Transport::Pci } else { Transport::Mmio },
            memory_mib: (self.memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20) as u32,
            disks: all().filter_map(|(placed, saved)| placed.known_disk(saved)).collect(),
            nets: placed.iter().filter_map(|placed| placed.net().cloned()).collect(),
            gone: all().filter_map(|(placed, saved)| placed.gone(saved)).collect(),
            speed: self.processors.first().map(|first| Speed::of(&lock(first))).unwrap_or_default(),
            serial: devices.serial.save(),
            power: devices.power.save(),
            rtc: devices.rtc.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            pci: devices.pci.as_ref().map(Bus::save),
            hot_plug: devices.virtio.save(),
            virtio,
            processors: self.processors.iter().map(processor).collect::<Result<_>>()?,
            // After the processors, whose state may still reach the interrupt controllers.
            platform: Platform::save(&self.vm)?,
        })
    }

    /// Starts the thread that serves a device, if it needs one. It has been counted as a worker.
    pub(crate) fn spawn_device(self: &Arc<Self>, placed: &Arc<Placed>) -> Result<()> {
        if !placed.device.needs_thread() {
            self.leave();
            return Ok(());
        }
        let role = match placed.role {
            Role::Disk(..) => "disk",
            Role::Net(_) => "net",
            Role::Other(Other::Console) => "hvc",
            Role::Other(_) => "vsock",
        };
        let served = placed.clone();
        let work = move |shared: &Shared| {
            if let Err(error) = served.device.serve(&shared.vm, &shared.gate) {
                let what = format!("device {} cannot be served: {error}", served.number);
                shared.end(ExitCause::HostFailure(what));
            }
        };
        // One whose frames the host's kernel moves does no more than pass on who is to be woken, and is no exception.
        let prepare = if matches!(placed.role, Role::Net(_)) { let_others_go_on } else { || () };
        let name = format!("{role}{}", placed.number);
        let thread = self.spawn(&name, self.filter.as_ref(), prepare, work)?;
        *placed.thread() = Some(thread);
        Ok(())
    }

    /// Has the balloon's driver see what is wanted of it.
    fn refresh_balloon(&self) {
        let place = self.balloon.as_ref().map(|(place, _)| *place);
        if let Some(placed) = place.and_then(|place| self.devices.virtio.get(place)) {
            placed.device.refresh(&self.vm);
        }
    }

    /// Has the drivers of disks see what has grown since these were saved.
    fn refresh_grown(&self, saved: &[saved::Disk]) {
        let all = self.devices.virtio.all();
        let disks = all.iter().filter_map(|placed| Some((placed, placed.disk()?)));
        for ((placed, disk), had) in disks.zip(saved) {
            if disk.size != had.size {
                placed.device.refresh(&self.vm);
            }
        }
    }

    /// How many processors there are.
    pub(crate) fn processors(&self) -> usize {
        self.processors.len()
    }

    /// Ends the machine; the first cause stays.
    fn end(&self, cause: ExitCause) {
        self.gate.end(cause);
        self.wake();
    }

    /// Has every worker look at the gate.
    fn wake(&self) {
        self.threads().vcpus.iter().for_each(kick::send);
        self.devices.virtio.all().iter().for_each(|placed| placed.device.wake());
    }

    /// A worker has left; the last one publishes the machine's end.
    fn leave(&self) {
        if let Some(cause) = self.gate.leave() {
            tracing::debug!(machine = %self.name, %cause, "the machine has ended");
            self.devices.serial.disconnect();
            self.devices.virtio.all().iter().for_each(|placed| placed.device.end());
            self.state.set(MachineState::Exited(cause));
            self.devices.virtio.wake();
            self.gate.over();
        }
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leaves when dropped, also by a panic, which ends the machine.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(ExitCause::HostFailure("a thread of the machine panicked".to_owned()));
        }
        self.0.leave();
    }
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

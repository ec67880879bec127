//! Machines of every version go on, on this host's KVM, and those that nobody can have saved here do not.

use std::fs::File;
use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;

use instance_core::console::Console;
use instance_core::machine::{
    DiskSpec, Hypervisor, Machine, MachineError, MachineErrorKind, NetSpec, RestoreSpec, SavedMachine,
};
use instance_core::net::{self, MacAddress};
use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::Cap;
use storage_block::MemoryDisk;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

use super::super::{Processor, Role, Speed};
use super::*;
use crate::cpuid::Topology;
use crate::kernel::Entry;
use crate::virtio::DeviceState;
use crate::{CpuLevel, Kvm, cpu, machine, memory};

const PAGE: usize = 4096;

/// This host's KVM, if it tells all of a machine.
fn kvm() -> Option<Kvm> {
    let kvm = Kvm::open().inspect_err(|e| eprintln!("SKIPPED: {e}")).ok()?;
    let saves = kvm.capabilities().save;
    if !saves {
        eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    saves.then_some(kvm)
}

/// A golden machine, with two processors of this host's, since those that it had were another one's.
fn state(kvm: &Kvm, version: u32, transport: &str) -> State {
    let mut state = decode(version, &golden(version, transport)[HEADER_LEN..]).unwrap();
    let memory = memory::allocate(NonZeroU32::new(4).unwrap()).unwrap();
    let vm = machine::make_vm(kvm, &memory).unwrap();
    let topology = Topology::new(NonZeroU32::new(2).unwrap(), NonZeroU32::MIN).unwrap();
    let processor = |number: u32| {
        let vcpu = vm.create_vcpu(number.into()).unwrap();
        cpu::set_up(&vcpu, number, topology, kvm.cpu_model(), Entry::Pvh(0x10_0000), &memory).unwrap();
        state.speed = Speed::of(&vcpu);
        Processor::save(&vcpu, &kvm.msrs().unwrap()).unwrap()
    };
    state.processors = [0, 1].map(processor).into();
    state
}

/// The file of a version, of which later ones have more behind it. Its memory is all zeroes.
fn file(version: u32, state: &State) -> SavedMachine {
    let mut body = match version {
        1 => postcard::to_stdvec(state).unwrap(),
        _ => encode(state).unwrap(),
    };
    if version == 2 {
        body.truncate(body.len() - postcard::to_stdvec(&state.speed).unwrap().len());
    }
    let head = [&b"AMI-KVM\n"[..], &version.to_le_bytes(), &crc32c::crc32c(&body).to_le_bytes()].concat();
    let head = [&head[..], &(body.len() as u64).to_le_bytes(), &[0; 8], &body].concat();
    let file = tempfile::tempfile().unwrap();
    file.set_len((head.len().next_multiple_of(PAGE) + (4 << 20)) as u64).unwrap();
    file.write_all_at(&head, 0).unwrap();
    SavedMachine::new(file).unwrap()
}

fn restore(kvm: &Kvm, version: u32, state: &State) -> Result<Box<dyn Machine>, MachineError> {
    restore_on(kvm, version, state, 1 << 20)
}

/// With a disk of this size.
fn restore_on(kvm: &Kvm, version: u32, state: &State, size: u64) -> Result<Box<dyn Machine>, MachineError> {
    let mut spec = RestoreSpec::new("golden", file(version, state), Console::new().port());
    spec.disks = vec![DiskSpec::new(MemoryDisk::new(size).unwrap().into_disk(), "vol-golden")];
    let mut net = NetSpec::new(net::link().0, MacAddress([2, 0, 10, 0, 0, 12]));
    net.mtu = 1400;
    spec.nets = vec![net];
    spec.virtio_console = (version > 1).then(|| Console::new().port());
    kvm.restore(spec)
}

/// A machine's state, as it is saved.
fn saved_again(machine: &dyn Machine) -> State {
    let file = tempfile::tempfile().unwrap();
    machine.save(&file).unwrap();
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        File::read_exact_at(&file, &mut bytes, at).unwrap();
        bytes
    };
    let len = u64::from_le_bytes(read(16, 8).try_into().unwrap());
    decode(VERSION, &read(HEADER_LEN as u64, len as usize)).unwrap()
}

#[test]
fn machines_of_every_version_go_on() {
    let Some(kvm) = kvm() else { return };
    for (version, (transport, name)) in (1..=VERSION).flat_map(|v| TRANSPORTS.map(|transport| (v, transport)))
    {
        let state = state(&kvm, version, name);
        let again = saved_again(&*restore(&kvm, version, &state).unwrap());
        assert_eq!((again.transport, &again.disks, &again.nets), (transport, &state.disks, &state.nets));
        assert_eq!(again.virtio.len(), state.virtio.len());
        for (device, had) in again.virtio.iter().zip(&state.virtio) {
            assert_eq!((device.place, device.role), (had.place, had.role));
            let mut had = had.clone();
            if had.role == Role::Disk {
                assert_eq!(device.state.disk_size(), Some(1 << 20));
                if version < 4 {
                    // Where nobody told, it is what the disk has.
                    had.state.set_own(device.state.own().clone());
                }
            }
            // The others have been told of what is new outside.
            if device.role != Role::Other {
                assert_eq!(*device, had, "{version}, {name}");
            }
        }
        assert_eq!(again.hot_plug, state.hot_plug);
        assert_eq!(again.processors[1].instruction_pointer(), state.processors[1].instruction_pointer());
    }
}

/// As where a machine was saved before it was told.
#[test]
fn a_disk_that_has_grown_is_told_of() {
    let Some(kvm) = kvm() else { return };
    // In earlier versions nobody told what the driver knew.
    for (version, (_, name)) in (1..=VERSION).flat_map(|v| TRANSPORTS.map(|transport| (v, transport))) {
        let state = state(&kvm, version, name);
        let told = |size| {
            let again = saved_again(&*restore_on(&kvm, version, &state, size).unwrap());
            let disk = again.virtio.into_iter().find(|device| device.role == Role::Disk).unwrap().state;
            let interrupt = match &disk {
                DeviceState::Mmio(_, status) => Some(status & VIRTIO_MMIO_INT_CONFIG != 0),
                DeviceState::Pci(_) => None,
            };
            (again.disks[0].size, disk.disk_size(), interrupt)
        };
        let mmio = |told| (name == "mmio").then_some(told);
        assert_eq!(told(1 << 20), (1 << 20, Some(1 << 20), mmio(false)), "{version}, {name}");
        assert_eq!(told(2 << 20), (2 << 20, Some(2 << 20), mmio(true)), "{version}, {name}");
        refused(restore_on(&kvm, version, &state, 1 << 19), "the machine had Disk");
    }
}

#[track_caller]
fn refused(done: Result<Box<dyn Machine>, MachineError>, why: &str) {
    let error = done.map(drop).unwrap_err();
    assert_eq!(error.kind(), MachineErrorKind::Saved, "{error}");
    assert!(error.to_string().contains(why), "{error}");
}

#[test]
fn what_no_new_machine_has_is_refused() {
    let Some(kvm) = kvm() else { return };
    let changed = |change: fn(&mut Processor)| {
        let mut state = state(&kvm, VERSION, "mmio");
        change(&mut state.processors[1]);
        restore(&kvm, VERSION, &state)
    };
    fn one(processor: &mut Processor) -> &mut kvm_bindings::kvm_cpuid_entry2 {
        processor.change().0.iter_mut().find(|leaf| leaf.function == 1).unwrap()
    }
    assert!(changed(|_| ()).is_ok());
    // Nested virtualisation, of Intel's and of AMD's.
    refused(changed(|p| one(p).ecx |= 1 << 5), "CPUID leaf 0x1.0, ECX");
    refused(changed(|p| p.change().1.efer |= 1 << 12), "EFER.SVME");
    refused(
        changed(|p| {
            let efer = kvm_msr_entry { index: 0xc000_0080, data: 1 << 12, ..Default::default() };
            p.change().2.push(efer);
        }),
        "EFER.SVME",
    );
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    refused(
        changed(|p| p.change().2.push(kvm_msr_entry { index: 0x1234_5678, ..Default::default() })),
        "have MSR 0x12345678, here none",
    );
    // What a processor tells of itself is that of the host's, whatever a file says.
    for index in [0x8b, 0x10a] {
        let mut state = state(&kvm, VERSION, "mmio");
        state.processors[0].change().2.push(msr(index, u64::MAX));
        let mut again = saved_again(&*restore(&kvm, VERSION, &state).unwrap());
        assert!(again.processors[0].change().2.iter().all(|msr| msr.index != index));
    }
    // Another processor, but in files of a time in which that was made up.
    refused(changed(|p| one(p).eax ^= 0x10), "CPUID leaf 0x1.0, EAX");
    let mut earlier = state(&kvm, 2, "pci");
    one(&mut earlier.processors[0]).eax ^= 0x10;
    assert!(restore(&kvm, 2, &earlier).is_ok());
}

/// KVM has them and lists them not.
#[test]
fn types_of_memory_go_on() {
    const MTRRS: [(u32, u64); 4] =
        [(0x2ff, 0xc06), (0x200, 0xc000_0000), (0x201, 0xf_c000_0800), (0x250, 0x0606_0606_0606_0606)];
    let Some(kvm) = kvm() else { return };
    let mut state = state(&kvm, VERSION, "mmio");
    let of = |state: &mut State, index| {
        let msrs = state.processors[0].change().2;
        msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data)
    };
    assert_eq!(of(&mut state, 0x2ff), Some(0x806), "as firmware leaves it");
    for (index, data) in MTRRS {
        let msrs = state.processors[0].change().2;
        msrs.iter_mut().find(|msr| msr.index == index).unwrap().data = data;
    }
    let mut again = saved_again(&*restore(&kvm, VERSION, &state).unwrap());
    assert_eq!(MTRRS.map(|(index, _)| of(&mut again, index)), MTRRS.map(|(_, data)| Some(data)));
    // Of a file that has none, as those of before.
    state.processors[0].change().2.retain(|msr| !(0x200..=0x2ff).contains(&msr.index) || msr.index == 0x277);
    let mut again = saved_again(&*restore(&kvm, VERSION, &state).unwrap());
    assert_eq!(of(&mut again, 0x2ff), Some(0x806));
}

#[test]
fn machines_of_a_higher_level_are_refused() {
    let Some(kvm) = kvm() else { return };
    let lowest = kvm.clone().with_cpu_level(CpuLevel::V1).unwrap();
    let state = |kvm| state(kvm, VERSION, "pci");
    assert!(restore(&kvm, VERSION, &state(&lowest)).is_ok());
    assert!(restore(&lowest, VERSION, &state(&lowest)).is_ok());
    if kvm.cpu_level() > CpuLevel::V1 {
        refused(restore(&lowest, VERSION, &state(&kvm)), "CPUID leaf 0x");
    }
}

#[test]
fn time_stamp_counters_go_on_at_their_speed() {
    let Some(kvm) = kvm() else { return };
    let mut state = state(&kvm, VERSION, "mmio");
    let same = saved_again(&*restore(&kvm, VERSION, &state).unwrap());
    assert_eq!(same.speed, state.speed);
    let Some(khz) = state.speed.0 else { return eprintln!("SKIPPED: the host's counters have no one speed") };
    state.speed.0 = Some(khz / 5 * 4);
    let slower = restore(&kvm, VERSION, &state);
    if kvm.device().check_extension(Cap::TscControl) {
        assert_eq!(saved_again(&*slower.unwrap()).speed, state.speed);
    } else {
        refused(slower, &format!("ran at {} kHz, here at {khz} kHz", khz / 5 * 4));
    }
}

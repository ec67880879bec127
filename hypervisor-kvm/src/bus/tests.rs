//! Resets by ports, and where KVM hears the devices that a guest moves about.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};

use instance_core::console::Console;
use instance_core::machine::DiskSpec;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use storage_block::MemoryDisk;
use tracing::span;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::slots::{Other, Role};
use crate::virtio::{Block, NOTIFY, RANGE_LEN, Rng, VirtioDevice};
use crate::{Transport, memory, saved};

#[test]
fn a_guest_is_reset_by_acpi_and_by_the_keyboard_controller() {
    for (port, data, resets) in [
        (0xcf9, &[0x06][..], true),
        (0xcf9, &[0x0e], true),
        // What kind of reset, and not yet that there is one.
        (0xcf9, &[0x02], false),
        (0xcf9, &[0x04], false),
        // The address of PCI's configuration space, whose second byte lies there.
        (0xcf8, &[0, 0x06, 0, 0x80], false),
        (0x64, &[0xfe], true),
        (0x64, &[0xf0], false),
        (0x64, &[0xfe, 0xfe], false),
        (0x60, &[0xfe], false),
    ] {
        assert_eq!(is_reset(port, data), resets, "{data:x?} to {port:#x}");
    }
}

/// Two disks on PCI and a device that processors serve, in the places where machines have them, and in KVM.
struct Machine {
    vm: VmFd,
    gate: Gate,
    devices: Devices,
}

/// Where the registers of these are at first, and where nobody's are.
const PLACES: [u32; 3] =
    [layout::PCI_MEMORY, layout::PCI_MEMORY + RANGE_LEN, layout::PCI_MEMORY + 8 * RANGE_LEN];
const FIRST: usize = 0;
const SECOND: usize = 1;
const ENTROPY: usize = 2;

#[derive(Debug, Clone, Copy)]
enum Do {
    /// The registers of a device are moved there.
    Move(usize, u32),
    /// They are to be nowhere, or not.
    Hide(usize),
    Show(usize),
}

impl Machine {
    fn new() -> Option<Self> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("SKIPPED: there is no /dev/kvm");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        let memory = memory::allocate(NonZeroU32::MIN).unwrap();
        let mut placed = Vec::from([FIRST, SECOND].map(|n| {
            let spec = DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), "vol-1");
            let block = Block::new(spec.disk.clone(), "vol-1", 1);
            let role = Role::Disk(saved::Disk::of(&spec), block.engine());
            let device = VirtioDevice::with_thread(&vm, &memory, n, Transport::Pci, block).unwrap();
            Placed::new(n, role, device)
        }));
        let entropy = VirtioDevice::new(&memory, ENTROPY, Transport::Pci, Rng);
        placed.push(Placed::new(ENTROPY, Role::Other(Other::Entropy), entropy));
        let devices = Devices {
            serial: SerialPort::new(Console::new().port(), EventFd::new(0).unwrap()),
            power: Power::default(),
            rtc: Mutex::new(Rtc::new()),
            pci: Some(Bus::new()),
            virtio: Slots::new(8, placed),
        };
        Some(Self { vm, gate: Gate::new(), devices })
    }

    fn set(&self, device: usize, register: u32, data: &[u8]) {
        let at = 1 << 31 | (device as u32 + 1) << 11 | register;
        for (port, data) in [(layout::PCI_ADDRESS_PORT, &at.to_le_bytes()[..]), (0xcfc, data)] {
            assert!(self.devices.port_write(&self.vm, &self.gate, port, data).is_continue());
        }
    }

    fn go(&self, does: Do) {
        match does {
            Do::Move(device, to) => self.set(device, 0x10, &to.to_le_bytes()),
            Do::Hide(device) => self.set(device, 4, &[0, 0]),
            Do::Show(device) => self.set(device, 4, &[2, 0]),
        }
    }

    /// Whether KVM hears somebody there: then it takes no other.
    fn is_taken(&self, address: u32) -> bool {
        let (event, at) = (EventFd::new(0).unwrap(), IoEventAddress::Mmio(u64::from(address) + NOTIFY));
        let taken = self.vm.register_ioevent(&event, &at, NoDatamatch).is_err();
        if !taken {
            self.vm.unregister_ioevent(&event, &at, NoDatamatch).unwrap();
        }
        taken
    }
}

#[test]
fn a_device_is_heard_where_it_is_whoever_was_there() {
    use Do::{Hide, Move, Show};
    let [first, second, free] = PLACES;
    let cases: [(&[Do], [u32; 2]); 5] = [
        (&[Move(SECOND, free)], [first, free]),
        // The first is put elsewhere when its place has been given away.
        (&[Hide(FIRST), Move(SECOND, first), Move(FIRST, free), Show(FIRST)], [free, first]),
        // They change places, both hidden meanwhile, or neither.
        (
            &[Hide(FIRST), Hide(SECOND), Move(FIRST, second), Move(SECOND, first), Show(FIRST), Show(SECOND)],
            [second, first],
        ),
        (&[Move(FIRST, second), Move(SECOND, first)], [second, first]),
        (&[Move(FIRST, second), Move(SECOND, free)], [second, free]),
    ];
    for (does, at) in cases {
        let Some(machine) = Machine::new() else { return };
        does.iter().for_each(|does| machine.go(*does));
        for (device, at) in at.into_iter().enumerate() {
            assert!(machine.is_taken(at), "{does:?}: nobody is heard at {at:#x}");
            machine.devices.virtio.get(device).unwrap().device.stop(&machine.vm);
            assert!(!machine.is_taken(at), "{does:?}: device {device} is not heard at {at:#x}");
        }
    }
}

#[test]
fn a_device_that_is_hidden_leaves_its_place_to_another() {
    let Some(machine) = Machine::new() else { return };
    [Do::Hide(FIRST), Do::Move(SECOND, PLACES[FIRST])].into_iter().for_each(|does| machine.go(does));
    machine.devices.virtio.get(SECOND).unwrap().device.stop(&machine.vm);
    assert!(!machine.is_taken(PLACES[FIRST]), "it was the first that was heard there");
}

/// Whose notifications are no event, which a thread would have to be woken by.
#[test]
fn a_device_that_is_hidden_does_not_hear_what_is_meant_for_one_that_processors_serve() {
    let Some(machine) = Machine::new() else { return };
    let [place, _, free] = PLACES;
    [Do::Hide(FIRST), Do::Move(ENTROPY, place)].into_iter().for_each(|does| machine.go(does));
    assert!(!machine.is_taken(place), "it was the first that was heard there");
    [Do::Move(FIRST, free), Do::Show(FIRST)].into_iter().for_each(|does| machine.go(does));
    assert!(machine.is_taken(free) && !machine.is_taken(place));
}

/// Counts warnings.
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, of: &tracing::Metadata<'_>) -> bool {
        *of.level() <= tracing::Level::WARN
    }

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn a_device_in_the_place_of_another_fills_no_log_and_may_go_elsewhere() {
    let Some(machine) = Machine::new() else { return };
    let [first, second, free] = PLACES;
    let warnings = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Warnings(warnings.clone()), || {
        for _ in 0..100 {
            machine.go(Do::Move(SECOND, first));
            machine.go(Do::Move(SECOND, second));
        }
        machine.go(Do::Move(SECOND, first));
    });
    assert_eq!(warnings.load(Ordering::Relaxed), 1);
    machine.go(Do::Move(SECOND, free));
    assert!(machine.is_taken(free) && machine.is_taken(first) && !machine.is_taken(second));
    let moved = machine.devices.virtio.get(SECOND).unwrap();
    assert_eq!(moved.device.pci_offset_of(u64::from(free) + 4), Some(4));
}

//! Devices on virtio-mmio as they are wired up: who serves them, and what their interrupts say.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::chain::Malformed;
use super::device::Device;
use super::ring::Running;
use super::rng::Rng;
use crate::Transport;
use crate::gate::Gate;
use crate::memory::{self, Memory};

const QUEUE_LEN: u32 = 0x1000;
const AVAILABLE: u32 = 0x200;
const USED: u32 = 0x400;
const BUFFER: u64 = 0x8000;

/// A device that a vCPU serves, whose driver is ready, in a machine that runs.
struct Wired {
    vm: VmFd,
    gate: Arc<Gate>,
    memory: Memory,
    device: VirtioDevice,
}

impl Wired {
    /// None where there is no KVM.
    fn new<D: Device + 'static>(queues: u32, device: impl FnOnce(&Arc<Gate>) -> D) -> Option<Self> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("SKIPPED: there is no /dev/kvm");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let (memory, gate) = (memory::allocate(NonZeroU32::MIN).unwrap(), Arc::new(Gate::new()));
        let device = VirtioDevice::new(&memory, 0, Transport::Mmio, device(&gate));
        let wired = Self { vm, gate, memory, device };
        [1, 3].into_iter().for_each(|status| wired.set(reg::VIRTIO_MMIO_STATUS, status));
        wired.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        wired.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        wired.set(reg::VIRTIO_MMIO_STATUS, 11);
        for queue in 0..queues {
            let at = QUEUE_LEN * (queue + 1);
            wired.set(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            wired.set(reg::VIRTIO_MMIO_QUEUE_NUM, 8);
            wired.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, at);
            wired.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + AVAILABLE);
            wired.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, at + USED);
            wired.set(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        wired.gate.open();
        wired.set(reg::VIRTIO_MMIO_STATUS, 15);
        Some(wired)
    }

    fn set(&self, register: u32, value: u32) {
        self.write(register, &value.to_le_bytes());
    }

    fn write(&self, register: u32, data: &[u8]) {
        self.device.write(&self.vm, &self.gate, register.into(), data);
    }

    fn get(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.device.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }
}

/// A device each of whose queues has one piece of work, during which somebody closes the gate.
#[derive(Debug)]
struct Closes {
    gate: Arc<Gate>,
    served: Arc<Mutex<Vec<usize>>>,
}

impl Device for Closes {
    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        3
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn serve(&mut self, queue: usize, _: &mut Running<'_>, _: u64) -> Result<bool, Malformed> {
        let mut served = self.served.lock().unwrap();
        let first = !served.contains(&queue);
        if first {
            served.push(queue);
            self.gate.close();
        }
        Ok(first)
    }
}

#[test]
fn who_closes_the_gate_waits_for_one_queue_and_not_for_all() {
    let served = Arc::<Mutex<Vec<usize>>>::default();
    let closes = |gate: &Arc<Gate>| Closes { gate: gate.clone(), served: served.clone() };
    let Some(wired) = Wired::new(3, closes) else { return };
    assert_eq!(*served.lock().unwrap(), [0]);
    // What was left is done when it is open again.
    for expect in [&[0, 1][..], &[0, 1, 2]] {
        wired.gate.open();
        wired.device.go_on(&wired.vm, &wired.gate);
        assert_eq!(*served.lock().unwrap(), expect);
    }
}

/// What a driver acknowledges that is not pending, or that no interrupt means (virtio 1.2, 4.2.2.2), changes nothing.
#[test]
fn an_interrupt_is_acknowledged_by_its_own_bit() {
    const VRING: u32 = 1;
    const CONFIG: u32 = 2;
    let Some(wired) = Wired::new(1, |_| Rng) else { return };
    let at = |offset: u32| GuestAddress(u64::from(QUEUE_LEN + offset));
    let ask = |count: u16| {
        wired.memory.write_obj([BUFFER, 16 | 2 << 32], at(0)).unwrap();
        wired.memory.write_obj(count, at(AVAILABLE + 2)).unwrap();
        wired.set(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(wired.memory.read_obj::<u16>(at(USED + 2)).unwrap(), count);
    };
    let pending = || wired.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
    let acknowledge = |bits: u32| wired.set(reg::VIRTIO_MMIO_INTERRUPT_ACK, bits);
    acknowledge(u32::MAX);
    assert_eq!(pending(), 0, "nothing was pending");
    ask(1);
    wired.device.refresh(&wired.vm);
    assert_eq!(pending(), VRING | CONFIG);
    for (bits, left) in [
        (!(VRING | CONFIG), VRING | CONFIG),
        (0, VRING | CONFIG),
        (CONFIG, VRING),
        (CONFIG, VRING),
        (1 << 31 | VRING, 0),
        (VRING, 0),
    ] {
        acknowledge(bits);
        assert_eq!(pending(), left, "after {bits:#x}");
    }
    // Nor is anything lost of what comes after it, or acknowledged by another width.
    ask(2);
    for len in [1, 2, 8] {
        wired.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, &[0xff; 8][..len]);
        assert_eq!(pending(), VRING, "by {len} bytes");
    }
    assert_eq!(wired.get(reg::VIRTIO_MMIO_STATUS), 15);
}

//! The places of a machine's virtio devices, who is in them, and how on PCI the guest is told that somebody comes
//! or is to go.
//!
//! A guest lets go of a device by ejecting it, as ACPI says (`_EJ0`, ACPI 6.5, 6.3.3): its place is then empty. A disk
//! that is taken by force leaves its device behind until then: a driver that resets one that has vanished may wait for ever
//! for it, and all further hot-plugging with it.

mod placed;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::layout;
use crate::thread::Thread;

pub(crate) use self::placed::{Other, Placed, Role};

/// The registers of hot-plugging, a bit for each place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    /// Who has come and the guest does not know of.
    arrived: u32,
    /// Who is to go and the guest does not know of.
    leaving: u32,
}

#[derive(Debug, Default)]
struct State {
    places: Vec<Option<Arc<Placed>>>,
    registers: Registers,
    departed: Vec<Thread>,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Slots {
    state: Mutex<State>,
    changed: Condvar,
}

impl Slots {
    /// So many places, with these devices in theirs.
    pub(crate) fn new(places: usize, devices: Vec<Placed>) -> Self {
        let mut state = State::default();
        state.places.resize_with(places, || None);
        for placed in devices {
            let number = placed.number;
            state.places[number] = Some(Arc::new(placed));
        }
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// All devices, in the order of their places.
    pub(crate) fn all(&self) -> Vec<Arc<Placed>> {
        self.lock().places.iter().flatten().cloned().collect()
    }

    /// The device in this place, if one is.
    pub(crate) fn get(&self, number: usize) -> Option<Arc<Placed>> {
        self.lock().places.get(number)?.clone()
    }

    /// The first device of which `is` says so.
    pub(crate) fn find(&self, is: impl Fn(&Placed) -> bool) -> Option<Arc<Placed>> {
        self.lock().places.iter().flatten().find(|placed| is(placed)).cloned()
    }

    /// What `of` says of the first device of which it says anything.
    pub(crate) fn find_map<T>(&self, of: impl Fn(&Placed) -> Option<T>) -> Option<(Arc<Placed>, T)> {
        let state = self.lock();
        state.places.iter().flatten().find_map(|placed| Some((placed.clone(), of(placed)?)))
    }

    /// A place that nobody is in. The first is for the disk that stays, also of a machine that was made without one.
    pub(crate) fn free(&self) -> Option<usize> {
        let state = self.lock();
        (1..state.places.len()).find(|place| state.places[*place].is_none())
    }

    /// Puts a device into its place, which is free. The guest is not told yet.
    pub(crate) fn put(&self, placed: Placed) -> Arc<Placed> {
        let placed = Arc::new(placed);
        let mut state = self.lock();
        state.registers = state.registers.without(placed.number);
        state.places[placed.number] = Some(placed.clone());
        placed
    }

    /// The guest is to be told, by an event, that this device has come.
    pub(crate) fn announce(&self, placed: &Placed) {
        self.lock().registers.arrived |= 1 << placed.number;
    }

    /// The guest is to be told, by an event, that this device is to go.
    pub(crate) fn ask_to_go(&self, placed: &Placed) {
        self.lock().registers.leaving |= 1 << placed.number;
    }

    /// The threads of devices that were ejected, to be joined.
    pub(crate) fn departed(&self) -> Vec<Thread> {
        std::mem::take(&mut self.lock().departed)
    }

    /// Takes a device out that the guest has not been told of.
    pub(crate) fn withdraw(&self, vm: &VmFd, placed: &Placed) {
        let mut state = self.lock();
        placed.device.stop(vm);
        placed.device.end();
        let thread = placed.thread().take();
        state.departed.extend(thread);
        state.places[placed.number] = None;
        state.registers = state.registers.without(placed.number);
    }

    /// Whether a device is where it was put.
    pub(crate) fn is_in_place(&self, placed: &Arc<Placed>) -> bool {
        self.get(placed.number).is_some_and(|other| Arc::ptr_eq(&other, placed))
    }

    /// Waits until a device has left its place or `over` says so, which is asked at every [`wake`](Self::wake).
    /// False at the deadline.
    pub(crate) fn wait_until_gone(
        &self,
        placed: &Arc<Placed>,
        until: Instant,
        over: impl Fn() -> bool,
    ) -> bool {
        let mut state = self.lock();
        loop {
            let there = state.places[placed.number].as_ref().is_some_and(|other| Arc::ptr_eq(other, placed));
            if !there || over() {
                return true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has those who wait look again.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// The registers as they are now.
    pub(crate) fn save(&self) -> Registers {
        self.lock().registers
    }

    /// Goes on with registers that were saved.
    pub(crate) fn restore(&self, registers: Registers) {
        self.lock().registers = registers;
    }

    /// The guest reads a register, which forgets what it tells.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let mut state = self.lock();
        let told = match port - layout::HOT_PLUG_PORT {
            layout::HOT_PLUG_ARRIVED => std::mem::take(&mut state.registers.arrived),
            layout::HOT_PLUG_LEAVING => std::mem::take(&mut state.registers.leaving),
            _ => 0,
        };
        // The registers have one width; others lose what they do not take.
        data.fill(0);
        data.iter_mut().zip(told.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    /// The guest writes a register, by which it may eject a device. True if it has ejected one, whose thread stands
    /// at the machine's gate.
    pub(crate) fn write(&self, vm: &VmFd, port: u16, data: &[u8]) -> bool {
        let (layout::HOT_PLUG_EJECT, Ok(bits)) =
            (port - layout::HOT_PLUG_PORT, <[u8; 4]>::try_from(data).map(u32::from_le_bytes))
        else {
            return false;
        };
        let number = bits.trailing_zeros() as usize;
        // One without a thread is still on its way in.
        let may_go = |placed: &Arc<Placed>| placed.can_go() && placed.thread().is_some();
        let Some(ejected) = self.get(number).filter(may_go) else { return false };
        // In its place, so that whoever sees it gone sees it stopped, and not under the lock, which others need who have
        // nothing to do with its requests.
        ejected.device.stop(vm);
        ejected.device.end();
        let mut state = self.lock();
        let is_it = |placed: &mut Arc<Placed>| Arc::ptr_eq(placed, &ejected);
        // Another vCPU may have ejected it, too.
        if state.places.get_mut(number).and_then(|place| place.take_if(is_it)).is_none() {
            return false;
        }
        state.registers = state.registers.without(ejected.number);
        let thread = ejected.thread().take();
        state.departed.extend(thread);
        drop((ejected, state));
        self.changed.notify_all();
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn without(self, number: usize) -> Self {
        let others = !(1 << number);
        Self { arrived: self.arrived & others, leaving: self.leaving & others }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instance_core::net::MacAddress;
    use std::num::NonZeroU32;

    use instance_core::machine::{DiskSpec, NetSpec};
    use storage_block::MemoryDisk;

    use crate::saved;
    use crate::virtio::{Block, Net, VirtioDevice};

    const EJECT: u16 = layout::HOT_PLUG_PORT + layout::HOT_PLUG_EJECT;

    fn told(slots: &Slots, register: u16) -> u32 {
        let mut data = [0xff; 4];
        slots.read(layout::HOT_PLUG_PORT + register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn guests_eject_disks_but_not_the_first_and_nothing_else() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return eprintln!("SKIPPED: there is no /dev/kvm") };
        let memory = crate::memory::allocate(NonZeroU32::new(2).unwrap()).unwrap();
        let vm = kvm.create_vm().unwrap();
        let disk = || DiskSpec::new(MemoryDisk::new(4096).unwrap().into_disk(), "vol-1");
        let placed = |number, role| {
            let device = VirtioDevice::late(&memory, Block::new(disk().disk, "vol-1", 1)).unwrap();
            Placed::new(number, role, device)
        };
        let role = || Role::Disk(saved::Disk::of(&disk()), Arc::default());
        let slots = Slots::new(8, vec![placed(0, role()), placed(3, Role::Other(Other::Entropy))]);
        assert_eq!(slots.free(), Some(1));
        let late = slots.put(placed(5, role()));
        assert!(!slots.write(&vm, EJECT, &[32, 0, 0, 0]), "it is still on its way in");
        let thread = Thread::spawn(&crate::thread::Stacks::default(), "late", || ()).unwrap();
        *late.thread() = Some(thread);
        slots.announce(&late);
        slots.ask_to_go(&late);
        for data in [&[1, 0, 0, 0][..], &[8, 0, 0, 0], &[0; 4], &[0xff; 4], &[0, 0, 0, 128], &[32], &[32; 8]]
        {
            assert!(!slots.write(&vm, EJECT, data), "{data:?}");
        }
        assert!(!slots.write(&vm, layout::HOT_PLUG_PORT, &[32, 0, 0, 0]), "another register");
        assert_eq!(slots.all().len(), 3);
        assert_eq!([layout::HOT_PLUG_ARRIVED, layout::HOT_PLUG_LEAVING].map(|r| told(&slots, r)), [32, 32]);
        assert_eq!([layout::HOT_PLUG_ARRIVED, layout::HOT_PLUG_LEAVING].map(|r| told(&slots, r)), [0, 0]);
        assert!(slots.is_in_place(&late));
        assert!(slots.write(&vm, EJECT, &[32, 0, 0, 0]));
        assert!(!slots.is_in_place(&late) && slots.wait_until_gone(&late, Instant::now(), || false));
        assert!(!slots.write(&vm, EJECT, &[32, 0, 0, 0]), "it has gone");
        assert_eq!(slots.departed().into_iter().map(Thread::join).count(), 1);
    }

    #[test]
    fn guests_eject_every_network_port_which_is_then_unplugged() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return eprintln!("SKIPPED: there is no /dev/kvm") };
        let memory = crate::memory::allocate(NonZeroU32::new(2).unwrap()).unwrap();
        let vm = kvm.create_vm().unwrap();
        let (port, network) = instance_core::net::link();
        let spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
        let device = VirtioDevice::late(&memory, Net::new(&spec, 1)).unwrap();
        let slots = Slots::new(8, vec![Placed::new(0, Role::Net(saved::Port::of(&spec)), device)]);
        let placed = slots.get(0).unwrap();
        drop(spec);
        *placed.thread() = Some(Thread::spawn(&crate::thread::Stacks::default(), "port", || ()).unwrap());
        assert!(
            placed.is_net(MacAddress([2, 0, 0, 0, 0, 1])) && !placed.is_net(MacAddress([2, 0, 0, 0, 0, 2]))
        );
        assert!(network.is_connected());
        assert!(slots.write(&vm, EJECT, &[1, 0, 0, 0]), "also the first");
        assert!(!network.is_connected() && !slots.is_in_place(&placed));
        assert_eq!(slots.free(), Some(1), "a disk in the first place could never go");
        slots.departed().into_iter().for_each(Thread::join);
    }

    #[test]
    fn any_port_and_width_is_answered() {
        let slots = Slots::new(8, Vec::new());
        for port in layout::HOT_PLUG_PORT..layout::HOT_PLUG_PORT + layout::HOT_PLUG_LEN {
            for len in [0, 1, 2, 4, 8] {
                let mut data = vec![0xff; len];
                slots.read(port, &mut data);
                assert_eq!(data, vec![0; len]);
            }
        }
    }
}

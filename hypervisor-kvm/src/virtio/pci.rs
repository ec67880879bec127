//! The registers of a virtio device on PCI (virtio 1.2, 4.1), without what came before version 1.
//!
//! A function of what the driver writes and reads: no thread, no descriptor.

mod common;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};

use super::chain::Malformed;
use super::core::{Core, CoreState, Effect, Step};
use super::device::Device;
use crate::memory::Memory;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{CONTROL_BITS, Message, Msix};

/// The bytes of addresses that a device takes.
pub(crate) const RANGE_LEN: u32 = 0x8000;
/// Where the driver notifies, whichever queue.
pub(crate) const NOTIFY: u64 = 0x3000;

/// The parts of the range, each on a page of its own.
const PART_LEN: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;

const VENDOR: u16 = 0x1af4;
/// Device ids begin here, with the device type added.
const FIRST_DEVICE: u16 = 0x1040;
/// A device for this transport alone.
const REVISION: u8 = 1;
const CAPABILITY_VENDOR: u8 = 9;
const CAPABILITY_MSIX: u8 = 0x11;
/// No interrupt.
const NO_VECTOR: u16 = 0xffff;
/// The window's fields, from the capability's beginning: which part, where, how many bytes, and these.
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// What the capabilities point to (4.1.4).
const COMMON_KIND: u8 = 1;
const NOTIFY_KIND: u8 = 2;
const ISR_KIND: u8 = 3;
const DEVICE_KIND: u8 = 4;
const WINDOW_KIND: u8 = 5;

/// The registers, with the device behind them.
#[derive(Debug)]
pub(crate) struct Pci {
    core: Core,
    config: ConfigSpace,
    msix: Msix,
    msix_at: usize,
    window_at: usize,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// The registers as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PciState {
    pub(super) core: CoreState,
    config: Vec<u8>,
    msix: Msix,
    /// The selectors: of the features that are offered, of those accepted.
    selected: [u32; 2],
    queue_select: u16,
    /// The vectors: of changes of the configuration, of each queue.
    vectors: (u16, Vec<u16>),
}

/// What an access did besides.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) effect: Effect,
    /// Messages that need wait no longer.
    pub(crate) messages: Vec<Message>,
}

impl From<Effect> for Done {
    fn from(effect: Effect) -> Self {
        Self { effect, messages: Vec::new() }
    }
}

impl From<Vec<Message>> for Done {
    fn from(messages: Vec<Message>) -> Self {
        Self { effect: Effect::None, messages }
    }
}

impl Pci {
    /// The registers of a device that nobody has used yet: at `address`, or, of one that comes later, nowhere before the
    /// guest says where.
    pub(crate) fn new(device: impl Device + 'static, address: Option<u32>) -> Self {
        let core = Core::new(Box::new(device));
        let kind = core.kind();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + kind as u16,
            revision: REVISION,
            class: class(kind),
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE + kind as u16,
        });
        config.set_range(address, RANGE_LEN);
        let msix = Msix::new(core.queues() + 1);
        let part = |kind: u8, at: u64, len: u64, more: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
            body.extend((at as u32).to_le_bytes());
            body.extend((len as u32).to_le_bytes());
            body.extend(more);
            body
        };
        for (kind, at, more) in [
            (COMMON_KIND, COMMON, &[][..]),
            (ISR_KIND, ISR, &[]),
            (DEVICE_KIND, DEVICE, &[]),
            // Every queue is notified at the same place.
            (NOTIFY_KIND, NOTIFY, &0u32.to_le_bytes()),
        ] {
            config.add_capability(CAPABILITY_VENDOR, &part(kind, at, PART_LEN, more));
        }
        let window = part(WINDOW_KIND, 0, 0, &[0; 4]);
        let window_at = config.add_capability(CAPABILITY_VENDOR, &window);
        config.allow(window_at + WINDOW_OFFSET, &[0xff; 8]);
        let mut table = ((msix.vectors() - 1) as u16).to_le_bytes().to_vec();
        table.extend((MSIX_TABLE as u32).to_le_bytes());
        table.extend((MSIX_PENDING as u32).to_le_bytes());
        let msix_at = config.add_capability(CAPABILITY_MSIX, &table);
        config.allow(msix_at + 2, &CONTROL_BITS.to_le_bytes());
        Self {
            config,
            msix,
            msix_at,
            window_at,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; core.queues()],
            core,
        }
    }

    /// The registers as they are now.
    pub(crate) fn save(&self) -> PciState {
        PciState {
            core: self.core.save(),
            config: self.config.save(),
            msix: self.msix.clone(),
            selected: [self.offered_select, self.accepted_select],
            queue_select: self.queue_select,
            vectors: (self.config_vector, self.queue_vectors.clone()),
        }
    }

    /// See [`Core::restore`].
    pub(crate) fn restore(&mut self, memory: &Memory, state: &PciState) -> Result<(), Malformed> {
        let (config_vector, queue_vectors) = &state.vectors;
        let fits = self.config.restore(&state.config)
            && self.msix.restore(&state.msix)
            && queue_vectors.len() == self.queue_vectors.len();
        if !fits {
            return Err(Malformed("the device is of another type"));
        }
        [self.offered_select, self.accepted_select] = state.selected;
        self.queue_select = state.queue_select;
        self.config_vector = self.vector(*config_vector);
        self.queue_vectors = queue_vectors.iter().map(|vector| self.vector(*vector)).collect();
        self.core.restore(memory, &state.core)
    }

    /// How many queues the device has.
    pub(crate) fn queues(&self) -> usize {
        self.core.queues()
    }

    /// See [`Core::refresh`].
    pub(crate) fn refresh(&mut self) -> bool {
        self.core.refresh()
    }

    /// See [`Device::due_in`].
    pub(crate) fn due_in(&self) -> Option<Duration> {
        self.core.due_in()
    }

    /// See [`Core::end`].
    pub(crate) fn end(&mut self) {
        self.core.end();
    }

    /// See [`Device::ended`].
    pub(crate) fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.core.ended()
    }

    /// See [`Core::step`].
    pub(crate) fn step(&mut self, memory: &Memory, queue: usize) -> Step {
        self.core.step(memory, queue)
    }

    /// See [`Core::settle`].
    pub(crate) fn settle(&mut self, memory: &Memory, queue: usize) -> Step {
        self.core.settle(memory, queue)
    }

    /// The message that tells the driver of a queue's used ring.
    pub(crate) fn queue_message(&mut self, queue: usize) -> Option<Message> {
        let vector = self.queue_vectors.get(queue).copied()?;
        self.msix.raise(vector)
    }

    /// The message that tells the driver of a change of the configuration.
    pub(crate) fn config_message(&mut self) -> Option<Message> {
        self.msix.raise(self.config_vector)
    }

    /// The addresses at which it answers, where the guest has it answer.
    pub(crate) fn range(&self) -> Option<Range<u64>> {
        self.config.range()
    }

    /// The guest reads the configuration space.
    pub(crate) fn read_space(&mut self, at: usize, data: &mut [u8]) {
        if let Some((register, len)) = self.window(at, data.len()) {
            return self.read(register, &mut data[..len]);
        }
        self.config.read(at, data);
    }

    /// The guest writes to the configuration space.
    pub(crate) fn write_space(&mut self, memory: &Memory, at: usize, data: &[u8]) -> Done {
        if let Some((register, len)) = self.window(at, data.len()) {
            return self.write(memory, register, &data[..len]);
        }
        self.config.write(at, data);
        self.msix.set_control(self.config.word(self.msix_at + 2)).into()
    }

    /// What an access at `at` of the configuration space means, if it is one to the window through which
    /// a driver reaches the registers that cannot map them (virtio 1.2, 4.1.4.9).
    fn window(&self, at: usize, len: usize) -> Option<(u64, usize)> {
        let register = self.config.double_word(self.window_at + WINDOW_OFFSET);
        let window = self.config.double_word(self.window_at + WINDOW_LENGTH) as usize;
        let meant = at == self.window_at + WINDOW_DATA && matches!(window, 1 | 2 | 4) && window <= len;
        meant.then_some((u64::from(register), window))
    }

    /// The driver reads at `offset` of the range.
    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset % PART_LEN;
        match offset - at {
            COMMON => self.read_common(at, data),
            DEVICE => self.core.read_config(at, data),
            MSIX_TABLE => self.msix.read_table(at as usize, data),
            MSIX_PENDING => self.msix.read_pending(at as usize, data),
            // The interrupt status is for interrupts that are no messages, of which there are none.
            _ => {}
        }
    }

    /// The driver writes at `offset` of the range.
    pub(crate) fn write(&mut self, memory: &Memory, offset: u64, data: &[u8]) -> Done {
        let at = offset % PART_LEN;
        match offset - at {
            COMMON => self.write_common(memory, at, data).into(),
            DEVICE => {
                self.core.write_config(at, data);
                Effect::None.into()
            }
            NOTIFY => Effect::Notify.into(),
            MSIX_TABLE => self.msix.write_table(at as usize, data).into(),
            _ => Effect::None.into(),
        }
    }

    /// The vector that the driver asks for; one that there is not it reads back as none.
    fn vector(&self, asked: u16) -> u16 {
        if usize::from(asked) < self.msix.vectors() { asked } else { NO_VECTOR }
    }
}

/// The PCI class of a device type.
fn class(kind: u32) -> u32 {
    match kind {
        VIRTIO_ID_BLOCK => 0x01_80_00,
        VIRTIO_ID_NET => 0x02_00_00,
        _ => 0xff_00_00,
    }
}

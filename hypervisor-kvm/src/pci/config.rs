//! The configuration space of a PCI function (PCI Local Bus 3.0, section 6).
//!
//! A function of what the guest reads and writes: no thread, no descriptor.

use std::ops::Range;

/// The bytes that port access reaches.
pub(crate) const LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
/// Where capabilities begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// The command register's bits that can be set: memory decoding, bus mastering, no INTx.
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const MEMORY_DECODING: u16 = 1 << 1;
const HAS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Class, subclass and programming interface, the class highest.
    pub(crate) class: u32,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// The bytes of a configuration space, and which of them the guest may change.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the next capability goes.
    next: usize,
    /// The pointer to be set to it.
    link: usize,
    bar_len: u32,
}

impl ConfigSpace {
    /// Of a function without a memory range or capabilities.
    pub(crate) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
            bar_len: 0,
        };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_BITS.to_le_bytes());
        // The interrupt line is a note of the guest's own.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Gives it a range of `len` bytes of 32-bit addresses, a power of two; if at an address, decoded there, as firmware
    /// would.
    pub(crate) fn set_range(&mut self, address: Option<u32>, len: u32) {
        self.bar_len = len;
        self.allow(BAR0, &(!(len - 1)).to_le_bytes());
        if let Some(address) = address {
            self.put(BAR0, &address.to_le_bytes());
            self.put(COMMAND, &MEMORY_DECODING.to_le_bytes());
        }
    }

    /// Adds a capability whose body, what follows its id and its link, is `body`. Returns where it begins.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        let status = self.word(STATUS) | HAS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        at
    }

    /// Lets the guest change these bits.
    pub(crate) fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// The bytes as they are now.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Goes on with bytes that were saved. False if they are not those of a function like this.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> bool {
        let fixed = |bytes: &[u8]| -> Vec<u8> {
            bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect()
        };
        let fits = saved.len() == LEN && fixed(saved) == fixed(&self.bytes);
        if fits {
            self.bytes.copy_from_slice(saved);
        }
        fits
    }

    /// The range, where the guest has it decoded.
    pub(crate) fn range(&self) -> Option<Range<u64>> {
        let decoded = self.bar_len != 0 && self.word(COMMAND) & MEMORY_DECODING != 0;
        let start = u64::from(self.double_word(BAR0) & !0xf);
        decoded.then(|| start..start + u64::from(self.bar_len))
    }

    /// The guest reads; what lies beyond the end reads as ones.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(at + n).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes; what it may not change stays.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        for (n, byte) in data.iter().enumerate() {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at + n), self.writable.get(at + n)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(crate) fn double_word(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        });
        space.set_range(Some(0xc000_0000), 0x8000);
        space
    }

    fn read(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn says_what_it_is_and_nobody_changes_it() {
        let mut space = function();
        let before: Vec<u32> = (0..LEN).step_by(4).map(|at| read(&space, at)).collect();
        assert_eq!(before[..3], [0x1042_1af4, 2, 0x0180_0001]);
        for at in [0, 8, 12, 0x14, 0x18, 0x2c, 0x34, 0x40, 0xfc] {
            space.write(at, &[0xff; 4]);
            assert_eq!(read(&space, at), before[at / 4], "{at:#x}");
        }
    }

    #[test]
    fn its_range_is_sized_moved_and_switched_off() {
        let mut space = function();
        assert_eq!(space.range(), Some(0xc000_0000..0xc000_8000));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.range(), None);
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(read(&space, BAR0), 0xffff_8000, "its length, as ones");
        space.write(BAR0, &0xc123_4567u32.to_le_bytes());
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.range(), Some(0xc123_0000..0xc123_8000));
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = function();
        let first = space.add_capability(9, &[16, 1, 0]);
        let second = space.add_capability(0x11, &[2, 0]);
        assert_eq!(read(&space, CAPABILITIES) & 0xff, first as u32);
        assert_eq!(read(&space, first), 0x0110_0009 | (second as u32) << 8);
        assert_eq!(read(&space, second), 0x0002_0011);
        assert_eq!(space.word(STATUS) & HAS_CAPABILITIES, HAS_CAPABILITIES);
    }

    #[test]
    fn any_place_and_width_is_answered() {
        let mut space = function();
        for at in 0..2 * LEN {
            for len in [1, 2, 4, 8] {
                space.read(at, &mut vec![0; len]);
                space.write(at, &vec![0xff; len]);
            }
        }
    }
}

//! MSI-X: interrupts as messages that a function writes (PCI Local Bus 3.0, section 6.8.2).
//!
//! A function of what the guest reads and writes: who sends the messages is the caller's affair.

use serde::{Deserialize, Serialize};

/// The bytes of a table's entry: address, data, control.
const ENTRY: usize = 16;
const CONTROL: usize = 12;
const MASKED: u32 = 1;
/// The message control register.
const ENABLED: u16 = 1 << 15;
const ALL_MASKED: u16 = 1 << 14;
/// The bits of it that the guest may change.
pub(crate) const CONTROL_BITS: u16 = ENABLED | ALL_MASKED;

/// A message, which is an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The table of a function's messages, and those that wait for being unmasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msix {
    table: Vec<u8>,
    pending: u64,
    control: u16,
}

impl Msix {
    /// A table of so many messages, at most 64, all masked.
    pub(crate) fn new(vectors: usize) -> Self {
        let mut table = vec![0; vectors.min(64) * ENTRY];
        table.iter_mut().skip(CONTROL).step_by(ENTRY).for_each(|control| *control = MASKED as u8);
        Self { table, pending: 0, control: 0 }
    }

    /// Goes on with a table that was saved. False if it is of another size.
    pub(crate) fn restore(&mut self, saved: &Self) -> bool {
        let fits = saved.table.len() == self.table.len();
        if fits {
            self.table.clone_from(&saved.table);
            self.control = saved.control & CONTROL_BITS;
            self.pending = saved.pending;
        }
        fits
    }

    /// How many messages there are.
    pub(crate) fn vectors(&self) -> usize {
        self.table.len() / ENTRY
    }

    /// The message to be sent for an interrupt, unless it has to wait or is nobody's.
    pub(crate) fn raise(&mut self, vector: u16) -> Option<Message> {
        let vector = usize::from(vector);
        if self.control & ENABLED == 0 || vector >= self.vectors() {
            return None;
        }
        if self.control & ALL_MASKED != 0 || self.entry(vector, CONTROL) & MASKED != 0 {
            self.pending |= 1 << vector;
            return None;
        }
        Some(self.message(vector))
    }

    /// The guest changes the control register. Returns the messages that need wait no longer.
    pub(crate) fn set_control(&mut self, control: u16) -> Vec<Message> {
        self.control = control & CONTROL_BITS;
        self.unmasked()
    }

    /// The guest reads the table, in any width.
    pub(crate) fn read_table(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        data.iter_mut().zip(self.table.iter().skip(at)).for_each(|(to, from)| *to = *from);
    }

    /// The guest writes to the table, in words of 32 or 64 bits. Returns as [`set_control`](Self::set_control).
    pub(crate) fn write_table(&mut self, at: usize, data: &[u8]) -> Vec<Message> {
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len()) {
            return Vec::new();
        }
        self.table.iter_mut().skip(at).zip(data).for_each(|(to, from)| *to = *from);
        self.unmasked()
    }

    /// The guest reads which messages wait.
    pub(crate) fn read_pending(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        data.iter_mut().zip(self.pending.to_le_bytes().iter().skip(at)).for_each(|(to, from)| *to = *from);
    }

    /// Forgets what waits, as a reset of the function does.
    pub(crate) fn clear(&mut self) {
        self.pending = 0;
    }

    fn unmasked(&mut self) -> Vec<Message> {
        if self.pending == 0 || self.control & (ENABLED | ALL_MASKED) != ENABLED {
            return Vec::new();
        }
        let waiting = (0..self.vectors()).filter(|n| self.pending & 1 << n != 0);
        let ready: Vec<usize> = waiting.filter(|n| self.entry(*n, CONTROL) & MASKED == 0).collect();
        ready.iter().for_each(|n| self.pending &= !(1 << n));
        ready.into_iter().map(|n| self.message(n)).collect()
    }

    fn message(&self, vector: usize) -> Message {
        let address = u64::from(self.entry(vector, 0)) | u64::from(self.entry(vector, 4)) << 32;
        Message { address, data: self.entry(vector, 8) }
    }

    fn entry(&self, vector: usize, field: usize) -> u32 {
        let mut word = [0; 4];
        self.read_table(vector * ENTRY + field, &mut word);
        u32::from_le_bytes(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: Message = Message { address: 0xfee0_1000, data: 0x41 };

    fn program(msix: &mut Msix, vector: usize, control: u32) -> Vec<Message> {
        msix.write_table(vector * 16, &MESSAGE.address.to_le_bytes());
        msix.write_table(vector * 16 + 8, &MESSAGE.data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &control.to_le_bytes())
    }

    #[test]
    fn a_message_is_sent_when_all_is_unmasked() {
        let mut msix = Msix::new(2);
        program(&mut msix, 1, 0);
        assert_eq!(msix.raise(1), None, "not enabled");
        assert_eq!(msix.set_control(ENABLED), []);
        assert_eq!(msix.raise(1), Some(MESSAGE));
        assert_eq!(msix.raise(2), None, "no such vector");
        assert_eq!(msix.raise(0xffff), None);
    }

    #[test]
    fn a_masked_message_waits() {
        let mut msix = Msix::new(2);
        msix.set_control(ENABLED);
        program(&mut msix, 0, MASKED);
        assert_eq!(msix.raise(0), None);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 1);
        assert_eq!(program(&mut msix, 0, 0), [MESSAGE]);
        assert_eq!(msix.set_control(ENABLED | ALL_MASKED), []);
        assert_eq!((msix.raise(0), msix.raise(0)), (None, None));
        assert_eq!(msix.set_control(ENABLED), [MESSAGE], "once");
        assert_eq!(msix.set_control(ENABLED), []);
    }

    #[test]
    fn any_place_and_width_is_answered() {
        let mut msix = Msix::new(3);
        for at in 0..100 {
            for len in [0, 1, 2, 4, 8] {
                msix.write_table(at, &vec![0xff; len]);
                msix.read_table(at, &mut vec![0; len]);
                msix.read_pending(at, &mut vec![0; len]);
            }
        }
    }
}

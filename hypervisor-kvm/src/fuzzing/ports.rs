//! The body for the serial port and the power management registers.

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::Instant;

use instance_core::console::Console;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Input;
use crate::layout;
use crate::power::Power;
use crate::serial::SerialPort;

/// What the serial port's FIFO holds.
const FIFO: usize = 64;
const DATA: u8 = 0;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
/// Bits of the above: the data register is a divisor's, the port hears itself, there is data.
const DIVISOR: u8 = 1 << 7;
const LOOPBACK: u8 = 1 << 4;
const DATA_READY: u8 = 1 << 0;

/// What a guest knows of a serial port at which somebody types.
#[derive(Default)]
struct Known {
    line_control: u8,
    modem_control: u8,
    /// What was typed and has not come yet.
    typed: VecDeque<u8>,
    received: VecDeque<u8>,
    sent: Vec<u8>,
}

impl Known {
    fn hears_itself(&self) -> bool {
        self.modem_control & LOOPBACK != 0
    }

    fn has_data_at(&self, register: u8) -> bool {
        register == DATA && self.line_control & DIVISOR == 0
    }

    fn write(&mut self, register: u8, value: u8) {
        match register {
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value,
            _ if !self.has_data_at(register) => {}
            _ if !self.hears_itself() => self.sent.push(value),
            _ if self.received.len() < FIFO => self.received.push_back(value),
            _ => {}
        }
    }

    /// What reading a register gives, as far as that is known.
    fn read(&mut self, register: u8) -> Option<u8> {
        if !self.hears_itself() {
            let count = (FIFO - self.received.len()).min(self.typed.len());
            self.received.extend(self.typed.drain(..count));
        }
        match register {
            LINE_CONTROL => Some(self.line_control),
            MODEM_CONTROL => Some(self.modem_control),
            _ if self.has_data_at(register) => Some(self.received.pop_front().unwrap_or(0)),
            _ => None,
        }
    }
}

/// A guest that does what it likes with the serial port and the power management registers, while somebody types and the
/// machine's owner presses the power button. What is typed and sent comes as it is, once and in order, and the interrupt is
/// raised by what the registers say.
pub fn ports(bytes: &[u8]) {
    let Ok(interrupt) = EventFd::new(EFD_NONBLOCK) else { return };
    let console = Console::new();
    let (serial, power, mut known) =
        (SerialPort::new(console.port(), interrupt), Power::default(), Known::default());
    // As the port has them.
    (known.line_control, known.modem_control) = (serial.read(LINE_CONTROL), serial.read(MODEM_CONTROL));
    let raised = Cell::new(false);
    let sci = |level| raised.set(level);
    let mut input = Input(bytes);
    while let Some([action, register, value]) = input.take() {
        let port = layout::PM1_EVENT_PORT + u16::from(register % 10);
        match action % 8 {
            0 | 6 => {
                serial.write(register % 8, value);
                known.write(register % 8, value);
            }
            1 | 7 => {
                let (read, expect) = (serial.read(register % 8), known.read(register % 8));
                assert!(expect.is_none_or(|expect| read == expect), "{read:#x} is not {expect:x?}");
                if register % 8 == LINE_STATUS {
                    assert_eq!(read & DATA_READY != 0, !known.received.is_empty(), "whether there is data");
                }
            }
            2 => _ = power.write(port, &[value; 4][..usize::from(value % 5)], sci),
            3 => power.read(port, &mut [0; 8][..usize::from(value % 9)]),
            4 => {
                let typed: Vec<u8> = (0..register % 100).map(|n| value.wrapping_add(n)).collect();
                // Who types more than is kept would wait for the guest.
                if known.typed.len() < 1000 && console.write_all(&typed, Instant::now()).is_ok() {
                    known.typed.extend(typed);
                }
            }
            _ if value % 2 == 0 => power.press_button(sci),
            _ => power.raise_event(register % 8, sci),
        }
        let (mut button, mut events) = ([0; 4], [0; 2]);
        power.read(layout::PM1_EVENT_PORT, &mut button);
        power.read(layout::GPE_PORT, &mut events);
        let [_, pressed, _, enabled] = button;
        let expect = pressed & enabled & 1 != 0 || events[0] & events[1] != 0;
        assert_eq!(raised.get(), expect, "registers {button:x?} {events:x?}");
    }
    assert!(console.output() == known.sent, "the console shows something else than was sent");
}

//! The serial port: a 16550 between the guest and the console.
//!
//! Nothing is copied while nobody asks: what is typed stays in the [`ConsolePort`], whoever types
//! raises the port's interrupt, and the receive FIFO is filled when the guest next looks at the port.
//! So typing takes no lock that the guest's processors hold, and needs no thread.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use instance_core::console::ConsolePort;
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// How many bytes the FIFO is topped up with at once; vm-superio's holds 64.
const CHUNK: usize = 64;

/// The modem control register, and its bit that connects the port's output to its input.
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;

/// See the [module](self).
pub(crate) struct SerialPort {
    port: ConsolePort,
    uart: Mutex<Serial<Interrupt, NoEvents, Output>>,
    interrupt: Arc<EventFd>,
}

/// A port as it is saved: its registers, and what it has received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

impl SerialPort {
    /// A serial port whose interrupt is raised by a write to `interrupt`, which must not block.
    pub(crate) fn new(port: ConsolePort, interrupt: EventFd) -> Self {
        let interrupt = Arc::new(interrupt);
        let uart = Mutex::new(Serial::new(Interrupt(interrupt.clone()), Output(port.clone())));
        Self { port, uart, interrupt }
    }

    /// The port as it is now.
    pub(crate) fn save(&self) -> SerialState {
        let uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner).state();
        SerialState {
            baud_divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.in_buffer,
        }
    }

    /// Goes on where a port was saved. False if there was none like it.
    pub(crate) fn restore(&self, state: SerialState) -> bool {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let state = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let interrupt = Interrupt(self.interrupt.clone());
        let Ok(uart) = Serial::from_state(&state, interrupt, NoEvents, Output(self.port.clone())) else {
            return false;
        };
        *self.uart.lock().unwrap_or_else(PoisonError::into_inner) = uart;
        // One may have been on its way, and what has been typed meanwhile was told to nobody.
        let _ = self.interrupt.write(1);
        true
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, register: u8) -> u8 {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        // In loopback mode nothing is received.
        if uart.read(MODEM_CONTROL) & LOOPBACK == 0 {
            let mut input = [0; CHUNK];
            let room = uart.fifo_capacity().min(CHUNK);
            let typed = self.port.read_input(&mut input[..room]);
            // Fails only where there is no room, or where the interrupt cannot be raised because
            // it is raised already.
            let _ = uart.enqueue_raw_bytes(&input[..typed]);
        }
        uart.read(register)
    }

    /// The guest writes a register.
    pub(crate) fn write(&self, register: u8, value: u8) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        // As above; the console takes all output.
        let _ = uart.write(register, value);
        if self.port.input_waiting() > 0 {
            let _ = self.interrupt.write(1);
        }
    }

    /// Lets typing interrupt the guest, until [`disconnect`](Self::disconnect).
    pub(crate) fn connect(&self) {
        let interrupt = self.interrupt.clone();
        self.port.set_input_notifier(Some(Arc::new(move || {
            let _ = interrupt.write(1);
        })));
    }

    /// Takes back what [`connect`](Self::connect) did.
    pub(crate) fn disconnect(&self) {
        self.port.set_input_notifier(None);
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Output(ConsolePort);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_output(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    use instance_core::console::Console;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const INTERRUPT_ID: u8 = 2;
    const LINE_STATUS: u8 = 5;
    const DATA_READY: u8 = 1;
    const RECEIVED: u8 = 0b100;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn port() -> (Console, SerialPort, EventFd) {
        let console = Console::new();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = interrupt.try_clone().unwrap();
        (console.clone(), SerialPort::new(console.port(), interrupt), seen)
    }

    #[test]
    fn what_the_guest_writes_is_on_the_console() {
        let (console, port, _) = port();
        b"hello".iter().for_each(|byte| port.write(DATA, *byte));
        assert_eq!(console.output(), b"hello");
    }

    #[test]
    fn typing_interrupts_and_is_read_in_order_however_long() {
        let (console, port, interrupt) = port();
        port.write(INTERRUPT_ENABLE, 1);
        port.connect();
        let typed: Vec<u8> = (0..200).collect();
        console.write_all(&typed, soon()).unwrap();
        interrupt.read().expect("an interrupt was raised");
        assert_eq!(port.read(INTERRUPT_ID) & 0xf, RECEIVED);
        let mut read = Vec::new();
        while port.read(LINE_STATUS) & DATA_READY != 0 {
            read.push(port.read(DATA));
        }
        assert_eq!(read, typed);
    }

    #[test]
    fn in_loopback_the_guest_hears_itself_alone() {
        let (console, port, _) = port();
        console.write_all(b"typed", soon()).unwrap();
        port.write(MODEM_CONTROL, LOOPBACK);
        port.write(DATA, b'x');
        assert_eq!(port.read(DATA), b'x');
        assert_eq!(port.read(LINE_STATUS) & DATA_READY, 0);
        assert!(console.output().is_empty());
        port.write(MODEM_CONTROL, 0);
        assert_eq!(port.read(DATA), b't');
    }

    #[test]
    fn a_port_that_is_disconnected_is_not_told_of_typing() {
        let (console, port, interrupt) = port();
        port.connect();
        port.disconnect();
        console.write_all(b"x", soon()).unwrap();
        assert!(interrupt.read().is_err());
        drop(port);
        console.write_all(b"y", soon()).unwrap();
    }
}

//! ACPI's hardware: the power button, power-off, and general-purpose events.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use instance_core::machine::ExitCause;
use serde::{Deserialize, Serialize};

use crate::layout;

/// The power button's bit in the PM1 status and enable registers.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 control: the guest works in ACPI mode. It always does.
const SCI_ENABLED: u16 = 1 << 0;
/// PM1 control: go to sleep, as the sleep type in bits 10 to 12 says.
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7;

/// The general-purpose events that there are.
const EVENTS: u8 = 1 << layout::GENERATION_GPE | 1 << layout::HOT_PLUG_GPE;

/// The PM1 and general-purpose event registers, which share an interrupt.
#[derive(Debug, Default)]
pub(crate) struct Power(Mutex<State>);

/// What they hold, which is also what is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    status: u16,
    enable: u16,
    event_status: u8,
    event_enable: u8,
}

impl Power {
    /// The registers as they are now.
    pub(crate) fn save(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on with registers that were saved. `sci` is told the level of the ACPI interrupt.
    pub(crate) fn restore(&self, state: &State, sci: impl FnOnce(bool)) {
        self.change(sci, |registers| registers.clone_from(state));
    }

    /// Presses the power button. `sci` is told the level of the ACPI interrupt.
    pub(crate) fn press_button(&self, sci: impl FnOnce(bool)) {
        self.change(sci, |state| state.status |= POWER_BUTTON);
    }

    /// A general-purpose event, by its number. `sci` as before.
    pub(crate) fn raise_event(&self, number: u8, sci: impl FnOnce(bool)) {
        self.change(sci, |state| state.event_status |= 1 << number & EVENTS);
    }

    /// The guest reads registers from `port` on.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [s0, s1] = state.status.to_le_bytes();
        let [e0, e1] = state.enable.to_le_bytes();
        let [c0, c1] = SCI_ENABLED.to_le_bytes();
        let registers = [s0, s1, e0, e1, c0, c1, 0, 0, state.event_status, state.event_enable];
        let from = usize::from(port - layout::PM1_EVENT_PORT);
        for (byte, register) in data.iter_mut().zip(registers.iter().skip(from).chain([0; 8].iter())) {
            *byte = *register;
        }
    }

    /// The guest writes registers from `port` on: it powers off, or `sci` is told the level of the ACPI
    /// interrupt.
    pub(crate) fn write(&self, port: u16, data: &[u8], sci: impl FnOnce(bool)) -> ControlFlow<ExitCause> {
        let registers = usize::from(port - layout::PM1_EVENT_PORT)..;
        let mut off = false;
        self.change(sci, |state| {
            for (register, value) in registers.zip(data.iter().copied()) {
                let byte = u16::from(value) << (8 * (register % 2));
                match register {
                    // A status bit is cleared by writing one to it.
                    0 | 1 => state.status &= !byte,
                    2 | 3 => state.enable = state.enable & !(0xff << (8 * (register % 2))) | byte,
                    // All that counts of the control register is in its second byte.
                    5 => off = is_power_off(byte),
                    8 => state.event_status &= !value,
                    9 => state.event_enable = value & EVENTS,
                    _ => {}
                }
            }
        });
        if off { ControlFlow::Break(ExitCause::PowerOff) } else { ControlFlow::Continue(()) }
    }

    /// Changes the registers and tells `sci` the level that follows, in one step for all callers.
    fn change(&self, sci: impl FnOnce(bool), change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        sci(state.status & state.enable & POWER_BUTTON != 0 || state.event_status & state.event_enable != 0);
    }
}

fn is_power_off(control: u16) -> bool {
    let sleep_type = control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
    control & SLEEP_ENABLE != 0 && sleep_type == u16::from(layout::SLEEP_TYPE_OFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const EVENT: u16 = layout::PM1_EVENT_PORT;

    #[test]
    fn the_button_interrupts_once_enabled_and_until_acknowledged() {
        let power = Power::default();
        let level = Cell::new(true);
        let sci = |to| level.set(to);
        power.press_button(sci);
        assert!(!level.get(), "not enabled");
        assert!(power.write(EVENT + 2, &[0, 1], sci).is_continue());
        assert!(level.get());
        let mut block = [0; 4];
        power.read(EVENT, &mut block);
        assert_eq!(block, [0, 1, 0, 1]);
        assert!(power.write(EVENT, &[0, 1], sci).is_continue());
        assert!(!level.get());
        power.read(EVENT, &mut block);
        assert_eq!(block, [0, 0, 0, 1]);
    }

    #[test]
    fn only_sleep_type_five_with_sleep_enable_is_power_off() {
        for control in 0..=u16::MAX {
            let done = Power::default().write(layout::PM1_CONTROL_PORT, &control.to_le_bytes(), |_| ());
            assert_eq!(done.is_break(), control & 0x3c00 == 0x3400, "{control:#x}");
        }
    }

    #[test]
    fn bytes_are_as_good_as_words() {
        let power = Power::default();
        let level = Cell::new(false);
        let sci = |to| level.set(to);
        power.press_button(sci);
        assert!(power.write(EVENT + 3, &[1], sci).is_continue());
        assert!(level.get(), "enabled by its high byte");
        assert!(power.write(EVENT + 2, &[0xff], sci).is_continue());
        assert!(level.get(), "the low byte is another matter");
        assert!(power.write(EVENT + 1, &[1], sci).is_continue());
        assert!(!level.get(), "acknowledged by its high byte");
        assert!(power.write(EVENT + 5, &[0x34], sci).is_break());
        assert!(power.write(EVENT + 2, &[0, 0, 0, 0x34], sci).is_break());
    }

    #[test]
    fn events_interrupt_beside_the_button() {
        let power = Power::default();
        let level = Cell::new(true);
        let sci = |to| level.set(to);
        let read = || {
            let mut block = [0xff; 2];
            power.read(layout::GPE_PORT, &mut block);
            block
        };
        power.raise_event(layout::GENERATION_GPE, sci);
        assert!(!level.get(), "not enabled");
        power.raise_event(7, sci);
        assert_eq!(read(), [1, 0], "there is no event 7");
        // As wide as both registers: acknowledged and enabled, then raised again.
        assert!(power.write(layout::GPE_PORT, &[0xff, 0xff], sci).is_continue());
        assert_eq!((read(), level.get()), ([0, 3], false));
        power.raise_event(layout::GENERATION_GPE, sci);
        assert!(level.get());
        // The button's acknowledgement does not take the event's interrupt away.
        power.press_button(sci);
        assert!(power.write(EVENT, &[0, 1, 0, 1], sci).is_continue());
        assert!(level.get());
        assert!(power.write(layout::GPE_PORT, &[1], sci).is_continue());
        assert_eq!((read(), level.get()), ([0, 3], false));
    }

    #[test]
    fn any_port_and_width_is_answered() {
        let power = Power::default();
        for port in EVENT..layout::GPE_PORT + u16::from(layout::GPE_LEN) {
            for len in [0, 1, 2, 4, 8] {
                let mut data = vec![0xff; len];
                power.read(port, &mut data);
                let _ = power.write(port, &data, |_| ());
            }
        }
    }
}

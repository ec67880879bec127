//! The clock of a PC: time and date as a Motorola MC146818 has them, from the host's clock.
//!
//! A guest may set it; then it differs from the host's by so many seconds, and goes on with it. There is no alarm
//! and no interrupt. A function of the accesses and of the host's time.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

use crate::layout;

/// The registers besides the time.
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The registers of the time: second, minute, hour, day of the week, day, month, year, century.
const TIME: [u8; 8] = [0, 2, 4, 6, 7, 8, 9, layout::RTC_CENTURY];

/// Status A: the time is about to change, so that it may not be read.
const UPDATING: u8 = 1 << 7;
/// For how long it says so: 244 µs before the second ends and 1,984 µs of updating.
const UPDATE: Duration = Duration::from_micros(2228);
/// Status B: the time stands still, to be set.
const SET: u8 = 1 << 7;
/// Status B: numbers are binary, not decimal digits; hours are of 24, not of twelve.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Status D: the time is valid.
const VALID: u8 = 1 << 7;
/// Hours of twelve: it is after noon.
const PM: u8 = 1 << 7;

/// The clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rtc {
    /// Which register the data port is for.
    index: u8,
    status_a: u8,
    status_b: u8,
    /// How many seconds it is ahead of the host's.
    ahead: i64,
    /// The time's registers while they stand still.
    held: Option<[u8; TIME.len()]>,
}

impl Rtc {
    /// A clock that shows the host's time in UTC, as decimal digits.
    pub(crate) fn new() -> Self {
        Self { index: 0, status_a: 0x26, status_b: HOURS_24, ahead: 0, held: None }
    }

    /// The guest chooses a register. The eighth bit masks NMIs on a PC, of which there are none.
    pub(crate) fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// The guest reads the register that it chose, at `now` after the beginning of 1970.
    pub(crate) fn read(&self, now: Duration) -> u8 {
        match self.index {
            STATUS_A if self.held.is_none() && is_updating(now) => self.status_a | UPDATING,
            STATUS_A => self.status_a,
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => VALID,
            index => position(index).map_or(0, |at| self.held.unwrap_or_else(|| self.registers(now))[at]),
        }
    }

    /// The guest writes it.
    pub(crate) fn write(&mut self, value: u8, now: Duration) {
        match self.index {
            STATUS_A => self.status_a = value & !UPDATING,
            STATUS_B if value & SET != 0 => {
                self.held = Some(self.held.unwrap_or_else(|| self.registers(now)));
                self.status_b = value;
            }
            STATUS_B => {
                // As the digits are meant from now on: drivers choose how before they set the time.
                self.status_b = value;
                if let Some(held) = self.held.take() {
                    self.set(held, now);
                }
            }
            index => {
                let Some(at) = position(index) else { return };
                let mut registers = self.held.unwrap_or_else(|| self.registers(now));
                registers[at] = value;
                match &mut self.held {
                    Some(held) => *held = registers,
                    None => self.set(registers, now),
                }
            }
        }
    }

    /// What the time's registers show.
    fn registers(&self, now: Duration) -> [u8; TIME.len()] {
        let seconds = seconds(now).saturating_add(self.ahead);
        let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let year = time.year().clamp(0, 9999);
        let hour = match (self.status_b & HOURS_24 != 0, time.hour()) {
            (true, hour) => self.digits(hour),
            (false, hour) => {
                let pm = if hour >= 12 { PM } else { 0 };
                self.digits((hour + 11) % 12 + 1) | pm
            }
        };
        [
            self.digits(time.second()),
            self.digits(time.minute()),
            hour,
            self.digits(time.weekday().number_from_sunday()),
            self.digits(time.day()),
            self.digits(time.month().into()),
            self.digits((year % 100) as u8),
            self.digits((year / 100) as u8),
        ]
    }

    /// Takes the time that is in these registers. One that there is not leaves the clock as it was.
    fn set(&mut self, registers: [u8; TIME.len()], now: Duration) {
        if let Some(time) = self.time(registers) {
            self.ahead = time.assume_utc().unix_timestamp() - seconds(now);
        }
    }

    fn time(&self, registers: [u8; TIME.len()]) -> Option<PrimitiveDateTime> {
        let [second, minute, hour, _, day, month, year, century] = registers;
        let hour = if self.status_b & HOURS_24 != 0 {
            self.number(hour)?
        } else {
            let of_twelve = self.number(hour & !PM).filter(|hour| (1..=12).contains(hour))?;
            of_twelve % 12 + if hour & PM != 0 { 12 } else { 0 }
        };
        let year = i32::from(self.number(century)?) * 100 + i32::from(self.number(year)?);
        let month = Month::try_from(self.number(month)?).ok()?;
        let date = Date::from_calendar_date(year, month, self.number(day)?).ok()?;
        let time = Time::from_hms(hour, self.number(minute)?, self.number(second)?).ok()?;
        Some(PrimitiveDateTime::new(date, time))
    }

    /// A number below 100 as a register shows it.
    fn digits(&self, number: u8) -> u8 {
        if self.status_b & BINARY != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }

    fn number(&self, digits: u8) -> Option<u8> {
        let number = match self.status_b & BINARY != 0 {
            true => digits,
            false if digits & 0xf > 9 => return None,
            false => (digits >> 4) * 10 + (digits & 0xf),
        };
        Some(number).filter(|number| *number < 100)
    }
}

fn position(index: u8) -> Option<usize> {
    TIME.iter().position(|register| *register == index)
}

fn is_updating(now: Duration) -> bool {
    Duration::from_nanos(now.subsec_nanos().into()) + UPDATE >= Duration::from_secs(1)
}

fn seconds(now: Duration) -> i64 {
    now.as_secs().try_into().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thursday, 2024-02-29, 13:04:05.
    const LEAP_DAY: Duration = Duration::from_secs(1_709_211_845);
    const SECOND: Duration = Duration::from_secs(1);

    fn read(rtc: &mut Rtc, register: u8, now: Duration) -> u8 {
        rtc.select(register);
        rtc.read(now)
    }

    fn write(rtc: &mut Rtc, register: u8, value: u8, now: Duration) {
        rtc.select(register);
        rtc.write(value, now);
    }

    fn shown(rtc: &mut Rtc, now: Duration) -> [u8; 8] {
        TIME.map(|register| read(rtc, register, now))
    }

    #[test]
    fn the_hosts_time_is_shown_in_every_mode() {
        for (mode, expect) in [
            (HOURS_24, [0x05, 0x04, 0x13, 0x05, 0x29, 0x02, 0x24, 0x20]),
            (HOURS_24 | BINARY, [5, 4, 13, 5, 29, 2, 24, 20]),
            (0, [0x05, 0x04, 0x81, 0x05, 0x29, 0x02, 0x24, 0x20]),
            (BINARY, [5, 4, 0x81, 5, 29, 2, 24, 20]),
        ] {
            let mut rtc = Rtc::new();
            write(&mut rtc, STATUS_B, mode, LEAP_DAY);
            assert_eq!(shown(&mut rtc, LEAP_DAY), expect, "{mode:#x}");
            assert_eq!(read(&mut rtc, STATUS_B, LEAP_DAY), mode);
        }
        // Twelve o'clock is where hours of twelve are easily wrong.
        for (hour, expect) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            let mut rtc = Rtc::new();
            write(&mut rtc, STATUS_B, 0, LEAP_DAY);
            let now = Duration::from_secs(1_709_164_800 + hour * 3600);
            assert_eq!(read(&mut rtc, 4, now), expect, "{hour}");
        }
    }

    #[test]
    fn a_time_that_is_set_goes_on() {
        for mode in [HOURS_24, HOURS_24 | BINARY, 0, BINARY] {
            let mut rtc = Rtc::new();
            let mut other = Rtc::new();
            write(&mut other, STATUS_B, mode, LEAP_DAY);
            // The last second of a century that is no leap year.
            let then = Duration::from_secs(4_102_444_799);
            let (last, first) = (shown(&mut other, then), shown(&mut other, then + SECOND));
            write(&mut rtc, STATUS_B, mode | SET, LEAP_DAY);
            for (register, value) in TIME.into_iter().zip(last) {
                write(&mut rtc, register, value, LEAP_DAY + SECOND * 7);
            }
            assert_eq!(shown(&mut rtc, LEAP_DAY + SECOND * 7), last, "as long as it is set");
            write(&mut rtc, STATUS_B, mode, LEAP_DAY + SECOND * 9);
            assert_eq!(shown(&mut rtc, LEAP_DAY + SECOND * 9), last, "{mode:#x}");
            assert_eq!(shown(&mut rtc, LEAP_DAY + SECOND * 10), first, "{mode:#x}");
        }
    }

    #[test]
    fn a_time_that_there_is_not_is_not_taken() {
        for (register, value) in [(0, 0x60), (2, 0x7a), (4, 0x24), (7, 0x30), (7, 0), (8, 0x13), (9, 0xa0)] {
            let mut rtc = Rtc::new();
            write(&mut rtc, register, value, LEAP_DAY);
            assert_eq!(shown(&mut rtc, LEAP_DAY), shown(&mut Rtc::new(), LEAP_DAY), "{register}: {value:#x}");
        }
        let mut rtc = Rtc::new();
        write(&mut rtc, 0, 0x59, LEAP_DAY);
        assert_eq!(read(&mut rtc, 0, LEAP_DAY), 0x59, "one that there is, is taken at once");
    }

    #[test]
    fn it_says_when_not_to_read() {
        let mut rtc = Rtc::new();
        for (micros, updating) in [(0, false), (997_771, false), (997_772, true), (999_999, true)] {
            let now = LEAP_DAY + Duration::from_micros(micros);
            assert_eq!(read(&mut rtc, STATUS_A, now), if updating { 0xa6 } else { 0x26 }, "{micros}");
        }
        write(&mut rtc, STATUS_B, HOURS_24 | SET, LEAP_DAY);
        assert_eq!(read(&mut rtc, STATUS_A, LEAP_DAY + Duration::from_micros(999_999)), 0x26);
        write(&mut rtc, STATUS_A, 0xff, LEAP_DAY);
        assert_eq!(read(&mut rtc, STATUS_A, LEAP_DAY), 0x7f, "nobody writes that it is updating");
        assert_eq!((read(&mut rtc, STATUS_C, LEAP_DAY), read(&mut rtc, STATUS_D, LEAP_DAY)), (0, 0x80));
    }
}

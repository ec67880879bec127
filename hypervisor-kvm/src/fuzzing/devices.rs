//! The bodies for the balloon, the console, the socket device with its streams, and the clock.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use instance_core::console::{Console, ConsoleSize, INPUT_KEPT, OUTPUT_KEPT};
use instance_core::vsock::{self, Op, Packet, VsockSpec};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vm_memory::{Bytes, GuestAddress};

use super::Input;
use crate::layout;
use crate::memory::{self, Memory};
use crate::rtc::Rtc;
use crate::virtio::{self, Balloon, Mmio, Rng, Step, Vsock, Wish};

/// Where the memory begins that the driver of this fuzzer has no use for.
const UNUSED: u64 = 64 << 10;
const PAGE: usize = 4096;
/// What a program does not do: the machine goes on as another.
const CONTINUE: u8 = 0xff;

/// A guest that writes what it likes to its memory and to a device's registers. What else happens `outside` does.
fn drive(
    input: &mut Input<'_>,
    memory: &Memory,
    device: &mut Mmio,
    mut outside: impl FnMut(&mut Mmio, [u8; 3]),
) {
    let mut broken = false;
    while let Some([action, at, low, high]) = input.take() {
        match action % 5 {
            0 => {
                let value = input.take::<4>().unwrap_or_default();
                let offset = u64::from(at) * 4;
                let reset = offset == u64::from(VIRTIO_MMIO_STATUS) && value == [0; 4];
                let _ = device.write(memory, offset, &value);
                broken &= !reset;
            }
            1 => device.read(u64::from(at) * 4, &mut [0; 8][..usize::from(high % 9)], 0),
            2 => {
                let value = input.take::<16>().unwrap_or_default();
                let address = u64::from(u16::from_le_bytes([low, high]) & 0xffef);
                assert!(memory.write_slice(&value[..usize::from(at % 17)], GuestAddress(address)).is_ok());
            }
            3 => outside(device, [at, low, high]),
            _ => {
                let step = device.step(memory, usize::from(at % 6));
                assert!(!broken || step == Step::Idle, "a device that waits for a reset has done {step:?}");
                broken |= matches!(step, Step::Broken(_));
            }
        }
    }
}

/// A guest that does what it likes with a balloon. A page is given back whole or not at all.
pub fn virtio_balloon(bytes: &[u8]) {
    const WRITTEN: u8 = 0x5a;
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    let unused = vec![WRITTEN; (1 << 20) - UNUSED as usize];
    assert!(memory.write_slice(&unused, GuestAddress(UNUSED)).is_ok());
    let wish = Arc::new(Wish::new(1));
    let mut device = Mmio::new(Balloon::new(wish.clone()));
    drive(&mut Input(bytes), &memory, &mut device, |_, _| assert!(wish.actual_mib() <= 1));
    let mut after = unused;
    assert!(memory.read_slice(&mut after, GuestAddress(UNUSED)).is_ok());
    // Compared as wholes: byte by byte it takes far longer than all else.
    let whole = after.chunks(PAGE).all(|page| page == [WRITTEN; PAGE] || page == [0; PAGE]);
    assert!(whole, "a page is partly given back");
}

/// A guest that does what it likes with an entropy device.
pub fn virtio_rng(bytes: &[u8]) {
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    drive(&mut Input(bytes), &memory, &mut Mmio::new(Rng), |_, _| ());
}

/// A guest that does what it likes with a console, and a terminal that does the same. What is typed comes to the guest or
/// waits, and what the guest writes is bounded.
pub fn virtio_console(bytes: &[u8]) {
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    let terminal = Console::new();
    let mut device = Mmio::new(virtio::Console::new(terminal.port()));
    drive(&mut Input(bytes), &memory, &mut device, |_, [columns, rows, len]| {
        let typed = vec![rows; usize::from(len) << (columns % 9)];
        let _ = terminal.write_all(&typed, Instant::now());
        terminal.resize(ConsoleSize { columns: columns.into(), rows: rows.into() });
    });
    assert!(terminal.output().len() <= OUTPUT_KEPT && terminal.port().input_waiting() <= INPUT_KEPT);
}

/// A guest that does what it likes with a socket device, and a program that does the same with its streams. Now and then its
/// machine is saved and goes on as another, where it has no streams.
pub fn virtio_vsock(bytes: &[u8]) {
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    let (port, host) = vsock::cable();
    let mut device = Mmio::new(Vsock::new(&VsockSpec::new(port)));
    let mut program = Program::new(host);
    drive(&mut Input(bytes), &memory, &mut device, |device, action| {
        if action[0] != CONTINUE {
            return program.act(action);
        }
        let (port, host) = vsock::cable();
        let mut other = Vsock::new(&VsockSpec::new(port));
        other.break_streams();
        let (saved, mut other) = (device.save(), Mmio::new(other));
        assert!(other.restore(&memory, &saved).is_ok(), "what was saved is not restored");
        assert_eq!(other.save(), saved);
        (*device, program) = (other, Program::new(host));
    });
}

/// A guest whose packets are as it likes, without a device. It never gets more than it has said it has room for,
/// and it can always be answered.
pub fn vsock_streams(bytes: &[u8]) {
    let (port, host) = vsock::cable();
    let mut program = Program::new(host);
    // By ports: how much was sent, and the room and the taken bytes that were told last.
    let mut told: HashMap<(u32, u32), (u32, u32, u32)> = HashMap::new();
    let mut input = Input(bytes);
    while let Some([action, ports, op, amount]) = input.take() {
        let (host_port, guest_port) = (u32::from(ports >> 4), u32::from(ports & 0xf));
        match action % 4 {
            0 if port.has_room() => {
                let op = match op % 8 {
                    0 | 7 => Op::Request,
                    1 => Op::Response,
                    2 => Op::Reset,
                    3 => Op::Shutdown { receive: amount & 1 != 0, send: amount & 2 != 0 },
                    4 => Op::Data(vec![amount; usize::from(amount) << (op >> 4)]),
                    5 => Op::CreditUpdate,
                    _ => Op::CreditRequest,
                };
                let [low, high, fwd_cnt] = input.take().unwrap_or_default();
                let buf_alloc = u32::from(u16::from_le_bytes([low, high]));
                let fwd_cnt = u32::from(fwd_cnt) << 4;
                let sent = told.get(&(host_port, guest_port)).map_or(0, |told| told.0);
                told.insert((host_port, guest_port), (sent, buf_alloc, fwd_cnt));
                port.deliver(Packet { host_port, guest_port, op, buf_alloc, fwd_cnt });
            }
            1 => {
                let Some(packet) = port.next(usize::from(amount) << 8) else { continue };
                let known = told.entry((packet.host_port, packet.guest_port)).or_default();
                match packet.op {
                    Op::Request | Op::Response => known.0 = 0,
                    Op::Data(data) => {
                        assert!(!data.is_empty() && data.len() <= usize::from(amount) << 8);
                        known.0 = known.0.wrapping_add(data.len() as u32);
                        let on_the_way = known.0.wrapping_sub(known.2);
                        assert!(on_the_way <= known.1, "{on_the_way} bytes for a room of {}", known.1);
                    }
                    _ => {}
                }
            }
            2 if action == 0xfe => port.reset(),
            _ => program.act([ports, op, amount]),
        }
    }
    // Whatever came before, all that there is to say is said at some time.
    for _ in 0..100_000 {
        if port.next(usize::MAX).is_none() {
            break;
        }
    }
    assert!(!port.has_next() && port.has_room(), "the host has always more to say");
}

/// A program at the host, which never waits.
struct Program {
    host: vsock::Vsock,
    listeners: Vec<vsock::Listener>,
    streams: Vec<vsock::Stream>,
}

impl Program {
    fn new(host: vsock::Vsock) -> Self {
        Self { host, listeners: Vec::new(), streams: Vec::new() }
    }

    fn act(&mut self, [what, which, amount]: [u8; 3]) {
        let now = Instant::now();
        let mut stream = self.streams.get_mut(usize::from(which));
        if let Some(stream) = &mut stream {
            stream.set_deadline(Some(now));
        }
        match (what % 8, stream) {
            (0, _) => self.listeners.extend(self.host.listen(u32::from(which % 16))),
            (1, _) => self.streams.extend(self.listeners.iter().filter_map(|l| l.accept(now).ok())),
            (2, _) => self.streams.extend(self.host.connect(u32::from(which % 16), now)),
            (3, Some(stream)) => _ = stream.write(&vec![amount; usize::from(amount) << (what >> 4)]),
            (4, Some(stream)) => _ = stream.read(&mut vec![0; usize::from(amount) << (what >> 4)]),
            (5, Some(stream)) => stream.shutdown(match amount % 3 {
                0 => std::net::Shutdown::Read,
                1 => std::net::Shutdown::Write,
                _ => std::net::Shutdown::Both,
            }),
            (6, Some(_)) => drop(self.streams.swap_remove(usize::from(which))),
            (7, _) if usize::from(which) < self.listeners.len() => {
                drop(self.listeners.swap_remove(usize::from(which)));
            }
            _ => {}
        }
    }
}

/// A guest that does what it likes with the clock, at any time. What the time's registers show can be set again and is
/// then shown.
pub fn clock(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut rtc = Rtc::new();
    while let Some([register, value, act, s0, s1, s2, s3]) = input.take() {
        let now = Duration::from_secs(u32::from_le_bytes([s0, s1, s2, s3]).into());
        rtc.select(register);
        match act % 2 {
            0 => rtc.write(value, now),
            _ => _ = rtc.read(now),
        }
    }
    let shown = |rtc: &mut Rtc| {
        [0, 2, 4, 7, 8, 9, layout::RTC_CENTURY].map(|register| {
            rtc.select(register);
            (register, rtc.read(Duration::ZERO))
        })
    };
    const STATUS_B: u8 = 0x0b;
    rtc.select(STATUS_B);
    let mode = rtc.read(Duration::ZERO) & !0x80;
    // Set where it was being set, and then set to what it shows.
    rtc.write(mode, Duration::ZERO);
    let before = shown(&mut rtc);
    rtc.select(STATUS_B);
    rtc.write(mode | 0x80, Duration::ZERO);
    for (register, value) in before {
        rtc.select(register);
        rtc.write(value, Duration::ZERO);
    }
    rtc.select(STATUS_B);
    rtc.write(mode, Duration::ZERO);
    assert_eq!(shown(&mut rtc), before);
}

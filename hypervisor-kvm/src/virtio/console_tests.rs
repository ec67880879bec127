//! Drivers, good and bad, against the console's logic, with the terminal at its other end.

use std::time::Instant;

use instance_core::console::{self, ConsoleSize, INPUT_KEPT};
use virtio_bindings::virtio_mmio as reg;

use super::chain::Malformed;
use super::console::{BATCH, Console, RECEIVE, TRANSMIT};
use super::core::Step;
use super::device::{Device, Own};
use super::driver::{BUFFERS, Driver, WRITE};

/// Where what was typed comes to; what is written lies at [`BUFFERS`].
const RECEIVED: u64 = 0x20_0000;
const SIZE: u32 = 1 << 0;
const SERVED: Step = Step::Served { interrupt: true };

fn guest() -> (Driver, console::Console) {
    let terminal = console::Console::new();
    (Driver::new(Console::new(terminal.port()), 2, 0), terminal)
}

fn typed(terminal: &console::Console, bytes: &[u8]) {
    terminal.write_all(bytes, Instant::now()).unwrap();
}

fn is_broken(step: Step) -> bool {
    matches!(step, Step::Broken(_))
}

#[test]
fn what_is_written_comes_out_whole_and_in_order() {
    let (mut guest, terminal) = guest();
    guest.put(BUFFERS, b"hello, world");
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 5, 0), (BUFFERS + 5, 0, 0), (BUFFERS + 5, 2, 0)]);
    guest.offer(TRANSMIT, 8, &[(BUFFERS + 7, 5, 0)]);
    assert_eq!(
        [guest.step(TRANSMIT), guest.step(TRANSMIT), guest.step(TRANSMIT)],
        [SERVED, SERVED, Step::Idle]
    );
    assert_eq!(terminal.output(), b"hello, world");
    assert_eq!([guest.used_chain(TRANSMIT, 0), guest.used_chain(TRANSMIT, 1)], [(0, 0), (8, 0)]);
}

#[test]
fn a_long_chain_is_taken_in_pieces_and_given_back_at_its_end() {
    let (mut guest, terminal) = guest();
    let len = 3 * BATCH + 5;
    let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    guest.put(BUFFERS, &bytes);
    guest.offer(
        TRANSMIT,
        0,
        &[(BUFFERS, BATCH as u32 + 1, 0), (BUFFERS + BATCH + 1, (len - BATCH) as u32 - 1, 0)],
    );
    for pieces in 1..=3 {
        assert_eq!(guest.step(TRANSMIT), Step::Served { interrupt: false });
        assert_eq!((terminal.written(), guest.used(TRANSMIT)), (pieces * BATCH, 0));
    }
    assert_eq!(guest.step(TRANSMIT), SERVED);
    assert_eq!((terminal.output(), guest.used(TRANSMIT)), (bytes, 1));
    // The next one begins at its own beginning.
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 3, 0)]);
    assert_eq!(guest.step(TRANSMIT), SERVED);
    assert_eq!(terminal.output()[len as usize..], [0, 1, 2]);
}

#[test]
fn what_is_typed_waits_until_there_is_room() {
    let (mut guest, terminal) = guest();
    typed(&terminal, &[7; INPUT_KEPT]);
    assert!(terminal.write_all(b"x", Instant::now()).is_err(), "it is kept up to a bound");
    assert_eq!(guest.step(RECEIVE), Step::Idle);
    guest.offer(RECEIVE, 0, &[(RECEIVED, 3, WRITE), (RECEIVED + 16, 2, WRITE)]);
    assert_eq!([guest.step(RECEIVE), guest.step(RECEIVE)], [SERVED, Step::Idle]);
    assert_eq!(guest.used_chain(RECEIVE, 0), (0, 5));
    assert_eq!(guest.bytes(RECEIVED, 20), [&[7, 7, 7][..], &[0; 13], &[7, 7, 0, 0]].concat());
    // No more at a time than there is to be, however large the buffer.
    guest.offer(RECEIVE, 2, &[(RECEIVED, 1 << 20, WRITE)]);
    assert_eq!(guest.step(RECEIVE), SERVED);
    assert_eq!(guest.used_chain(RECEIVE, 1), (2, BATCH as usize));
    assert_eq!(terminal.port().input_waiting(), INPUT_KEPT - 5 - BATCH as usize);
}

#[test]
fn a_buffer_is_kept_while_nothing_is_typed() {
    let (mut guest, terminal) = guest();
    guest.offer(RECEIVE, 0, &[(RECEIVED, 64, WRITE)]);
    assert_eq!((guest.step(RECEIVE), guest.used(RECEIVE)), (Step::Idle, 0));
    typed(&terminal, b"ls\n");
    assert_eq!(guest.step(RECEIVE), SERVED);
    assert_eq!((guest.used_chain(RECEIVE, 0), guest.bytes(RECEIVED, 3)), ((0, 3), b"ls\n".to_vec()));
}

#[test]
fn the_size_is_that_of_the_terminal_when_it_was_looked_at() {
    let (guest, terminal) = guest();
    let mut device = guest.device;
    let size = |device: &super::Mmio| {
        let mut config = [0xff; 12];
        device.read(reg::VIRTIO_MMIO_CONFIG.into(), &mut config, 0);
        assert_eq!(config[4..], [0; 8], "neither ports nor emergency writes are offered");
        [u16::from_le_bytes([config[0], config[1]]), u16::from_le_bytes([config[2], config[3]])]
    };
    assert_eq!(size(&device), [80, 25]);
    terminal.resize(ConsoleSize { columns: 300, rows: 70 });
    assert_eq!(size(&device), [80, 25], "it does not change between two reads");
    assert!(device.refresh(), "the driver is to be told");
    assert_eq!(size(&device), [300, 70]);
    let console = Console::new(terminal.port());
    assert_eq!((console.features(), console.queues()), (SIZE.into(), 2), "one port, and no control queues");
    for offset in [0, 3, 4, 255, u64::MAX] {
        console.read_config(offset, &mut [0; 8]);
    }
}

#[test]
fn drivers_that_break_the_rules_stop_their_console_alone() {
    for (queue, chain) in [
        (TRANSMIT, [(BUFFERS, 4, WRITE)].as_slice()),
        (TRANSMIT, &[(BUFFERS, 4, 0), (RECEIVED, 4, WRITE)]),
        (TRANSMIT, &[(4 << 20, 1, 0)]),
        (TRANSMIT, &[(u64::MAX, u32::MAX, 0)]),
        (RECEIVE, &[(RECEIVED, 4, 0)]),
        (RECEIVE, &[(BUFFERS, 4, 0), (RECEIVED, 4, WRITE)]),
        (RECEIVE, &[(RECEIVED, 0, WRITE)]),
        (RECEIVE, &[((4 << 20) - 1, 2, WRITE)]),
    ] {
        let (mut guest, terminal) = guest();
        typed(&terminal, b"typed");
        guest.offer(queue, 0, chain);
        assert!(is_broken(guest.step(queue)), "{queue}: {chain:x?}");
        assert!(guest.needs_reset());
        assert_eq!((terminal.output().len(), terminal.port().input_waiting()), (0, 5), "{chain:x?}");
        // After a reset it is as good as new, and what was typed is still there.
        guest.begin(0);
        guest.offer(RECEIVE, 0, &[(RECEIVED, 64, WRITE)]);
        assert_eq!(guest.step(RECEIVE), SERVED);
        assert_eq!(guest.bytes(RECEIVED, 5), b"typed");
    }
}

#[test]
fn a_chain_that_becomes_shorter_while_it_is_taken_does_no_harm() {
    let (mut guest, terminal) = guest();
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 2 * BATCH as u32, 0)]);
    assert_eq!(guest.step(TRANSMIT), Step::Served { interrupt: false });
    // The same place in the table, before it is looked at again.
    guest.describe(TRANSMIT, 0, (BUFFERS, 1, 0));
    assert_eq!(guest.step(TRANSMIT), SERVED);
    assert_eq!((terminal.written(), guest.used(TRANSMIT)), (BATCH, 1));
}

#[test]
fn a_reset_forgets_what_was_half_done() {
    let (mut guest, terminal) = guest();
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 2 * BATCH as u32, 0)]);
    guest.step(TRANSMIT);
    guest.begin(0);
    guest.put(BUFFERS, b"anew");
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 4, 0)]);
    assert_eq!(guest.step(TRANSMIT), SERVED);
    assert!(terminal.output().ends_with(b"anew") && terminal.written() == BATCH + 4);
}

#[test]
fn what_is_half_done_is_saved_and_gone_on_with() {
    let (mut guest, terminal) = guest();
    guest.put(BUFFERS + BATCH, b"the rest");
    guest.offer(TRANSMIT, 0, &[(BUFFERS, BATCH as u32 + 8, 0)]);
    guest.step(TRANSMIT);
    let saved = guest.device.save();
    let other = console::Console::new();
    let mut restored = super::Mmio::new(Console::new(other.port()));
    restored.restore(&guest.memory, &saved).unwrap();
    assert_eq!(restored.step(&guest.memory, TRANSMIT), SERVED);
    assert_eq!(other.output(), b"the rest");
    assert_eq!(terminal.written(), BATCH);
    let not_its_own = Console::new(other.port()).restore(&Own::None);
    assert_eq!(not_its_own, Err(Malformed("the device is of another type")));
}

#[test]
fn a_console_of_a_machine_that_has_ended_holds_nobody() {
    let (mut guest, terminal) = guest();
    let told = std::sync::Arc::new(());
    let kept = told.clone();
    terminal.port().set_input_notifier(Some(std::sync::Arc::new(move || drop(kept.clone()))));
    guest.device.end();
    assert_eq!(std::sync::Arc::strong_count(&told), 1);
    typed(&terminal, b"x");
    guest.offer(RECEIVE, 0, &[(RECEIVED, 64, WRITE)]);
    guest.offer(TRANSMIT, 0, &[(BUFFERS, 4, 0)]);
    assert_eq!([guest.step(RECEIVE), guest.step(TRANSMIT)], [Step::Idle, Step::Idle]);
}

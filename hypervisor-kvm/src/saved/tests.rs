//! Files written by earlier versions, which load for ever.

mod restored;

use std::os::unix::fs::FileExt;
use std::path::Path;

use instance_core::console::Console;
use instance_core::machine::{DiskSpec, NetSpec, RestoreSpec, SavedMachine};
use instance_core::net::{self, MacAddress};
use storage_block::MemoryDisk;

use super::file::{HEADER_LEN, Loaded, VERSION, decode, encode};
use super::{Disk, Port, State};
use crate::Transport;
use crate::fuzzing;
use crate::gone::Gone;
use crate::memory::PAGE;
use crate::slots::Other;

const TRANSPORTS: [(Transport, &str); 2] = [(Transport::Mmio, "mmio"), (Transport::Pci, "pci")];

/// Header and state of a machine with two processors, a disk and a network port, and, since version 2, a virtio console:
/// see `tests/save.rs`.
fn golden(version: u32, transport: &str) -> Vec<u8> {
    let name = format!("tests/golden/saved-{version}-{transport}");
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

#[test]
fn machines_of_every_version_are_read() {
    assert_eq!(VERSION, 4, "a new version has golden files of its own");
    for (version, (transport, name)) in (1..=VERSION).flat_map(|v| TRANSPORTS.map(|transport| (v, transport)))
    {
        let file = golden(version, name);
        assert_eq!(file[..12], [&b"AMI-KVM\n"[..], &version.to_le_bytes()].concat());
        let body = &file[HEADER_LEN..];
        let state: State = decode(version, body).unwrap();
        assert_eq!(state.transport, transport);
        assert_eq!(state.memory_mib, 4);
        assert_eq!(state.disks, [Disk { serial: "vol-golden".to_owned(), size: 1 << 20, read_only: false }]);
        assert_eq!(state.nets, [Port { mac: [2, 0, 10, 0, 0, 12], mtu: 1400 }]);
        assert_eq!((state.count(Other::Console), state.processors.len()), (usize::from(version > 1), 2));
        assert_eq!(state.pci.is_some(), transport == Transport::Pci);
        // The guest's kernel lies there.
        assert!((1 << 20..2 << 20).contains(&state.processors[0].instruction_pointer()));
        // What has come since is behind it: in version 1 devices had nothing of their own, and none was gone; in version 2
        // nobody told how fast counters ran.
        let since: &[u8] = match version {
            1 => &[4, 0, 0, 0, 0, 0, 0],
            2 => &[0],
            _ => &[],
        };
        let again = encode(&state).unwrap();
        assert_eq!(again, [body, since].concat(), "the format has changed, and its version has not");
        // In version 4, devices may remember more, and need not.
        let read_as = |other: u32| other == version || (version, other) == (3, 4);
        assert!((1..=VERSION).all(|other| decode(other, body).is_ok() == read_as(other)));
    }
}

/// By whoever has the file, as the checksum is no secret.
#[test]
fn a_state_that_contradicts_itself_about_a_disk_is_refused() {
    const SIZE: u64 = 1 << 20;
    let checked = |change: &dyn Fn(&mut State), size: Option<u64>| {
        let mut state: State = decode(VERSION, &golden(VERSION, "pci")[HEADER_LEN..]).unwrap();
        change(&mut state);
        let machine = SavedMachine::new(tempfile::tempfile().unwrap()).unwrap();
        let mut spec = RestoreSpec::new("golden", machine, Console::new().port());
        let disk = |size| DiskSpec::new(MemoryDisk::new(size).unwrap().into_disk(), "vol-golden");
        spec.disks = size.map(disk).into_iter().collect();
        let mut net = NetSpec::new(net::link().0, MacAddress([2, 0, 10, 0, 0, 12]));
        net.mtu = 1400;
        spec.nets = vec![net];
        spec.virtio_console = Some(Console::new().port());
        state.check(&spec, 64).map_err(|error| error.to_string())
    };
    let had = |size: u64| move |state: &mut State| state.disks[0].size = size;
    let lost = |size: u64| {
        move |state: &mut State| {
            let disk = Disk { size, ..state.disks.remove(0) };
            state.gone.push((0, Gone::Disk(disk)));
        }
    };
    assert_eq!(checked(&had(SIZE), Some(SIZE)), Ok(()));
    assert_eq!(checked(&lost(SIZE), None), Ok(()));
    for size in [0, SIZE / 2, 2 * SIZE, u64::MAX] {
        for done in [checked(&had(size), Some(2 * SIZE)), checked(&lost(size), None)] {
            let error = done.unwrap_err();
            assert!(error.contains("contradicts itself about the size of a disk"), "{size}: {error}");
        }
    }
}

/// Bytes that mean nothing yet are kept for what a later version may say there.
#[test]
fn a_header_that_says_what_no_version_does_is_refused() {
    let read = |change: &dyn Fn(&mut [u8])| {
        let mut head = golden(VERSION, "pci");
        change(&mut head);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&head, 0).unwrap();
        file.set_len(head.len().next_multiple_of(PAGE) as u64 + (4 << 20)).unwrap();
        Loaded::read(&SavedMachine::new(file).unwrap()).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(read(&|_| ()), Ok(()));
    for at in 24..HEADER_LEN {
        let error = read(&|head| head[at] = 1).unwrap_err();
        assert!(error.contains("bytes of its header that mean nothing"), "{at}: {error}");
    }
}

#[test]
fn damaged_states_do_no_harm() {
    let body = golden(VERSION, "mmio").split_off(HEADER_LEN);
    fuzzing::saved_machine(&body);
    for len in (0..body.len()).step_by(37) {
        assert!(decode(VERSION, &body[..len]).is_err(), "{len} of {} bytes are enough", body.len());
    }
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..2_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut damaged = body.clone();
        // Mostly in the devices, which come first.
        let among = if random & 1 == 0 { body.len() } else { 400 };
        damaged[(random >> 16) as usize % among] = (random >> 8) as u8;
        fuzzing::saved_machine(&damaged);
    }
}

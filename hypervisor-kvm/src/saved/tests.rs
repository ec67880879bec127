//! Files written by earlier versions, which load for ever.

use std::path::Path;

use super::file::{HEADER_LEN, decode, encode};
use super::{Disk, Port, State};
use crate::Transport;
use crate::fuzzing;

/// Header and state of a machine of version 1 with two processors, a disk and a network port, on this transport: see
/// `tests/save.rs`.
fn golden(transport: Transport) -> Vec<u8> {
    let name = match transport {
        Transport::Mmio => "saved-1-mmio",
        Transport::Pci => "saved-1-pci",
    };
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

#[test]
fn machines_of_version_1_are_read() {
    for transport in [Transport::Mmio, Transport::Pci] {
        let file = golden(transport);
        assert_eq!(file[..12], *b"AMI-KVM\n\x01\0\0\0");
        let body = &file[HEADER_LEN..];
        let state: State = decode(1, body).unwrap();
        assert_eq!(state.transport, transport);
        assert_eq!(state.memory_mib, 4);
        assert_eq!(state.disks, [Disk { serial: "vol-golden".to_owned(), size: 1 << 20, read_only: false }]);
        assert_eq!(state.nets, [Port { mac: [2, 0, 10, 0, 0, 12], mtu: 1400 }]);
        assert_eq!((state.virtio.len(), state.processors.len()), (4, 2));
        assert_eq!(state.pci.is_some(), transport == Transport::Pci);
        // The guest's kernel lies there.
        assert!((1 << 20..2 << 20).contains(&state.processors[0].instruction_pointer()));
        // What has come since is behind it: its devices had nothing of their own.
        assert_eq!(encode(&state).unwrap(), [body, &[4, 0, 0, 0, 0]].concat());
        assert!(decode(2, body).is_err());
    }
}

#[test]
fn damaged_states_do_no_harm() {
    let body = golden(Transport::Mmio).split_off(HEADER_LEN);
    fuzzing::saved_machine(&body);
    for len in (0..body.len()).step_by(37) {
        assert!(decode(1, &body[..len]).is_err(), "{len} of {} bytes are enough", body.len());
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

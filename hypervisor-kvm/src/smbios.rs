//! The SMBIOS tables (DMTF DSP0134, version 3.0): what a machine tells its guest of itself.
//!
//! A function of the [`Identity`]. A guest without firmware tables of its own finds them by the entry
//! point, which it looks for from `0xf0000` on.

use instance_core::machine::Identity;
use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result};
use crate::layout;
use crate::memory::Memory;

/// Writes the entry point, and the tables after it.
pub(crate) fn write(memory: &Memory, identity: &Identity) -> Result<()> {
    let tables = tables(identity);
    let address = layout::SMBIOS + ENTRY_POINT_LEN as u64;
    let bytes = [&entry_point(address, tables.len() as u32)[..], &tables].concat();
    memory
        .write_slice(&bytes, GuestAddress(layout::SMBIOS))
        .host("the SMBIOS tables do not fit into the memory")
}

const ENTRY_POINT_LEN: usize = 24;

/// The 64-bit entry point (5.2.2).
fn entry_point(tables: u64, len: u32) -> [u8; ENTRY_POINT_LEN] {
    let mut entry = [0; ENTRY_POINT_LEN];
    entry[..5].copy_from_slice(b"_SM3_");
    // Its length; version 3.0.0 of the specification; revision of the entry point.
    entry[6..11].copy_from_slice(&[ENTRY_POINT_LEN as u8, 3, 0, 0, 1]);
    entry[12..16].copy_from_slice(&len.to_le_bytes());
    entry[16..24].copy_from_slice(&tables.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

/// The structures of clause 7, in the order of their handles.
fn tables(identity: &Identity) -> Vec<u8> {
    const VERSION: &str = "1.0";
    let vendor = identity.vendor.as_str();
    let mut tables = Tables::default();

    // 7.1: BIOS information. A virtual machine (bit 4 of the second extension byte), no characteristics.
    let mut bios = Structure::new(0);
    bios.text(vendor).text(VERSION).bytes(&[0, 0]).text("").bytes(&[0]);
    bios.bytes(&[1 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 4, 1, 0, 0xff, 0xff]);
    tables.add(bios);

    // 7.2: system information, woken by its power switch.
    let mut system = Structure::new(1);
    system.text(vendor).text(&identity.product).text("").text(&identity.serial);
    system.bytes(&wire_order(identity.uuid)).bytes(&[6]).text("").text("");
    tables.add(system);

    // 7.3: baseboard information; a motherboard, hosted in the chassis, which is the next structure.
    let mut board = Structure::new(2);
    board.text(vendor).text("").text("").text("").text(&identity.asset_tag);
    board.bytes(&[1 << 0]).text("").bytes(&3u16.to_le_bytes()).bytes(&[0x0a, 0]);
    tables.add(board);

    // 7.4: chassis; of a kind that has no name, all safe, no parts.
    let mut chassis = Structure::new(3);
    chassis.text(vendor).bytes(&[1]).text("").text("").text(vendor);
    chassis.bytes(&[3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0]).text("");
    tables.add(chassis);

    tables.add(Structure::new(127)); // 7.45: the end
    tables.0
}

/// The first three groups of a UUID are written with their lowest byte first (7.2.1).
fn wire_order(uuid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let mut wire = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    wire[8..].copy_from_slice(&rest);
    wire
}

/// Structures one after the other; the handle of each is its number.
#[derive(Default)]
struct Tables(Vec<u8>, u16);

impl Tables {
    fn add(&mut self, structure: Structure) {
        let Structure { kind, formatted, strings } = structure;
        self.0.extend([kind, 4 + formatted.len() as u8]);
        self.0.extend(self.1.to_le_bytes());
        self.0.extend(formatted);
        self.0.extend(if strings.is_empty() { vec![0] } else { strings });
        self.0.push(0);
        self.1 += 1;
    }
}

/// A structure under way: its formatted part, and the strings that it refers to by their number (6.1.3).
struct Structure {
    kind: u8,
    formatted: Vec<u8>,
    strings: Vec<u8>,
}

impl Structure {
    fn new(kind: u8) -> Self {
        Self { kind, formatted: Vec::new(), strings: Vec::new() }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.formatted.extend(bytes);
        self
    }

    /// A reference to a string; to none where the text is empty.
    fn text(&mut self, text: &str) -> &mut Self {
        if text.is_empty() {
            return self.bytes(&[0]);
        }
        self.strings.extend(text.bytes());
        self.strings.push(0);
        let number = self.strings.iter().filter(|byte| **byte == 0).count();
        self.bytes(&[number as u8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let mut identity =
            Identity::new(*b"\xec\x2a\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab");
        identity.vendor = "Amazon EC2".to_owned();
        identity.product = "t2.nano".to_owned();
        identity.asset_tag = "i-0123456789abcdef0".to_owned();
        identity
    }

    /// Type, formatted part and strings of each structure.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, len, ..] = *bytes {
            let (formatted, rest) = bytes.split_at(len.into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end].split(|b| *b == 0).map(|s| String::from_utf8(s.to_vec()).unwrap());
            found.push((kind, formatted.to_vec(), strings.collect()));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn structures_have_the_lengths_of_the_specification() {
        let lengths: Vec<_> =
            parse(&tables(&identity())).iter().map(|(kind, f, _)| (*kind, f.len())).collect();
        assert_eq!(lengths, [(0, 0x18), (1, 0x1b), (2, 0x0f), (3, 0x16), (127, 4)]);
    }

    #[test]
    fn every_text_is_where_it_is_looked_for() {
        let structures = parse(&tables(&identity()));
        let at = |structure: usize, offset: usize| {
            let (_, formatted, strings) = &structures[structure];
            formatted[offset].checked_sub(1).map(|n| strings[usize::from(n)].as_str()).unwrap_or_default()
        };
        for (structure, offset, text) in [
            (0, 4, "Amazon EC2"),
            (0, 5, "1.0"),
            (1, 4, "Amazon EC2"),
            (1, 5, "t2.nano"),
            (1, 7, "ec2a0123-4567-89ab-cdef-0123456789ab"),
            (2, 8, "i-0123456789abcdef0"),
            (3, 8, "Amazon EC2"),
            (3, 7, ""),
        ] {
            assert_eq!(at(structure, offset), text, "structure {structure}, offset {offset}");
        }
        let uuid = &structures[1].1[8..24];
        assert_eq!(uuid, b"\x23\x01\x2a\xec\x67\x45\xab\x89\xcd\xef\x01\x23\x45\x67\x89\xab");
        assert_eq!(u16::from_le_bytes([structures[2].1[11], structures[2].1[12]]), 3, "the chassis' handle");
    }

    #[test]
    fn the_entry_point_adds_up() {
        let entry = entry_point(0xf_0018, 300);
        assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!((&entry[..5], entry[6]), (&b"_SM3_"[..], 24));
    }

    #[test]
    fn the_longest_identity_fits() {
        let mut identity = identity();
        for text in
            [&mut identity.vendor, &mut identity.product, &mut identity.serial, &mut identity.asset_tag]
        {
            *text = "x".repeat(Identity::MAX_TEXT);
        }
        assert!(identity.is_valid());
        assert!(layout::SMBIOS + 24 + (tables(&identity).len() as u64) < layout::HIGH_MEMORY);
    }
}

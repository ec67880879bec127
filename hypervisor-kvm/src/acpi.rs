//! The ACPI tables (ACPI 6.5): processors, interrupts, power, and where the devices are.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Store,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result};
use crate::layout;
use crate::memory::Memory;
use crate::{Transport, virtio};

const OEM: [u8; 6] = *b"AMI-RS";
const OEM_TABLE: [u8; 8] = *b"INSTANCE";
const OEM_REVISION: u32 = 1;
/// The length of a table's header, at which the tables of ours begin.
const HEADER_LEN: u32 = 36;

/// FADT, "IA-PC boot architecture flags" (5.2.9.3): what a PC has and this machine has not.
const NO_VGA: u16 = 1 << 2;
const LEGACY_DEVICES: u16 = 1 << 0;

/// Writes the tables for so many processors and disks. The first of them is at [`layout::ACPI`].
pub(crate) fn write(memory: &Memory, vcpus: u32, transport: Transport, disks: usize) -> Result<()> {
    let mut tables = Tables { next: layout::ACPI + 64, bytes: Vec::new() };
    let facs = tables.put(&FACS::new());
    let dsdt = tables.put_table(&dsdt(transport, disks));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // More than the most that a processor with such states may take: there are none.
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (101.into(), 1001.into());
    fadt.sci_int = (layout::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.gpe0_blk = u32::from(layout::GPE_PORT).into();
    fadt.gpe0_blk_len = layout::GPE_LEN;
    fadt.century = layout::RTC_CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::RESET_PORT));
    fadt.reset_value = layout::RESET_VALUE;
    let fadt = tables.put(&fadt.finalize());
    let madt = tables.put_table(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.put(&xsdt);
    debug_assert!(tables.next <= layout::GENERATION_ID);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes.push((layout::ACPI, rsdp));
    for (address, bytes) in tables.bytes {
        memory
            .write_slice(&bytes, GuestAddress(address))
            .host("the ACPI tables do not fit into the memory")?;
    }
    Ok(())
}

/// Tables and their addresses, one after the other.
struct Tables {
    next: u64,
    bytes: Vec<(u64, Vec<u8>)>,
}

impl Tables {
    fn put(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.put_bytes(bytes)
    }

    fn put_table(&mut self, table: &Sdt) -> u64 {
        self.put_bytes(table.as_slice().to_vec())
    }

    fn put_bytes(&mut self, bytes: Vec<u8>) -> u64 {
        let address = self.next;
        self.next += (bytes.len() as u64).next_multiple_of(64); // The FACS asks for 64.
        self.bytes.push((address, bytes));
        address
    }
}

/// The devices, and how to power off.
fn dsdt(transport: Transport, disks: usize) -> Sdt {
    let mut code = Vec::new();
    let (off, zero) = (layout::SLEEP_TYPE_OFF, 0u8);
    Name::new(Path::new("_S5_"), &Package::new(vec![&off, &off, &zero, &zero])).to_aml_bytes(&mut code);
    serial_port(&mut code);
    clock(&mut code);
    panic_port(&mut code);
    generation_id(&mut code);
    match transport {
        Transport::Mmio => (0..disks).for_each(|n| virtio_mmio(n, &mut code)),
        Transport::Pci => pci_bus(&mut code),
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn serial_port(code: &mut Vec<u8>) {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &aml::ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(code);
}

fn clock(code: &mut Vec<u8>) {
    let ports = IO::new(layout::RTC_PORT, layout::RTC_PORT, 1, 2);
    Device::new(
        Path::new("_SB_.RTC0"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0B00")),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports])),
        ],
    )
    .to_aml_bytes(code);
}

fn panic_port(code: &mut Vec<u8>) {
    let port = IO::new(layout::PANIC_PORT, layout::PANIC_PORT, 1, 1);
    Device::new(
        Path::new("_SB_.PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(code);
}

/// Where the machine's generation id is, and that the guest looks there at its event (Microsoft, "Virtual Machine
/// Generation ID"). The compatible id is what drivers know it by.
fn generation_id(code: &mut Vec<u8>) {
    let device = "_SB_.VGEN";
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    Device::new(
        Path::new(device),
        vec![
            &Name::new(Path::new("_HID"), &"QEMUVGID"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(code);
    const CHANGED: u8 = 0x80;
    let edge = format!("_GPE._E{:02X}", layout::GENERATION_GPE);
    Method::new(Path::new(&edge), 0, false, vec![&Notify::new(&Path::new(&format!("\\{device}")), &CHANGED)])
        .to_aml_bytes(code);
}

/// A virtio-mmio device; Linux knows its id (`drivers/virtio/virtio_mmio.c`).
fn virtio_mmio(n: usize, code: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, virtio::address(n) as u32, layout::VIRTIO_LEN as u32);
    let interrupt = Interrupt::new(true, true, false, false, virtio::irq(n));
    Device::new(
        Path::new(&format!("_SB_.VD{n:02}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &(n as u32)),
            &Name::new(Path::new("_CCA"), &aml::ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(code);
}

/// The host bridge of a PCI bus: what is behind it the guest finds by itself. Interrupts are messages.
fn pci_bus(code: &mut Vec<u8>) {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = IO::new(layout::PCI_ADDRESS_PORT, layout::PCI_ADDRESS_PORT, 1, 8);
    let memory = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MEMORY,
        layout::PCI_MEMORY_END - 1,
        None,
    );
    Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_ADR"), &aml::ZERO),
            &Name::new(Path::new("_BBN"), &aml::ZERO),
            &Name::new(Path::new("_CCA"), &aml::ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&bus, &ports, &memory])),
            &HotPlug,
        ],
    )
    .to_aml_bytes(code);
    let edge = format!("_GPE._E{:02X}", layout::HOT_PLUG_GPE);
    let look = MethodCall::new(Path::new("\\_SB_.PCI0.LOOK"), vec![]);
    Method::new(Path::new(&edge), 0, false, vec![&look]).to_aml_bytes(code);
}

/// Inside of the PCI bus: its places, from which devices can be ejected, and a method that looks at the registers of
/// hot-plugging (`slots.rs`) and tells the places' drivers (5.6.6, 6.3.3).
struct HotPlug;

impl Aml for HotPlug {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const DEVICE_CHECK: u8 = 1;
        const EJECT_REQUEST: u8 = 3;
        let (port, len) = (layout::HOT_PLUG_PORT, layout::HOT_PLUG_LEN);
        OpRegion::new(Path::new("HPLG"), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(sink);
        // In the order of their ports.
        let registers = [*b"ARRV", *b"LEAV", *b"EJCT"].map(|name| FieldEntry::Named(name, 32));
        let (access, lock, update) =
            (FieldAccessType::DWord, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
        Field::new(Path::new("HPLG"), access, lock, update, registers.to_vec()).to_aml_bytes(sink);
        let (arrived, leaving) = (Local(0), Local(1));
        let mut tell = Vec::new();
        for place in 0..layout::PCI_MAX {
            // Number 0 is the host bridge's.
            let (number, bit) = (place as u32 + 1, 1u32 << place);
            let name = format!("S{number:02X}_");
            Device::new(
                Path::new(&name),
                vec![
                    &Name::new(Path::new("_ADR"), &(number << 16)),
                    &Name::new(Path::new("_SUN"), &number),
                    &Method::new(Path::new("_EJ0"), 1, false, vec![&Store::new(&Path::new("EJCT"), &bit)]),
                ],
            )
            .to_aml_bytes(sink);
            for (local, what) in [(&arrived, DEVICE_CHECK), (&leaving, EJECT_REQUEST)] {
                let (place, of_place) = (Path::new(&name), And::new(&aml::ZERO, local, &bit));
                If::new(&of_place, vec![&Notify::new(&place, &what)]).to_aml_bytes(&mut tell);
            }
        }
        let [arrived_at, leaving_at] = ["ARRV", "LEAV"].map(Path::new);
        let read = [Store::new(&arrived, &arrived_at), Store::new(&leaving, &leaving_at)];
        Method::new(Path::new("LOOK"), 0, true, vec![&read[0], &read[1], &Encoded(tell)]).to_aml_bytes(sink);
    }
}

/// Code that has been encoded before.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Processors and interrupt controllers (5.2.12).
fn madt(vcpus: u32) -> Sdt {
    const HAS_8259: u32 = 1;
    const ENABLED: u32 = 1;
    const ALL_PROCESSORS: u8 = 0xff;
    const LEVEL_ACTIVE_HIGH: u16 = 0b1101;
    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&layout::LOCAL_APIC.to_le_bytes());
    madt.append_slice(&HAS_8259.to_le_bytes());
    for id in (0..vcpus).map(|id| id as u8) {
        madt.append_slice(&[0, 8, id, id]); // processor local APIC: processor, APIC id
        madt.append_slice(&ENABLED.to_le_bytes());
    }
    madt.append_slice(&[1, 12, 0, 0]); // I/O APIC: its id
    madt.append_slice(&layout::IO_APIC.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    madt.append_slice(&[2, 10, 0, layout::SCI_IRQ as u8]); // interrupt source override
    madt.append_slice(&layout::SCI_IRQ.to_le_bytes());
    madt.append_slice(&LEVEL_ACTIVE_HIGH.to_le_bytes());
    madt.append_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]); // local APIC NMI: LINT1
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    /// The tables as a guest finds them: by the RSDP, then the XSDT's entries, then the FADT's.
    fn found(vcpus: u32, disks: usize) -> Vec<([u8; 4], Vec<u8>)> {
        let memory = crate::memory::allocate(NonZeroU32::new(2).unwrap()).unwrap();
        write(&memory, vcpus, Transport::Mmio, disks).unwrap();
        let bytes = |address: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        let u32_of = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let u64_of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let table = |address: u64| {
            let header = bytes(address, 8);
            let table = bytes(address, u32_of(&header[4..8]) as usize);
            let sum = table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
            assert_eq!(sum, 0, "the checksum of {:?}", &header[..4]);
            (*header.first_chunk().unwrap(), table)
        };
        let rsdp = bytes(layout::ACPI, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(rsdp.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        let (_, xsdt) = table(u64_of(&rsdp[24..32]));
        let mut tables: Vec<_> = xsdt[36..].chunks_exact(8).map(|entry| table(u64_of(entry))).collect();
        let fadt = tables[0].1.clone();
        tables.push(table(u64_of(&fadt[140..148])));
        let facs = bytes(u64::from(u32_of(&fadt[36..40])), 4);
        assert_eq!(facs, b"FACS");
        tables
    }

    #[test]
    fn a_guest_finds_them_all() {
        let names: Vec<_> = found(1, 0).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [*b"FACP", *b"APIC", *b"DSDT"]);
    }

    #[test]
    fn the_clock_and_the_events_are_announced() {
        let fadt = &found(1, 0)[0].1;
        // Offsets of ACPI 6.5, table 5.9.
        let (gpe, gpe_len, century, boot) = (&fadt[80..84], fadt[92], fadt[108], &fadt[109..111]);
        assert_eq!((gpe, gpe_len, century), (&[8, 6, 0, 0][..], 2, 0x32));
        assert_eq!(boot, [0b101, 0], "there is a CMOS clock, and no VGA");
    }

    #[test]
    fn the_place_of_the_generation_id_is_named() {
        let dsdt = &found(1, 0)[2].1;
        let named = |bytes: &[u8]| dsdt.windows(bytes.len()).filter(|window| *window == bytes).count();
        // A package of 8 bytes with two elements: a double word, and zero.
        assert_eq!(named(b"ADDR\x12\x08\x02\x0c\x00\xf0\x0e\x00\x00"), 1);
        assert_eq!(named(b"_CID\x0dVM_Gen_Counter\0"), 1);
        assert_eq!(named(b"_E00"), 1);
    }

    #[test]
    fn the_port_to_panic_on_is_named_where_drivers_look() {
        let dsdt = &found(1, 0)[2].1;
        let find = |bytes: &[u8]| dsdt.windows(bytes.len()).position(|window| window == bytes);
        let device = find(b"PEVT").expect("there is one");
        let rest = &dsdt[device..device + 40];
        let has = |bytes: &[u8]| rest.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(b"_HID\x0dQEMU0001\0"), "{rest:x?}");
        // One port, decoded in 16 bits, at 0x505.
        assert!(has(b"_CRS") && has(&[0x47, 1, 5, 5, 5, 5, 1, 1]), "{rest:x?}");
        assert_eq!(layout::PANIC_PORT, 0x505);
    }

    #[test]
    fn every_processor_and_disk_is_named_once() {
        let tables = found(64, layout::VIRTIO_MAX);
        let madt = &tables[1].1;
        let mut apics = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, body @ ..] = rest {
            if *kind == 0 {
                apics.push(body[1]);
            }
            rest = &rest[usize::from(*len)..];
        }
        assert_eq!(apics, (0..64).collect::<Vec<u8>>());
        let dsdt = &tables[2].1;
        for n in 0..layout::VIRTIO_MAX {
            let name = format!("VD{n:02}");
            let times = dsdt.windows(4).filter(|w| *w == name.as_bytes()).count();
            assert_eq!(times, 1, "{name}");
        }
        assert!(!dsdt.windows(4).any(|w| w == b"VD17"));
    }
}

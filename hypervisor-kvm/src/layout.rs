//! Where everything is: the guest's physical addresses, I/O ports and interrupts.
//!
//! A bare-metal guest that reads no ACPI tables may rely on the figures of devices and ports.
//!
//! | physical address | what |
//! |---|---|
//! | `0x0000_0500` | GDT of the first processor |
//! | `0x0000_6000` | PVH start info, module list, memory map; or, at `0x7000`, Linux's zero page |
//! | `0x0000_9000..0x0000_f000` | page tables (64-bit entry only) |
//! | `0x0002_0000` | kernel command line |
//! | `0x0009_fc00..0x0010_0000` | reserved; ACPI tables from `0x000e_0000`, the RSDP first; the generation id at `0x000e_f000`; SMBIOS from `0x000f_0000` |
//! | `0x0010_0000..` | RAM: the kernel, and the initrd at the end of it, below 2 GiB |
//! | `0xc000_0000..0x1_0000_0000` | no RAM: PCI devices, virtio-mmio devices, IOAPIC, local APICs |
//! | `0x1_0000_0000..` | the RAM that does not fit below |

/// The first processor's descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// `hvm_start_info`, which a PVH kernel is told in `ebx`.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// The module list: one entry, the initrd.
pub(crate) const PVH_MODULES: u64 = 0x6040;
/// The memory map of a PVH kernel.
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6080;
/// `boot_params`, which Linux's 64-bit entry is told in `rsi`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Six page tables that map the first four GiB to themselves, for Linux's 64-bit entry.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The stack that a kernel starts with, growing down.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// The kernel's command line, zero-terminated.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// The most bytes of a command line with its final zero: what Linux takes on x86.
pub(crate) const COMMAND_LINE_MAX: usize = 2048;

/// The end of the RAM below 1 MiB; from here to [`HIGH_MEMORY`] all is reserved.
pub(crate) const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The RSDP, and after it the other ACPI tables. In the range that is searched for it.
pub(crate) const ACPI: u64 = 0xe_0000;
/// The machine's generation id, on a page of its own, as its specification asks.
pub(crate) const GENERATION_ID: u64 = 0xe_f000;
/// The SMBIOS entry point, and after it the tables: the start of the range that is searched for it.
pub(crate) const SMBIOS: u64 = 0xf_0000;
/// Where kernels may be loaded from.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
/// No byte of an initrd is at or above this: the limit that Linux gives.
pub(crate) const INITRD_END: u64 = 0x8000_0000;

/// The start of the hole in the RAM.
pub(crate) const HOLE: u64 = 0xc000_0000;
/// The end of the hole in the RAM.
pub(crate) const HOLE_END: u64 = 0x1_0000_0000;

/// The registers of the first virtio-mmio device; the others follow at this
/// [distance](VIRTIO_LEN).
pub(crate) const VIRTIO: u64 = 0xd000_0000;
/// How many bytes of addresses a virtio-mmio device takes.
pub(crate) const VIRTIO_LEN: u64 = 0x1000;
/// The interrupts of the virtio-mmio devices: the IOAPIC has 24 inputs, and these are free. Edge, active high.
pub(crate) const VIRTIO_IRQS: [u32; VIRTIO_MAX] =
    [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7];
/// How many virtio-mmio devices there are interrupts for.
pub(crate) const VIRTIO_MAX: usize = 17;

/// Addresses of PCI devices.
pub(crate) const PCI_MEMORY: u32 = 0xc000_0000;
/// The end of them.
pub(crate) const PCI_MEMORY_END: u32 = 0xd000_0000;
/// How many devices a PCI bus has beside the host bridge.
pub(crate) const PCI_MAX: usize = 31;
/// The port that takes the address of a byte in PCI's configuration; the data's four follow it.
pub(crate) const PCI_ADDRESS_PORT: u16 = 0xcf8;

/// Local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// Pages that KVM needs on Intel processors: one for an identity map, three for a TSS.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The serial port, a 16550: eight ports from here.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;

/// ACPI PM1 status and enable registers, 16 bits each.
pub(crate) const PM1_EVENT_PORT: u16 = 0x600;
/// ACPI PM1 control register, 16 bits.
pub(crate) const PM1_CONTROL_PORT: u16 = 0x604;
/// ACPI's general-purpose events: a status and an enable register, 8 bits each.
pub(crate) const GPE_PORT: u16 = 0x608;
/// How many ports they take.
pub(crate) const GPE_LEN: u8 = 2;
/// The event by which the guest is told of a new generation id.
pub(crate) const GENERATION_GPE: u8 = 0;
/// The event by which the guest is told that devices come or are to go.
pub(crate) const HOT_PLUG_GPE: u8 = 1;
/// The registers of that, of 32 bits, with a bit for each place on the PCI bus: who has come, who is to go, and
/// whom the guest ejects.
pub(crate) const HOT_PLUG_PORT: u16 = 0x620;
/// How many ports they take.
pub(crate) const HOT_PLUG_LEN: u16 = 12;
/// See [`HOT_PLUG_PORT`], from which these are.
pub(crate) const HOT_PLUG_ARRIVED: u16 = 0;
pub(crate) const HOT_PLUG_LEAVING: u16 = 4;
pub(crate) const HOT_PLUG_EJECT: u16 = 8;
/// ACPI's interrupt, level, active high.
pub(crate) const SCI_IRQ: u32 = 9;
/// The reset control register of PC chipsets, named as ACPI's reset register.
pub(crate) const RESET_PORT: u16 = 0xcf9;
/// What the guest writes to [`RESET_PORT`] to be reset.
pub(crate) const RESET_VALUE: u8 = 0x06;
/// The sleep type that means power-off, in the PM1 control register and the `_S5` object.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// The command and status port of a PC's keyboard controller, which resets the machine as well.
pub(crate) const I8042_PORT: u16 = 0x64;
/// What it says of its state: it has taken every command (bit 1 is clear), for kernels wait for that before they have it
/// reset the machine; and it always has something to be read (bit 0), by which they see that there is none.
pub(crate) const I8042_STATUS: u8 = 0xfd;
/// The keyboard controller's command that pulses the reset line.
pub(crate) const I8042_RESET: u8 = 0xfe;
/// The port by which a guest's kernel says that it panics (QEMU, `docs/specs/pvpanic.rst`).
pub(crate) const PANIC_PORT: u16 = 0x505;
/// The real-time clock: a port that takes the number of a register, and the one of its value.
pub(crate) const RTC_PORT: u16 = 0x70;
/// Which of its registers holds the century.
pub(crate) const RTC_CENTURY: u8 = 0x32;

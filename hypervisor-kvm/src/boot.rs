//! What a kernel is told when it starts: its command line, its memory, its initrd.

use instance_core::machine::Boot;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result, boot};
use crate::kernel::{self, Entry, Kernel};
use crate::layout;
use crate::memory::{self, Memory};

/// `hvm_start_info.magic`.
const PVH_MAGIC: u32 = 0x336e_c578;
/// Memory types, of PVH's memory map and Linux's alike.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// Linux's boot protocol (`Documentation/arch/x86/boot.rst`): the setup header's magic numbers, a boot
/// loader without a registered number, and the alignment that a kernel may assume where it does not say.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const UNDEFINED_LOADER: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// What is known of a boot before there is a machine.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    boot: &'a Boot,
    kernel: Kernel,
    initrd: Option<(u64, u64)>,
}

impl<'a> Plan<'a> {
    /// Reads and checks what is to be booted.
    pub(crate) fn new(what: &'a Boot, memory: &Memory) -> Result<Self> {
        let line = what.command_line.as_bytes();
        if line.contains(&0) {
            return Err(boot("the kernel's command line contains a zero byte"));
        }
        if line.len() >= layout::COMMAND_LINE_MAX {
            let (len, most) = (line.len(), layout::COMMAND_LINE_MAX - 1);
            return Err(boot(format!("the kernel's command line has {len} bytes; the most is {most}")));
        }
        let kernel = Kernel::read(&what.kernel, memory::low_end(memory))?;
        let initrd = match &what.initrd {
            Some(file) => Some((kernel::initrd_address(file.len(), kernel.end(), memory)?, file.len())),
            None => None,
        };
        Ok(Self { boot: what, kernel, initrd })
    }

    /// Writes all of it into the memory. Returns where the first processor starts.
    pub(crate) fn load(&self, memory: &Memory) -> Result<Entry> {
        self.kernel.load(&self.boot.kernel, memory)?;
        if let (Some(file), Some((address, len))) = (&self.boot.initrd, self.initrd) {
            kernel::copy(file, 0, len, memory, address)?;
        }
        let line = [self.boot.command_line.as_bytes(), &[0]].concat();
        memory
            .write_slice(&line, GuestAddress(layout::COMMAND_LINE))
            .host("no memory for the command line")?;
        match self.kernel.entry {
            Entry::Pvh(_) => self.write_start_info(memory)?,
            Entry::Linux64(_) => self.write_zero_page(memory)?,
        }
        Ok(self.kernel.entry)
    }

    fn write_start_info(&self, memory: &Memory) -> Result<()> {
        let map: Vec<_> = memory_map(memory)
            .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
            .collect();
        let mut info = hvm_start_info {
            magic: PVH_MAGIC,
            version: 1,
            cmdline_paddr: layout::COMMAND_LINE,
            rsdp_paddr: layout::ACPI,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        let modules: Vec<_> = self.initrd.into_iter().map(module).collect();
        if !modules.is_empty() {
            info.nr_modules = modules.len() as u32;
            info.modlist_paddr = layout::PVH_MODULES;
        }
        let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
        params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
        if !modules.is_empty() {
            params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
        }
        PvhBootConfigurator::write_bootparams(&params, memory).host("no memory for the PVH start info")
    }

    fn write_zero_page(&self, memory: &Memory) -> Result<()> {
        let mut page = boot_params { acpi_rsdp_addr: layout::ACPI, ..Default::default() };
        page.hdr.boot_flag = BOOT_FLAG;
        page.hdr.header = HEADER_MAGIC;
        page.hdr.type_of_loader = UNDEFINED_LOADER;
        page.hdr.kernel_alignment = KERNEL_ALIGNMENT;
        page.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
        page.hdr.cmdline_size = self.boot.command_line.len() as u32;
        if let Some((address, len)) = self.initrd {
            // Both are below 2 GiB: see `layout::INITRD_END`.
            (page.hdr.ramdisk_image, page.hdr.ramdisk_size) = (address as u32, len as u32);
        }
        let mut entries = 0;
        for (slot, (addr, size, type_)) in page.e820_table.iter_mut().zip(memory_map(memory)) {
            (slot.addr, slot.size, slot.r#type) = (addr, size, type_);
            entries += 1;
        }
        page.e820_entries = entries;
        let params = BootParams::new(&page, GuestAddress(layout::ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, memory).host("no memory for the zero page")
    }
}

fn module((paddr, size): (u64, u64)) -> hvm_modlist_entry {
    hvm_modlist_entry { paddr, size, ..Default::default() }
}

/// Start, length and type of each piece of memory that the kernel is told of.
fn memory_map(memory: &Memory) -> impl Iterator<Item = (u64, u64, u32)> {
    let bios = (layout::LOW_MEMORY_END, layout::HIGH_MEMORY - layout::LOW_MEMORY_END, RESERVED);
    let ram = memory::usable(memory).into_iter().map(|(start, len)| (start, len, RAM));
    ram.chain([bios])
}

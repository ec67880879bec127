//! What a kernel is told when it starts: its command line, its memory, its initrd.

use ami_core::Architecture;
use instance_core::machine::Boot;
use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result, boot};
use crate::kernel::{self, Entry, Kernel};
use crate::layout;
use crate::memory::{self, Memory};

/// `hvm_start_info.magic` and `.version` (Xen, `public/arch-x86/hvm/start_info.h`).
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u32 = 1;
/// Memory types, of PVH's memory map and Linux's alike.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Fields of Linux's zero page and the setup header in it, by their offsets (`Documentation/arch/x86/`
/// `zero-page.rst` and `boot.rst`).
mod zero_page {
    pub(super) const LEN: usize = 4096;
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const COMMAND_LINE: usize = 0x228;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const E820_TABLE: usize = 0x2d0;
    pub(super) const E820_ENTRY_LEN: usize = 20;

    pub(super) const IS_BOOT_FLAG: u16 = 0xaa55;
    pub(super) const IS_HEADER: [u8; 4] = *b"HdrS";
    /// A loader without a number of its own.
    pub(super) const UNDEFINED_LOADER: u8 = 0xff;
    /// What a kernel may assume where it does not say.
    pub(super) const DEFAULT_ALIGNMENT: u32 = 0x0100_0000;
}

/// What is known of a boot before there is a machine.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    boot: &'a Boot,
    kernel: Kernel,
    initrd: Option<(u64, u64)>,
}

impl<'a> Plan<'a> {
    /// Reads and checks what is to be booted.
    pub(crate) fn new(what: &'a Boot, architecture: Architecture, memory: &Memory) -> Result<Self> {
        let line = what.command_line.as_bytes();
        if line.contains(&0) {
            return Err(boot("the kernel's command line contains a zero byte"));
        }
        if line.len() >= layout::COMMAND_LINE_MAX {
            let (len, most) = (line.len(), layout::COMMAND_LINE_MAX - 1);
            return Err(boot(format!("the kernel's command line has {len} bytes; the most is {most}")));
        }
        let kernel = Kernel::read(&what.kernel, architecture, memory::low_end(memory))?;
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
            Entry::Linux64(_) | Entry::Linux32(_) => self.write_zero_page(memory)?,
        }
        Ok(self.kernel.entry)
    }

    fn write_start_info(&self, memory: &Memory) -> Result<()> {
        let mut map = Vec::new();
        let mut entries = 0u32;
        for (start, len, kind) in memory_map(memory) {
            map.extend([start.to_le_bytes(), len.to_le_bytes(), u64::from(kind).to_le_bytes()].concat());
            entries += 1;
        }
        let module: Vec<u8> = (self.initrd.iter())
            .flat_map(|(start, len)| [*start, *len, 0, 0]) // no command line; reserved
            .flat_map(u64::to_le_bytes)
            .collect();
        let modules = self.initrd.iter().count() as u32;
        let words = [PVH_MAGIC, PVH_VERSION, 0, modules].map(u32::to_le_bytes).concat();
        let addresses = [layout::PVH_MODULES, layout::COMMAND_LINE, layout::ACPI, layout::PVH_MEMORY_MAP]
            .map(u64::to_le_bytes)
            .concat();
        let info = [words, addresses, [entries, 0].map(u32::to_le_bytes).concat()].concat();
        put(memory, layout::PVH_START_INFO, &info)?;
        put(memory, layout::PVH_MODULES, &module)?;
        put(memory, layout::PVH_MEMORY_MAP, &map)
    }

    fn write_zero_page(&self, memory: &Memory) -> Result<()> {
        let mut page = vec![0; zero_page::LEN];
        let mut set = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        set(zero_page::ACPI_RSDP, &layout::ACPI.to_le_bytes());
        set(zero_page::BOOT_FLAG, &zero_page::IS_BOOT_FLAG.to_le_bytes());
        set(zero_page::HEADER, &zero_page::IS_HEADER);
        set(zero_page::TYPE_OF_LOADER, &[zero_page::UNDEFINED_LOADER]);
        set(zero_page::KERNEL_ALIGNMENT, &zero_page::DEFAULT_ALIGNMENT.to_le_bytes());
        set(zero_page::COMMAND_LINE, &(layout::COMMAND_LINE as u32).to_le_bytes());
        if let Some((start, len)) = self.initrd {
            // Both are below 2 GiB: see `layout::INITRD_END`.
            set(zero_page::RAMDISK_IMAGE, &(start as u32).to_le_bytes());
            set(zero_page::RAMDISK_SIZE, &(len as u32).to_le_bytes());
        }
        let mut entries = 0u8;
        for (start, len, kind) in memory_map(memory) {
            let at = zero_page::E820_TABLE + usize::from(entries) * zero_page::E820_ENTRY_LEN;
            set(at, &[&start.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes()].concat());
            entries += 1;
        }
        set(zero_page::E820_ENTRIES, &[entries]);
        put(memory, layout::ZERO_PAGE, &page)
    }
}

fn put(memory: &Memory, address: u64, bytes: &[u8]) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(address)).host("the boot information does not fit into the memory")
}

/// Start, length and type of each piece of memory that the kernel is told of.
fn memory_map(memory: &Memory) -> impl Iterator<Item = (u64, u64, u32)> {
    let bios = (layout::LOW_MEMORY_END, layout::HIGH_MEMORY - layout::LOW_MEMORY_END, RESERVED);
    let ram = memory::usable(memory).into_iter().map(|(start, len)| (start, len, RAM));
    ram.chain([bios])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    #[test]
    fn the_memory_map_is_what_is_there() {
        for mib in [2, 3072, 4096] {
            let memory = memory::allocate(NonZeroU32::new(mib).unwrap()).unwrap();
            let mut map: Vec<_> = memory_map(&memory).collect();
            map.sort_unstable();
            // Without gaps up to the hole, without overlaps, and all the RAM but the reserved part.
            let ram: u64 = map.iter().filter(|(_, _, kind)| *kind == RAM).map(|(_, len, _)| len).sum();
            assert_eq!(ram, (u64::from(mib) << 20) - (layout::HIGH_MEMORY - layout::LOW_MEMORY_END));
            let mut end = 0;
            for (start, len, _) in map {
                assert!(start == end || start == layout::HOLE_END && end == layout::HOLE, "{start:#x}");
                end = start + len;
            }
        }
    }
}

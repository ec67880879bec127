//! Kernel files: which bytes go where, and at which address the first processor starts.

use ami_core::Architecture;
use instance_core::machine::BootFile;
use object::Endianness;
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};

use crate::error::{Result, boot};
use crate::layout;
use crate::memory::{self, Memory};

/// The note whose contents are the address of a kernel's 32-bit entry (Xen, `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// All headers end before this offset; Linux's follow the file header.
const HEADERS_MAX: u64 = 64 << 10;
/// The most segments. Linux has five.
const SEGMENTS_MAX: usize = 64;
/// The most bytes of notes. Linux's are below 1 KiB.
const NOTES_MAX: u64 = 64 << 10;

/// Where the first processor starts, and in which mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// As the PVH protocol says: 32-bit, without paging (Xen, `docs/misc/pvh.pandoc`).
    Pvh(u32),
    /// As Linux's 64-bit protocol says (Linux, `Documentation/arch/x86/boot.rst`).
    Linux64(u64),
    /// As its 32-bit protocol says.
    Linux32(u32),
}

/// A kernel file whose headers were read and checked.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) entry: Entry,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    address: u64,
    memory_len: u64,
    offset: u64,
    file_len: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.memory_len
    }
}

impl Kernel {
    /// Reads a kernel's headers and checks that it fits into a machine of this architecture whose RAM below the
    /// hole ends at `low_end`.
    pub(crate) fn read(file: &BootFile, architecture: Architecture, low_end: u64) -> Result<Self> {
        let headers = bytes_at(file, 0, HEADERS_MAX.min(file.len()))?;
        if !headers.starts_with(b"\x7fELF") {
            return Err(boot("the kernel is not an ELF file"));
        }
        match headers.get(4) {
            Some(&class) if class == elf::ELFCLASS32.0 => {
                Self::read_as::<FileHeader32<Endianness>>(file, &headers, architecture, low_end)
            }
            _ => Self::read_as::<FileHeader64<Endianness>>(file, &headers, architecture, low_end),
        }
    }

    fn read_as<H: FileHeader<Endian = Endianness>>(
        file: &BootFile,
        headers: &[u8],
        architecture: Architecture,
        low_end: u64,
    ) -> Result<Self> {
        let bad = |error| boot("the kernel's ELF headers cannot be read").with_source(error);
        let header = H::parse(headers).map_err(bad)?;
        let endian = header.endian().map_err(bad)?;
        match (header.e_machine(endian), architecture) {
            (elf::EM_386, _) | (elf::EM_X86_64, Architecture::X86_64) => {}
            (elf::EM_X86_64, _) => return Err(boot("the kernel is for 64-bit x86, and the machine is not")),
            (other, _) => {
                return Err(boot(format!("the kernel is for ELF machine {}, not for x86", other.0)));
            }
        }
        let (mut segments, mut pvh) = (Vec::new(), None);
        for program in header.program_headers(endian, headers).map_err(bad)? {
            let (offset, file_len) = program.file_range(endian);
            if program.p_type(endian) == elf::PT_NOTE && pvh.is_none() {
                let notes = bytes_at(file, offset, file_len.min(NOTES_MAX))?;
                pvh = pvh_entry::<H>(endian, program.p_align(endian), &notes);
            } else if program.p_type(endian) == elf::PT_LOAD {
                let (address, memory_len) = (program.p_paddr(endian).into(), program.p_memsz(endian).into());
                segments.push(check(Segment { address, memory_len, offset, file_len }, file, low_end)?);
            }
        }
        check_together(&mut segments)?;
        let entry = match pvh {
            Some(address) => Entry::Pvh(address),
            None if header.is_type_64() => Entry::Linux64(header.e_entry(endian).into()),
            // Of a 32-bit file, the entry is a word of 32 bits.
            None => Entry::Linux32(header.e_entry(endian).into() as u32),
        };
        let address = match entry {
            Entry::Pvh(address) | Entry::Linux32(address) => u64::from(address),
            Entry::Linux64(address) => address,
        };
        if !segments.iter().any(|s| s.address <= address && address < s.end()) {
            return Err(boot(format!("the kernel's entry, {address:#x}, lies outside the kernel")));
        }
        Ok(Self { entry, segments })
    }

    /// The first address after the kernel.
    pub(crate) fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(layout::HIGH_MEMORY)
    }

    /// Copies the kernel into the guest's memory, which is zero where the kernel expects zeroes.
    pub(crate) fn load(&self, file: &BootFile, memory: &Memory) -> Result<()> {
        self.segments.iter().try_for_each(|s| copy(file, s.offset, s.file_len, memory, s.address))
    }
}

/// Reads `len` bytes of a file from `offset` on to `address`.
pub(crate) fn copy(file: &BootFile, offset: u64, len: u64, memory: &Memory, address: u64) -> Result<()> {
    memory::read_from(memory, address, file.file(), offset, len as usize)
        .map_err(|error| boot("a boot file cannot be read into the memory").with_source(error))
}

/// The segment, if its bytes are in the file and its place in the RAM where kernels may be.
fn check(segment: Segment, file: &BootFile, low_end: u64) -> Result<Segment> {
    let Segment { address, memory_len, offset, file_len } = segment;
    let in_file = offset.checked_add(file_len).is_some_and(|end| end <= file.len());
    if !in_file || file_len > memory_len {
        return Err(boot(format!("the kernel's segment for {address:#x} is cut short")));
    }
    let end = address.checked_add(memory_len);
    if address < layout::HIGH_MEMORY || end.is_none_or(|end| end > low_end) {
        return Err(boot(format!(
            "the kernel's segment of {memory_len:#x} bytes for {address:#x} does not fit into the machine's \
             memory, {:#x} to {low_end:#x}",
            layout::HIGH_MEMORY
        )));
    }
    Ok(segment)
}

/// Refuses so many segments, or such that lie over one another, that loading them takes long.
fn check_together(segments: &mut [Segment]) -> Result<()> {
    if segments.len() > SEGMENTS_MAX {
        return Err(boot(format!("the kernel has {} segments; the most is {SEGMENTS_MAX}", segments.len())));
    }
    segments.sort_unstable_by_key(|segment| segment.address);
    match segments.windows(2).find(|pair| pair[0].end() > pair[1].address) {
        Some(pair) => Err(boot(format!("two of the kernel's segments lie at {:#x}", pair[1].address))),
        None => Ok(()),
    }
}

/// The address of the PVH entry, if it is among these notes.
fn pvh_entry<H: FileHeader<Endian = Endianness>>(
    endian: Endianness,
    align: H::Word,
    notes: &[u8],
) -> Option<u32> {
    let mut notes = NoteIterator::<H>::new(endian, align, notes).ok()?;
    while let Ok(Some(note)) = notes.next() {
        if note.name() == b"Xen" && note.n_type(endian).0 == XEN_ELFNOTE_PHYS32_ENTRY {
            // Of four or eight bytes; the address has 32 bits.
            return note.desc().first_chunk().map(|low| u32::from_le_bytes(*low));
        }
    }
    None
}

fn bytes_at(file: &BootFile, offset: u64, len: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len as usize];
    file.file()
        .read_exact_at(&mut bytes, offset)
        .map_err(|error| boot("the kernel's headers cannot be read").with_source(error))?;
    Ok(bytes)
}

/// Where an initrd of `len` bytes goes: as high as it may, after the kernel.
pub(crate) fn initrd_address(len: u64, kernel_end: u64, memory: &Memory) -> Result<u64> {
    const PAGE: u64 = 0x1000;
    let end = memory::low_end(memory).min(layout::INITRD_END);
    let start = end.checked_sub(len).map(|start| start / PAGE * PAGE);
    start.filter(|start| *start >= kernel_end).ok_or_else(|| {
        boot(format!("an initrd of {len} bytes does not fit into the memory after the kernel, {kernel_end:#x} to {end:#x}"))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    /// A 64-bit ELF file with a segment of `0x100` bytes for 1 MiB and the notes given.
    pub(crate) fn elf(notes: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        let halves =
            |file: &mut Vec<u8>, words: &[u16]| words.iter().for_each(|w| file.extend(w.to_le_bytes()));
        let longs =
            |file: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| file.extend(w.to_le_bytes()));
        halves(&mut file, &[2, 62, 1, 0]);
        longs(&mut file, &[MIB + 0x10, 64, 0]);
        halves(&mut file, &[0, 0, 64, 56, 2, 0, 0, 0]);
        let data = 64 + 2 * 56;
        halves(&mut file, &[1, 0, 7, 0]); // PT_LOAD
        longs(&mut file, &[data, MIB, MIB, 0x100, 0x200, 0x1000]);
        halves(&mut file, &[4, 0, 4, 0]); // PT_NOTE
        longs(&mut file, &[data + 0x100, 0, 0, notes.len() as u64, notes.len() as u64, 4]);
        file.extend([0x90; 0x100]);
        file.extend(notes);
        file
    }

    pub(crate) fn note(kind: u32, address: u32) -> Vec<u8> {
        let mut note: Vec<u8> = [4, 4, kind].iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
        note.extend(b"Xen\0");
        note.extend(address.to_le_bytes());
        note
    }

    fn read(bytes: &[u8]) -> Result<Kernel> {
        read_for(Architecture::X86_64, bytes)
    }

    fn read_for(architecture: Architecture, bytes: &[u8]) -> Result<Kernel> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Kernel::read(&BootFile::new(file).unwrap(), architecture, 2 * MIB)
    }

    /// A 32-bit ELF file with a segment of `0x100` bytes for 1 MiB.
    fn elf32() -> Vec<u8> {
        let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        let words =
            |file: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| file.extend(w.to_le_bytes()));
        words(&mut file, &[3 << 16 | 2, 1, MIB as u32 + 0x20, 52, 0, 0]);
        words(&mut file, &[32 << 16 | 52, 1, 0]);
        words(&mut file, &[1, 84, 0xc010_0000, MIB as u32, 0x100, 0x200, 7, 0x1000]); // PT_LOAD
        file.extend([0x90; 0x100]);
        file
    }

    #[test]
    fn a_machine_of_either_kind_boots_32_bit_kernels_and_one_of_them_the_others() {
        for architecture in [Architecture::X86, Architecture::X86_64] {
            let kernel = read_for(architecture, &elf32()).unwrap();
            assert_eq!((kernel.entry, kernel.end()), (Entry::Linux32(0x10_0020), MIB + 0x200));
        }
        let error = read_for(Architecture::X86, &elf(&[])).unwrap_err().to_string();
        assert_eq!(error, "the kernel is for 64-bit x86, and the machine is not");
    }

    #[test]
    fn finds_the_entry() {
        let before = note(1, 0);
        for (notes, entry) in [
            (vec![], Entry::Linux64(MIB + 0x10)),
            (note(1, 0), Entry::Linux64(MIB + 0x10)),
            (note(18, 0x10_0020), Entry::Pvh(0x10_0020)),
            ([before, note(18, 0x10_0030)].concat(), Entry::Pvh(0x10_0030)),
        ] {
            let kernel = read(&elf(&notes)).unwrap();
            assert_eq!((kernel.entry, kernel.end()), (entry, MIB + 0x200));
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let entry_outside = elf(&note(18, 0x20_0000));
        let good = elf(&note(18, 0x10_0020));
        let changed = |at: usize, to: u64| {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&to.to_le_bytes());
            bytes
        };
        let arm = {
            let mut bytes = good.clone();
            bytes[18] = 183;
            bytes
        };
        let segment = 64 + 8;
        for (bytes, expect) in [
            (entry_outside, "outside the kernel"),
            (good[..good.len() - 4].to_vec(), "cannot be read"),
            (good[..0x100].to_vec(), "cut short"),
            (good[..80].to_vec(), "headers"),
            (b"\x7fELF".to_vec(), "headers"),
            (b"MZ".to_vec(), "not an ELF file"),
            (arm, "not for x86"),
            (changed(segment, u64::MAX - 8), "cut short"),
            (changed(segment + 16, 0x1000), "does not fit"),
            (changed(segment + 16, u64::MAX - 8), "does not fit"),
            (changed(segment + 32, u64::MAX - 8), "does not fit"),
            (changed(segment + 24, 0x201), "cut short"),
        ] {
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains(expect), "{error:?} does not say {expect:?}");
        }
    }

    #[test]
    fn refuses_segments_that_only_cost_time() {
        // Every note becomes one more segment, all at the place of the first.
        let twice = |count: u16| {
            let mut bytes = elf(&[]);
            bytes[56..58].copy_from_slice(&count.to_le_bytes());
            let header = bytes[64..120].to_vec();
            bytes.truncate(64);
            bytes.extend(header.repeat(count.into()));
            bytes.resize(0x2000, 0);
            bytes
        };
        for (count, expect) in [(2, "lie at"), (65, "the most is 64")] {
            let error = read(&twice(count)).unwrap_err().to_string();
            assert!(error.contains(expect), "{error:?} does not say {expect:?}");
        }
    }

    #[test]
    fn an_initrd_lies_after_the_kernel_or_nowhere() {
        let memory = memory::allocate(std::num::NonZeroU32::new(4).unwrap()).unwrap();
        assert_eq!(initrd_address(0x1001, 2 * MIB, &memory).unwrap(), 4 * MIB - 0x2000);
        assert_eq!(initrd_address(2 * MIB, 2 * MIB, &memory).unwrap(), 2 * MIB);
        for len in [2 * MIB + 1, 5 * MIB, u64::MAX] {
            initrd_address(len, 2 * MIB, &memory).unwrap_err();
        }
    }
}

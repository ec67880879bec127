//! Kernel files, and what a hypervisor loads of them.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use ami_core::Architecture;

use crate::decompress::{self, Format};
use crate::{Error, ErrorKind, Result};

/// The most that a kernel may unpack to.
pub(crate) const MAX_UNPACKED: usize = 512 << 20;
/// What file systems make holes of.
const PAGE: usize = 4096;

/// A kernel as a hypervisor loads it: an ELF file on x86, an `Image` on ARM.
///
/// ```
/// use std::borrow::Cow;
/// use ami_core::Architecture;
///
/// // The first bytes of a `vmlinux` for 64-bit x86, which is loaded as it is.
/// let mut vmlinux = b"\x7fELF\x02\x01\x01".to_vec();
/// vmlinux.resize(64, 0);
/// vmlinux[18] = 62;
/// let kernel = boot_image::unpack_kernel(&vmlinux)?;
/// assert_eq!(kernel.architecture, Architecture::X86_64);
/// assert!(matches!(kernel.image, Cow::Borrowed(_)));
/// let kept = kernel.into_owned();
/// drop(vmlinux);
/// assert_eq!(kept.image.len(), 64);
/// # Ok::<(), boot_image::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kernel<'a> {
    /// The machine that it runs on.
    pub architecture: Architecture,
    /// The ELF file or `Image`; borrowed where the file given was one already. After a bzImage's
    /// ELF file its relocation table may follow.
    pub image: Cow<'a, [u8]>,
}

impl Kernel<'_> {
    /// The kernel with its own copy of the bytes.
    pub fn into_owned(self) -> Kernel<'static> {
        Kernel { architecture: self.architecture, image: Cow::Owned(self.image.into_owned()) }
    }
}

/// Writes `bytes` to an empty file, where pages of zeroes become holes: a third of an unpacked Linux is zeroes, which
/// a hypervisor need not read.
///
/// ```
/// use std::os::unix::fs::{FileExt, MetadataExt};
///
/// let mut kernel = vec![0; 1 << 20];
/// kernel[..4].copy_from_slice(b"\x7fELF");
/// let file = tempfile::tempfile()?;
/// boot_image::write_sparse(&file, &kernel)?;
/// let mut read = vec![1; 1 << 20];
/// file.read_exact_at(&mut read, 0)?;
/// assert!(read == kernel);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
///
/// What the file system says; the file is as long as was written then.
pub fn write_sparse(file: &File, bytes: &[u8]) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().fold(0, |all, byte| all | byte) == 0;
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let mut offset = 0;
    for run in pages.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let end = offset + run.iter().map(|page| page.len()).sum::<usize>();
        if !is_zero(run[0]) {
            file.write_all_at(&bytes[offset..end], offset as u64)?;
        }
        offset = end;
    }
    file.set_len(bytes.len() as u64)
}

/// Unpacks a kernel file into what a hypervisor loads directly.
///
/// Read are: an ELF `vmlinux` and an ARM64 `Image`, which pass as they are; an x86 bzImage (boot
/// protocol 2.08 and later, payload packed with gzip, bzip2, lzma, xz, LZO, LZ4 or Zstandard); a gzip-packed ARM64
/// `Image`; and an EFI zboot file with any of these.
///
/// ```
/// use boot_image::{ErrorKind, unpack_kernel};
///
/// let error = unpack_kernel(b"#!/bin/sh\n").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Unsupported);
/// ```
///
/// # Errors
///
/// [`Unsupported`](ErrorKind::Unsupported) for a file or compression that is none of these,
/// [`Corrupt`](ErrorKind::Corrupt) where a header or a payload contradicts itself,
/// [`TooLarge`](ErrorKind::TooLarge) for more than 512 MiB unpacked, and
/// [`WrongArchitecture`](ErrorKind::WrongArchitecture) for another machine's kernel.
pub fn unpack_kernel(bytes: &[u8]) -> Result<Kernel<'_>> {
    if let Some(architecture) = direct_architecture(bytes)? {
        return Ok(Kernel { architecture, image: Cow::Borrowed(bytes) });
    }
    let image = if let Some(bz) = BzImage::parse(bytes)? {
        bz.unpack()?
    } else if let Some((format, payload)) = zboot_payload(bytes)? {
        decompress::bounded(format, payload, MAX_UNPACKED)?
    } else if Format::of(bytes) == Some(Format::Gzip) {
        decompress::bounded(Format::Gzip, bytes, MAX_UNPACKED)?
    } else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the file is no Linux kernel: neither a bzImage, an ELF file nor an ARM64 Image",
        ));
    };
    match direct_architecture(&image)? {
        Some(architecture) => Ok(Kernel { architecture, image: Cow::Owned(image) }),
        None => Err(corrupt("what the kernel file unpacks to is neither an ELF file nor an ARM64 Image")),
    }
}

/// The architecture of a kernel file; unpacks it only where its headers do not say.
pub(crate) fn architecture_of(bytes: &[u8]) -> Result<Architecture> {
    if let Some(architecture) = direct_architecture(bytes)? {
        return Ok(architecture);
    }
    match BzImage::parse(bytes)?.and_then(|bz| bz.architecture()) {
        Some(architecture) => Ok(architecture),
        None => Ok(unpack_kernel(bytes)?.architecture),
    }
}

/// The architecture of a file that a hypervisor loads as it is, or `None` for any other file.
fn direct_architecture(bytes: &[u8]) -> Result<Option<Architecture>> {
    if bytes.starts_with(b"\x7fELF") {
        return elf_architecture(bytes).map(Some);
    }
    if bytes.get(56..60) == Some(b"ARM\x64") {
        return Ok(Some(Architecture::Arm64));
    }
    Ok(None)
}

fn elf_architecture(bytes: &[u8]) -> Result<Architecture> {
    const CLASS_32: u8 = 1;
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const EM_386: u16 = 3;
    const EM_X86_64: u16 = 62;
    const EM_AARCH64: u16 = 183;

    let (Some(&class), Some(&data), Some(machine)) = (bytes.get(4), bytes.get(5), u16_at(bytes, 18)) else {
        return Err(corrupt("the ELF header of the kernel is cut short"));
    };
    match (class, data, machine) {
        (CLASS_32, LITTLE_ENDIAN, EM_386) => Ok(Architecture::X86),
        (CLASS_64, LITTLE_ENDIAN, EM_X86_64) => Ok(Architecture::X86_64),
        (CLASS_64, LITTLE_ENDIAN, EM_AARCH64) => Ok(Architecture::Arm64),
        (_, _, machine) => Err(Error::new(
            ErrorKind::WrongArchitecture,
            format!(
                "the kernel is an ELF file of class {class} for machine {machine}, not one for i386, x86_64 or arm64"
            ),
        )),
    }
}

/// An x86 bzImage: the fields of its setup header that say where the kernel proper lies.
struct BzImage<'a> {
    version: u16,
    is_64_bit: bool,
    payload: &'a [u8],
}

impl<'a> BzImage<'a> {
    /// `None` if the file is no bzImage at all.
    fn parse(bytes: &'a [u8]) -> Result<Option<Self>> {
        const SETUP_SECTS: usize = 0x1f1;
        const BOOT_FLAG: usize = 0x1fe;
        const MAGIC: usize = 0x202;
        const VERSION: usize = 0x206;
        const XLOADFLAGS: usize = 0x236;
        const PAYLOAD_OFFSET: usize = 0x248;
        const PAYLOAD_LENGTH: usize = 0x24c;
        const XLF_KERNEL_64: u16 = 1;

        if bytes.get(MAGIC..MAGIC + 4) != Some(b"HdrS") || u16_at(bytes, BOOT_FLAG) != Some(0xaa55) {
            return Ok(None);
        }
        let cut_short = || corrupt("the bzImage is cut short in its setup header");
        let version = u16_at(bytes, VERSION).ok_or_else(cut_short)?;
        if version < 0x0208 {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the bzImage has boot protocol {major}.{minor:02}; 2.08 (Linux 2.6.26) or later is needed"
                ),
            ));
        }
        let setup_sects = match bytes.get(SETUP_SECTS) {
            Some(&0) => 4,
            Some(&n) => usize::from(n),
            None => return Err(cut_short()),
        };
        let offset = u32_at(bytes, PAYLOAD_OFFSET).ok_or_else(cut_short)? as usize;
        let length = u32_at(bytes, PAYLOAD_LENGTH).ok_or_else(cut_short)? as usize;
        let xloadflags = u16_at(bytes, XLOADFLAGS).ok_or_else(cut_short)?;

        let start = ((setup_sects + 1) * 512).checked_add(offset);
        let end = start.and_then(|start| start.checked_add(length));
        let payload = start.zip(end).and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| {
            corrupt(format!(
                "the bzImage says that its payload has {length} bytes at {offset}, which is outside of the file"
            ))
        })?;
        Ok(Some(Self { version, is_64_bit: xloadflags & XLF_KERNEL_64 != 0, payload }))
    }

    /// The architecture, if the header says it: `xloadflags` came with protocol 2.12.
    fn architecture(&self) -> Option<Architecture> {
        match (self.version >= 0x020c, self.is_64_bit) {
            (true, true) => Some(Architecture::X86_64),
            (true, false) => Some(Architecture::X86),
            (false, _) => None,
        }
    }

    /// The kernel proper. The payload's last four bytes are the size that it unpacks to: gzip's own
    /// trailer ends with it, and for the other formats the kernel's build appends it.
    fn unpack(&self) -> Result<Vec<u8>> {
        let format = Format::of(self.payload).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "the payload of the bzImage is in no known compression format")
        })?;
        let Some((packed, size)) = self.payload.split_last_chunk::<4>() else {
            return Err(corrupt("the payload of the bzImage is cut short"));
        };
        let packed = if format == Format::Gzip { self.payload } else { packed };
        let size = u32::from_le_bytes(*size) as usize;
        let image = decompress::exact(format, packed, size, MAX_UNPACKED)?;
        let found = match direct_architecture(&image)? {
            Some(found @ (Architecture::X86 | Architecture::X86_64)) => found,
            _ => return Err(corrupt("the payload of the bzImage is no ELF file for x86")),
        };
        match self.architecture() {
            Some(said) if said != found => Err(corrupt(format!(
                "the header of the bzImage says that it is for {said}, and its payload is for {found}"
            ))),
            _ => Ok(image),
        }
    }
}

/// The payload of an EFI zboot file, which arm64 distributions ship as `vmlinuz`.
fn zboot_payload(bytes: &[u8]) -> Result<Option<(Format, &[u8])>> {
    if !bytes.starts_with(b"MZ") || bytes.get(4..8) != Some(b"zimg") {
        return Ok(None);
    }
    let range = u32_at(bytes, 8).zip(u32_at(bytes, 12));
    let payload = range.and_then(|(start, len)| bytes.get(start as usize..)?.get(..len as usize));
    let payload =
        payload.ok_or_else(|| corrupt("the payload of the EFI zboot file is outside of the file"))?;
    let format = Format::of(payload).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "the payload of the EFI zboot file is in no known compression format",
        )
    })?;
    // For all formats but gzip the build appends the unpacked size.
    let packed = match payload.split_last_chunk::<4>() {
        Some((packed, _)) if format != Format::Gzip => packed,
        _ => payload,
    };
    Ok(Some((format, packed)))
}

fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

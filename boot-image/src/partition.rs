//! Where the file systems of a disk lie.

use gpt::disk::LogicalBlockSize;
use gpt::header::{Header, HeaderError, read_header_from_arbitrary_device};
use gpt::partition::file_read_partitions;
use gpt::partition_types;
use storage_block::{Disk, SECTOR};

use crate::window::Window;
use crate::{Error, ErrorKind, Result};

/// The most entries that a partition table may have; every tool makes 128.
const MAX_ENTRIES: u32 = 1024;

/// A place where a file system may lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The number and unique id of the partition; `None` where the disk has no partitions.
    pub(crate) partition: Option<(u32, String)>,
    start: u64,
    len: u64,
    rank: u8,
}

impl Place {
    pub(crate) fn open(&self, disk: &Disk) -> Window {
        Window::new(disk, self.start, self.len)
    }

    /// How a message calls it.
    pub(crate) fn name(&self) -> String {
        match &self.partition {
            Some((number, _)) => format!("partition {number}"),
            None => "the disk".to_owned(),
        }
    }
}

/// What a disk's first sectors say about its partitions.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A GUID partition table, its partitions in the order in which they are searched.
    Gpt(Vec<Place>),
    /// The partition table of a PC BIOS, which is not read.
    Mbr,
    /// No partition table: the disk as a whole.
    Whole(Place),
}

/// Reads the partition table. The primary one counts; the backup one counts where the primary
/// header or table is damaged.
pub(crate) fn layout(disk: &Disk) -> Result<Layout> {
    let whole = Place { partition: None, start: 0, len: disk.size(), rank: 0 };
    let mut mbr = [0; SECTOR as usize];
    Window::whole(disk).read_exact_at(&mut mbr, 0).map_err(cannot_read)?;
    if mbr[510..] != [0x55, 0xaa] {
        return Ok(Layout::Whole(whole));
    }
    let kinds = [450, 466, 482, 498].map(|offset: usize| mbr[offset]);
    if !kinds.contains(&0xee) {
        // A boot sector can stand before an unpartitioned file system, too.
        return Ok(if kinds == [0; 4] { Layout::Whole(whole) } else { Layout::Mbr });
    }
    let backup = disk.size() / SECTOR - 1;
    read_table(disk, 1).or_else(|primary| match read_table(disk, backup) {
        Err(_) => Err(primary),
        places => places,
    })
}

/// Reads the table whose header lies at `lba`.
fn read_table(disk: &Disk, lba: u64) -> Result<Layout> {
    const LBS: LogicalBlockSize = LogicalBlockSize::Lb512;
    // The reader expects the header in the second sector of what it is given.
    let mut header_at = Window::new(disk, (lba.max(1) - 1) * SECTOR, 2 * SECTOR);
    let header = read_header_from_arbitrary_device(&mut header_at, LBS).map_err(|e| match e {
        HeaderError::Io(e) => cannot_read(e),
        e => damaged("the header of the GUID partition table is damaged").because(e),
    })?;
    check_header(&header)?;
    let table = file_read_partitions(&mut Window::whole(disk), &header, LBS)
        .map_err(|e| damaged("the GUID partition table is damaged").because(e))?;

    let mut places: Vec<Place> = table
        .iter()
        .filter(|(_, p)| p.is_used())
        .filter_map(|(number, p)| {
            let (start, len) = (p.bytes_start(LBS).ok()?, p.bytes_len(LBS).ok()?);
            let rank = rank(&p.part_type_guid);
            Some(Place { partition: Some((*number, p.part_guid.to_string())), start, len, rank })
        })
        .collect();
    places.sort_by_key(|place| place.rank);
    Ok(Layout::Gpt(places))
}

/// The reader panics on another entry size than 128, and allocates as many entries as the header
/// says that there are.
fn check_header(header: &Header) -> Result<()> {
    if header.part_size != 128 || header.num_parts > MAX_ENTRIES {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the GUID partition table has {} entries of {} bytes; at most {MAX_ENTRIES} of 128 are supported",
                header.num_parts, header.part_size
            ),
        ));
    }
    Ok(())
}

/// Where a partition stands in the search: a boot loader's own before the roots, and these before
/// the rest.
fn rank(kind: &partition_types::Type) -> u8 {
    let is = |types: &[partition_types::Type]| types.iter().any(|t| t.guid == kind.guid);
    if is(&[partition_types::FREEDESK_BOOT]) {
        0
    } else if is(&[
        partition_types::LINUX_ROOT_X86,
        partition_types::LINUX_ROOT_X64,
        partition_types::LINUX_ROOT_ARM_64,
    ]) {
        1
    } else {
        2
    }
}

fn cannot_read(e: std::io::Error) -> Error {
    let kind = match e.kind() {
        std::io::ErrorKind::UnexpectedEof => ErrorKind::NoPartition,
        _ => ErrorKind::Io,
    };
    Error::new(kind, "the partition table cannot be read").because(e)
}

fn damaged(context: &str) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

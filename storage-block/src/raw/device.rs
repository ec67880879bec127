//! What the kernel says of a block device.

use std::fs::File;

use rustix::fs::{ioctl_blkpbszget, major, minor};

use crate::Capabilities;

/// What a device is good at, as far as it says.
///
/// Through the page cache any byte of it can be written, whatever its own blocks are: those are what is best written whole.
/// It does not know its holes.
pub(super) fn capabilities(device: &File, number: u64) -> Capabilities {
    let least = Capabilities::LEAST;
    let physical = ioctl_blkpbszget(device).unwrap_or(0);
    Capabilities {
        physical_block: if physical.is_power_of_two() {
            physical.max(least.physical_block)
        } else {
            least.physical_block
        },
        discard_frees: takes(number, "discard_max_bytes"),
        cheap_zeroes: takes(number, "write_zeroes_max_bytes"),
        in_files: true,
        ..least
    }
}

/// Whether a limit of the device's queue is anything; that of a partition is in the directory above.
fn takes(number: u64, limit: &str) -> bool {
    let device = format!("/sys/dev/block/{}:{}", major(number), minor(number));
    let said = ["", "../"]
        .iter()
        .find_map(|whose| std::fs::read_to_string(format!("{device}/{whose}queue/{limit}")).ok());
    said.and_then(|said| said.trim().parse::<u64>().ok()).is_some_and(|most| most > 0)
}

//! The figures of storage. Where raw files are the baseline, the noise is what a second one like it gives.

use super::bar::{Bar, Figure, Place};
use super::{Area, Disk};
use crate::prerequisites::{FIO, QEMU_IMG, QEMU_NBD};

pub(super) const AREA: Area = Area {
    name: "storage",
    figures: FIGURES,
    tools: &[FIO, QEMU_IMG, QEMU_NBD],
    // The real data, the store made of it, another that is being made, and what a snapshot adds to it.
    disk: Some(Disk { full: 14 << 30, quick: 2 << 30 }),
};

const fn at_most(name: &'static str, bar: f64) -> Figure {
    Figure { name, unit: "x", bar: Bar::AtMost(bar), place: Place::Host }
}

const fn at_least(name: &'static str, bar: f64) -> Figure {
    Figure { name, unit: "x", bar: Bar::AtLeast(bar), place: Place::Host }
}

const fn reported(name: &'static str, place: Place) -> Figure {
    Figure { name, unit: "x", bar: Bar::None, place }
}

const FIGURES: &[Figure] = &[
    // Constant in the size of the image, and about what it costs to make anything durable. On ext4 the least for a file
    // with bytes in it is 2.3 of an empty one, whose synchronisation writes no data, and either directory is half of one.
    at_most("clone_1t_over_1g", 1.2),
    at_most("clone_over_empty_file", 2.0),
    // The same beside a file whose directory is synchronised too, as the clone's is.
    reported("clone_over_named_file", Place::Host),
    // A volume's speed in units of a raw file's.
    at_least("random_read", 0.95),
    at_least("random_read_depth_32", 0.95),
    // By a queue, and one of a raw disk.
    reported("random_read_depth_32_queued", Place::Host),
    // Of a clone of which so many in a hundred blocks, at random, were overwritten.
    reported("random_read_overwritten_5", Place::Host),
    reported("random_read_overwritten_50", Place::Host),
    at_least("random_overwrite", 0.95),
    at_least("random_overwrite_first", 0.5),
    reported("random_overwrite_flushed", Place::Host),
    reported("random_overwrite_first_flushed", Place::Host),
    at_least("sequential_read", 0.95),
    // The first read of all, which compares every chunk with its checksum.
    reported("sequential_read_first", Place::Host),
    at_least("sequential_write", 0.95),
    // Beside a file that has its bytes already.
    reported("sequential_write_first", Place::Host),
    // An import's speed in units of that of hashing alone, of copying the file, and of itself with one processor.
    // What it takes of all processors must leave two of them that speed.
    at_least("import_over_sha256", 0.8),
    reported("import_over_copy", Place::Host),
    at_most("import_processor_time", 2.5),
    at_least("import_two_processors", 1.2),
    // The time of a snapshot over that of hashing and writing the chunks that changed.
    at_most("snapshot_over_hash_and_write", 1.3),
    // How long writers stand still for one while the disk has all to do that it can, in 95 of 100.
    Figure { name: "snapshot_pause", unit: "ms", bar: Bar::AtMost(5.0), place: Place::Host },
    // The longest of two hundred, and in 95 of 100 that of four volumes at one instant.
    Figure { name: "snapshot_pause_longest", unit: "ms", bar: Bar::AtMost(50.0), place: Place::Host },
    Figure { name: "snapshot_pause_of_4", unit: "ms", bar: Bar::None, place: Place::Host },
    // The image and twenty clones over the image and what is private to them.
    at_most("space_of_20_clones", 1.3),
    // The server's speed in units of qemu-nbd's.
    at_least("nbd_read_4k", 1.0),
    at_least("nbd_write_4k", 1.0),
    at_least("nbd_read_1m", 1.0),
    at_least("nbd_write_1m", 1.0),
    // A volume's speed in units of that of a qcow2 overlay: made by qemu-img, open in imago, served by qemu-nbd.
    reported("clone_beside_qemu_img", Place::Rivals),
    reported("random_read_beside_imago", Place::Rivals),
    reported("random_read_depth_32_beside_imago", Place::Rivals),
    reported("random_overwrite_beside_imago", Place::Rivals),
    reported("random_overwrite_first_beside_imago", Place::Rivals),
    reported("sequential_read_beside_imago", Place::Rivals),
    reported("sequential_write_beside_imago", Place::Rivals),
    reported("nbd_read_4k_beside_qcow2", Place::Rivals),
    reported("nbd_write_4k_beside_qcow2", Place::Rivals),
    reported("nbd_read_1m_beside_qcow2", Place::Rivals),
    reported("nbd_write_1m_beside_qcow2", Place::Rivals),
    // The same of whole images: made of a raw file, and kept while a clone goes on of which a hundredth has changed.
    reported("import_beside_qemu_img", Place::Rivals),
    reported("snapshot_beside_qemu_img", Place::Rivals),
    // The space of the raw file and twenty overlays of it, a hundredth of each written, over that of a store and volumes.
    reported("space_of_20_clones_beside_qcow2", Place::Rivals),
];

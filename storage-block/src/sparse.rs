//! A long list of cells that takes memory only where something is.

use std::fmt;
use std::sync::OnceLock;

use crate::format::{LEAF_SPAN, MAX_SIZE};

/// Cells in a row, and rows.
const SIDE: usize = 1024;

// One cell for as much disk as a manifest leaf speaks of, up to the largest disk.
const _: () = assert!(MAX_SIZE / LEAF_SPAN <= (SIDE * SIDE) as u64);

/// As many cells as the largest disk has leaves. A new one takes the same memory for a disk of any size, so
/// that a disk can grow, and next to none before the first cell is filled: new volumes are made by the thousand. Cells are
/// filled once, by whoever comes first, and looked up without a lock.
pub(crate) struct Sparse<T>(OnceLock<Row<Row<T>>>);

type Row<T> = Box<[OnceLock<T>]>;

impl<T> Default for Sparse<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

fn empty<T>() -> Row<T> {
    (0..SIDE).map(|_| OnceLock::new()).collect()
}

impl<T> Sparse<T> {
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        self.0.get()?.get(index / SIDE)?.get()?[index % SIDE].get()
    }

    pub(crate) fn get_or_init(&self, index: usize, make: impl FnOnce() -> T) -> &T {
        self.0.get_or_init(empty)[index / SIDE].get_or_init(empty)[index % SIDE].get_or_init(make)
    }

    /// The cells that are filled, in order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &T)> {
        let rows = self.0.get().into_iter().flat_map(|rows| rows.iter().enumerate());
        let rows = rows.filter_map(|(number, row)| Some((number, row.get()?)));
        rows.flat_map(|(row, cells)| {
            let filled = cells.iter().enumerate().filter_map(|(number, cell)| Some((number, cell.get()?)));
            filled.map(move |(number, value)| ((row * SIDE + number) as u64, value))
        })
    }
}

impl<T> fmt::Debug for Sparse<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sparse").field("filled", &self.iter().count()).finish()
    }
}

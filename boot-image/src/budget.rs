//! How much work the search for one kernel may make.

use std::cell::Cell;
use std::rc::Rc;

use crate::{Error, ErrorKind, Result};

/// What a search may cost in all: a unit is about what it takes to go through a directory of 4 KiB, some
/// 20 µs where its names are short. An ordinary search takes some hundreds; this many take some seconds.
const MAX_WORK: u64 = 100_000;

/// What is left of [`MAX_WORK`]. Clones share it, so that each of the file systems of a disk, which may all lie
/// on the same blocks, draws on the same.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Rc<Cell<u64>>);

impl Budget {
    pub(crate) fn new() -> Self {
        Self(Rc::new(Cell::new(MAX_WORK)))
    }

    /// Takes `work` units, or else everything, so that the search comes to its end.
    pub(crate) fn spend(&self, work: u64) -> Result<()> {
        let left = self.0.get().checked_sub(work);
        self.0.set(left.unwrap_or(0));
        let too_much = "what is to be booted is said in too many or too large files, directories and links";
        left.map(drop).ok_or_else(|| Error::new(ErrorKind::TooLarge, too_much))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_what_is_left() {
        let budget = Budget::new();
        let other = budget.clone();
        budget.spend(MAX_WORK - 2).unwrap();
        other.spend(1).unwrap();
        assert_eq!(budget.spend(2).unwrap_err().kind(), ErrorKind::TooLarge);
        // A smaller step would fit, but the search is over.
        assert_eq!(other.spend(1).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}

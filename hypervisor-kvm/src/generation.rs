//! The machine's generation id: 16 random bytes by which a guest tells that it has become another one.
//!
//! It stays while the guest's time goes on, and changes when a machine continues what was saved of one: then
//! two guests may be the same, and what must be unique, such as the state of a random number generator, has to
//! be made anew (Microsoft, "Virtual Machine Generation ID"; Linux, `drivers/virt/vmgenid.c`).

use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result};
use crate::layout;
use crate::memory::Memory;

/// Writes a new id to where the guest looks for it.
pub(crate) fn write_new(memory: &Memory) -> Result<()> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).host("there are no random bytes for a generation id")?;
    memory
        .write_slice(&id, GuestAddress(layout::GENERATION_ID))
        .host("the generation id does not fit into the memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::num::NonZeroU32;

    #[test]
    fn it_is_another_one_each_time_and_alone_on_its_page() {
        let memory = crate::memory::allocate(NonZeroU32::new(2).unwrap()).unwrap();
        let mut seen = BTreeSet::from([[0; 16]]);
        for _ in 0..8 {
            write_new(&memory).unwrap();
            let id: [u8; 16] = memory.read_obj(GuestAddress(layout::GENERATION_ID)).unwrap();
            assert!(seen.insert(id), "{id:?} was there before");
        }
        let mut page = [0; 4096];
        memory.read_slice(&mut page, GuestAddress(layout::GENERATION_ID)).unwrap();
        assert_eq!(page[16..], [0; 4080]);
        let reserved = layout::LOW_MEMORY_END..layout::HIGH_MEMORY;
        assert!(reserved.contains(&layout::GENERATION_ID), "a guest may use its memory for something else");
    }
}

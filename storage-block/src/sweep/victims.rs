//! Which packs have little alive in them, and what that is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::file_len;
use crate::Result;
use crate::format::{HOLE, Id, PACK_HEADER, UNIT};
use crate::pack::{Dead, Index, Pack, Taken};
use crate::places::Place;
use crate::store::{Inner, read, write};

/// Objects that are listed at one time, of packs that are rewritten.
pub(super) const LISTED: usize = 1 << 20;

/// A pack that is to go.
pub(super) struct Victim {
    pub(super) pack: Arc<Pack>,
    /// What its live objects take up.
    pub(super) alive: u64,
    /// How many objects there are in it, alive or not.
    objects: usize,
    /// What is taken of the pack, if it would be appended to.
    pub(super) open: Option<Taken>,
}

/// What lies in a pack that is rewritten.
#[derive(Default)]
pub(super) struct Contents {
    /// In the order in which they lie there.
    pub(super) live: Vec<(Id, Place)>,
    pub(super) dead: Dead,
}

/// The packs that are at most half alive, those with the least alive first. Nobody appends to them from here on. Where
/// something is missing, what may hold it is spared.
pub(super) fn find(inner: &Inner, live: &HashSet<Id>, missing: bool) -> Result<Vec<Victim>> {
    let mut victims = half_alive(&read(&inner.index), live, missing)?;
    // Nobody stores anything meanwhile.
    let mut index = write(&inner.index);
    for victim in &mut victims {
        victim.open = index.open.remove(&victim.pack.number);
    }
    drop(index);
    victims.sort_by_key(|victim| victim.alive);
    Ok(victims)
}

fn half_alive(index: &Index, live: &HashSet<Id>, missing: bool) -> Result<Vec<Victim>> {
    let mut counts: HashMap<u32, (u64, usize)> = HashMap::new();
    for (id, place) in index.places.iter() {
        let (alive, objects) = counts.entry(place.pack).or_default();
        *alive += if live.contains(id) { u64::from(place.slot.units()) * UNIT } else { 0 };
        *objects += 1;
    }
    let spared = if missing { index.with_more() } else { HashSet::new() };
    let mut victims = Vec::new();
    for (number, pack) in index.packs.iter().filter(|(number, _)| !spared.contains(*number)) {
        let (alive, objects) = counts.get(number).copied().unwrap_or_default();
        if alive * 2 <= file_len(&pack.path)?.saturating_sub(PACK_HEADER) {
            victims.push(Victim { pack: Arc::clone(pack), alive, objects, open: None });
        }
    }
    Ok(victims)
}

/// How many of the first of them have no more than so many objects; one at least.
pub(super) fn listed_at_once(victims: &[Victim], listed: usize) -> usize {
    let mut objects = 0;
    let fits = |victim: &&Victim| {
        objects += victim.objects;
        objects <= listed
    };
    victims.iter().take_while(fits).count().max(1)
}

/// What lies in each of these packs: once for all of them, as that takes a look at every object there is.
pub(super) fn contents(index: &Index, live: &HashSet<Id>, victims: &[Victim]) -> Vec<Contents> {
    let places: HashMap<u32, usize> =
        victims.iter().zip(0..).map(|(victim, at)| (victim.pack.number, at)).collect();
    let mut contents: Vec<Contents> = victims.iter().map(|_| Contents::default()).collect();
    for (id, place) in index.places.iter() {
        let at = places.get(&place.pack);
        if live.contains(id) {
            at.into_iter().for_each(|at| contents[*at].live.push((*id, place)));
            continue;
        }
        at.into_iter().for_each(|at| contents[*at].dead.objects.push(*id));
        // What something that is alive differs from is alive itself.
        let base = place.patch.map(|patch| patch.base).filter(|base| *base != HOLE && !live.contains(base));
        let base = base.and_then(|base| index.places.get(&base));
        if let Some(at) = base.and_then(|base| places.get(&base.pack)) {
            contents[*at].dead.patches.push(*id);
        }
    }
    // Who finds damage meanwhile has these take the place of what they are copies of.
    for (id, copies) in &index.copies {
        for at in copies.iter().filter_map(|copy| places.get(&copy.pack)) {
            contents[*at].dead.objects.push(*id);
        }
    }
    for contents in &mut contents {
        contents.live.sort_unstable_by_key(|(_, place)| place.slot.start);
    }
    contents
}

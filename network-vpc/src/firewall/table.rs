//! A bounded memory of conversations, in lists by how long they may be silent.
//!
//! A list is in the order in which its conversations were last heard of, so that the first is the one that is over
//! first and the one that makes room. All that is done takes the same time whatever is remembered: no packet ever
//! waits for a sweep.

use std::collections::HashMap;
use std::net::Ipv4Addr;

/// A conversation, seen from the interface: its own address and port, and the peer's. ICMP's echoes have their
/// identifier as both ports, and protocols without ports have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) own: Ipv4Addr,
    pub(super) peer: Ipv4Addr,
    pub(super) peer_port: u16,
    pub(super) port: u16,
    pub(super) protocol: u8,
}

/// What a conversation is held to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Class {
    /// Not both sides are known to want it, and the instance did not begin it.
    WaitingIn,
    /// The same, and it did.
    WaitingOut,
    /// Of a protocol without ports.
    Portless,
    /// Of UDP, with more than a question and its answer.
    Stream,
    /// Of TCP, with its handshake complete.
    Established,
    /// Of TCP, and both sides have ended it.
    Closing,
}

const CLASSES: [Class; 6] =
    [Class::WaitingIn, Class::WaitingOut, Class::Portless, Class::Stream, Class::Established, Class::Closing];

impl Class {
    /// How long it may be silent, in seconds: EC2's defaults (EC2 User Guide, "Security group connection tracking").
    pub(super) fn patience(self) -> u32 {
        match self {
            Self::WaitingIn | Self::WaitingOut | Self::Closing => 30,
            Self::Stream => 180,
            Self::Established => 432_000,
            Self::Portless => 600,
        }
    }
}

/// How long a TCP conversation may be silent, in seconds, where others need its place: what EC2's newest instances
/// allow in any case.
const SILENT: u32 = 350;

/// The progress of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    /// Whether the instance did not begin it.
    pub(super) inwards: bool,
    pub(super) phase: Phase,
    /// Which sides of a TCP conversation have ended it: a bit for the one that began it, and one for the other.
    pub(super) ended: u8,
    /// Of TCP. While it begins, the sides' initial sequence numbers; then what each has last acknowledged.
    pub(super) numbers: [u32; 2],
}

/// How far a conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It may begin; the packet that it begins with is still to come.
    Expected,
    /// Asked.
    Begun,
    /// Asked and answered.
    Answered,
    /// Asked, answered, and asked again.
    AskedAgain,
    /// It goes on.
    GoesOn,
}

/// Nobody.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Entry {
    key: Key,
    class: Class,
    state: State,
    /// When it was last heard of, in seconds.
    heard: u32,
    before: u32,
    after: u32,
}

/// A million of them are to be remembered in 256 MiB, with the index, which is up to half empty.
const _: () = assert!(size_of::<Entry>() <= 40 && size_of::<(Key, u32)>() <= 20);

#[derive(Debug, Clone, Copy)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self { first: NONE, last: NONE, len: 0 }
    }
}

/// Where a conversation is in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(u32);

#[derive(Debug)]
pub(super) struct Table {
    index: HashMap<Key, u32>,
    entries: Vec<Entry>,
    /// Slots that are free, linked by `after`.
    free: u32,
    lists: [List; CLASSES.len()],
    most: usize,
}

impl Table {
    /// For at most so many conversations.
    pub(super) fn new(most: usize) -> Self {
        Self {
            index: HashMap::new(),
            entries: Vec::new(),
            free: NONE,
            lists: Default::default(),
            most: most.clamp(64, NONE as usize / 2),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// How many there are of a class.
    pub(super) fn count(&self, class: Class) -> usize {
        self.lists[class as usize].len
    }

    /// Whether there is room for another of a class. A sixteenth each are for what waits in either direction,
    /// and for what has no ports: nothing else takes their places, and they take nothing else's. What goes on shares
    /// the rest, in which UDP, whose senders may be made up, has at most a quarter of all.
    fn has_room(&self, class: Class) -> bool {
        let share = self.most / 16;
        let going_on = || {
            let classes = [Class::Stream, Class::Established, Class::Closing];
            classes.iter().map(|class| self.count(*class)).sum::<usize>() < self.most - 3 * share
        };
        match class {
            Class::WaitingIn | Class::WaitingOut | Class::Portless => self.count(class) < share,
            Class::Stream => self.count(class) < self.most / 4 && going_on(),
            Class::Established => going_on(),
            // Comes of one that is established.
            Class::Closing => true,
        }
    }

    /// A conversation that is not over.
    pub(super) fn find(&self, key: &Key, now: u32) -> Option<(Slot, State)> {
        let at = *self.index.get(key)?;
        let entry = &self.entries[at as usize];
        (!entry.is_over(now)).then_some((Slot(at), entry.state))
    }

    /// Remembers a conversation in place of what is known of it. What has waited longest makes room.
    pub(super) fn begin(&mut self, key: Key, class: Class, state: State, now: u32) {
        if let Some(at) = self.index.get(&key) {
            self.remove(Slot(*at));
        }
        while !self.has_room(class) {
            match self.lists[class as usize].first {
                NONE => return,
                oldest => self.remove(Slot(oldest)),
            }
        }
        let entry = Entry { key, class, state, heard: now, before: NONE, after: NONE };
        let at = match self.free {
            NONE => {
                self.entries.push(entry);
                // `most` is far below what a u32 counts.
                (self.entries.len() - 1) as u32
            }
            at => {
                self.free = self.entries[at as usize].after;
                self.entries[at as usize] = entry;
                at
            }
        };
        self.index.insert(key, at);
        self.link(at);
    }

    pub(super) fn set(&mut self, slot: Slot, state: State) {
        self.entries[slot.0 as usize].state = state;
    }

    /// It was heard of now.
    pub(super) fn hear(&mut self, slot: Slot, now: u32) {
        if self.entries[slot.0 as usize].heard != now {
            self.unlink(slot.0);
            self.entries[slot.0 as usize].heard = now;
            self.link(slot.0);
        }
    }

    /// Makes it one of another class, heard of now. Says whether there was room, for which one of TCP goes that
    /// closes or has been silent for long.
    pub(super) fn promote(&mut self, slot: Slot, class: Class, now: u32) -> bool {
        if class == Class::Established && !self.has_room(class) {
            let oldest = |class: Class| Some(self.lists[class as usize].first).filter(|at| *at != NONE);
            let silent = |at: &u32| now.saturating_sub(self.entries[*at as usize].heard) > SILENT;
            let closing = oldest(Class::Closing);
            if let Some(at) = closing.or_else(|| oldest(Class::Established).filter(silent)) {
                self.remove(Slot(at));
            }
        }
        if !self.has_room(class) {
            return false;
        }
        self.unlink(slot.0);
        let entry = &mut self.entries[slot.0 as usize];
        (entry.class, entry.heard) = (class, now);
        self.link(slot.0);
        true
    }

    pub(super) fn remove(&mut self, slot: Slot) {
        self.unlink(slot.0);
        let entry = &mut self.entries[slot.0 as usize];
        self.index.remove(&entry.key);
        entry.after = self.free;
        self.free = slot.0;
        if self.index.is_empty() {
            // What a flood took is given back.
            (self.index, self.entries, self.free) = (HashMap::new(), Vec::new(), NONE);
        }
    }

    /// Forgets some of what is over: more than one packet can add.
    pub(super) fn expire(&mut self, now: u32) {
        for class in CLASSES {
            for _ in 0..2 {
                match self.lists[class as usize].first {
                    NONE => break,
                    first if self.entries[first as usize].is_over(now) => self.remove(Slot(first)),
                    _ => break,
                }
            }
        }
    }

    /// Removes all between addresses of which one is gone. It looks at every one, which nothing else does.
    pub(super) fn forget(&mut self, is_gone: impl Fn(Ipv4Addr) -> bool) {
        let is_over = |key: &Key| is_gone(key.peer) || is_gone(key.own);
        let gone: Vec<u32> = self.index.iter().filter(|(key, _)| is_over(key)).map(|(_, at)| *at).collect();
        gone.into_iter().for_each(|at| self.remove(Slot(at)));
    }

    /// Puts an entry at the end of its class's list.
    fn link(&mut self, at: u32) {
        let list = &mut self.lists[self.entries[at as usize].class as usize];
        let last = std::mem::replace(&mut list.last, at);
        list.len += 1;
        match last {
            NONE => list.first = at,
            last => self.entries[last as usize].after = at,
        }
        let entry = &mut self.entries[at as usize];
        (entry.before, entry.after) = (last, NONE);
    }

    fn unlink(&mut self, at: u32) {
        let Entry { class, before, after, .. } = self.entries[at as usize];
        let list = &mut self.lists[class as usize];
        list.len -= 1;
        match before {
            NONE => list.first = after,
            before => self.entries[before as usize].after = after,
        }
        match after {
            NONE => self.lists[class as usize].last = before,
            after => self.entries[after as usize].before = before,
        }
    }

    /// That all is as it has to be.
    #[cfg(any(test, fuzzing))]
    pub(super) fn check(&self) {
        let mut total = 0;
        for class in CLASSES {
            let list = &self.lists[class as usize];
            let (mut at, mut before, mut heard, mut len) = (list.first, NONE, 0, 0);
            while at != NONE {
                let entry = &self.entries[at as usize];
                assert_eq!((entry.class, entry.before), (class, before));
                assert_eq!(self.index.get(&entry.key), Some(&at));
                assert!(entry.heard >= heard, "in the order in which they were heard of");
                (before, heard, at, len) = (at, entry.heard, entry.after, len + 1);
            }
            assert_eq!((list.last, list.len), (before, len));
            total += len;
        }
        assert_eq!(total, self.index.len());
        assert!(total <= self.most && self.entries.len() <= self.most, "no more than {}", self.most);
    }
}

impl Entry {
    fn is_over(&self, now: u32) -> bool {
        now.saturating_sub(self.heard) > self.class.patience()
    }
}

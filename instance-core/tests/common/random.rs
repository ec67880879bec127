//! What the tests of random lives share.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;

/// Numbers that depend on a seed alone (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % limit as u64) as usize
    }

    /// One of those that there are.
    pub(crate) fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { Some(&of[self.below(of.len())]) }
    }

    /// A key of those that there are.
    pub(crate) fn key<K: Copy, V>(&mut self, of: &BTreeMap<K, V>) -> Option<K> {
        if of.is_empty() { None } else { of.keys().nth(self.below(of.len())).copied() }
    }
}

/// What an environment variable says, or the default.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |n| n.parse().unwrap())
}

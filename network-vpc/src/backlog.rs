//! Frames for a machine that takes its frames more slowly than they come: a queue for each sender, served in turn, so
//! that who floods delays and loses only their own.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;

use instance_core::net::Frame;

/// The most frames of a sender that wait, and the most senders.
const SHARE: usize = 64;
const SENDERS: usize = 256;

/// The frames that wait.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    of: HashMap<Ipv4Addr, VecDeque<Frame>>,
    /// Whose turn it is. Every sender with frames is here once.
    turns: VecDeque<Ipv4Addr>,
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Keeps a frame, unless its sender has its share of waiting ones.
    pub(crate) fn push(&mut self, sender: Ipv4Addr, frame: Frame) {
        if let Some(waiting) = self.of.get_mut(&sender) {
            if waiting.len() < SHARE {
                waiting.push_back(frame);
            }
        } else if self.of.len() < SENDERS {
            self.of.insert(sender, VecDeque::from([frame]));
            self.turns.push_back(sender);
        }
    }

    /// Gives frames to `take` in turn, until there are no more or one comes back.
    pub(crate) fn drain(&mut self, mut take: impl FnMut(Frame) -> Result<(), Frame>) {
        while let Some(sender) = self.turns.pop_front() {
            let Some(waiting) = self.of.get_mut(&sender) else { continue };
            let refused = waiting.pop_front().map_or(Ok(()), &mut take).err();
            let is_full = refused.is_some();
            if let Some(frame) = refused {
                waiting.push_front(frame);
                self.turns.push_front(sender);
            } else if waiting.is_empty() {
                self.of.remove(&sender);
            } else {
                self.turns.push_back(sender);
            }
            if is_full {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const QUIET: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    #[test]
    fn who_floods_loses_only_their_own() {
        let mut backlog = Backlog::default();
        (0..1000).for_each(|n| backlog.push(FLOOD, Frame::new(vec![1, n as u8])));
        (0..3).for_each(|n| backlog.push(QUIET, Frame::new(vec![2, n])));
        let mut room = 5;
        let mut came = Vec::new();
        let mut take = |frame: Frame| {
            if room == 0 {
                return Err(frame);
            }
            room -= 1;
            came.push(frame.data);
            Ok(())
        };
        backlog.drain(&mut take);
        assert_eq!(came, [[1, 0], [2, 0], [1, 1], [2, 1], [1, 2]]);
        let mut rest = Vec::new();
        backlog.drain(|frame| {
            rest.push(frame.data);
            Ok(())
        });
        assert_eq!((rest.len(), &rest[..2]), (SHARE - 3 + 1, &[vec![2, 2], vec![1, 3]][..]));
        assert!(backlog.is_empty());
    }

    #[test]
    fn senders_are_bounded() {
        let mut backlog = Backlog::default();
        (0..10_000).for_each(|n| backlog.push(Ipv4Addr::from(n), Frame::new(vec![])));
        assert_eq!((backlog.of.len(), backlog.turns.len()), (SENDERS, SENDERS));
    }
}

//! Frames for a machine that takes its frames more slowly than they come: a queue for each sender, served in turn, so
//! that who floods delays and loses only their own.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;

use instance_core::net::Frame;

/// The most frames of a sender that wait, and the most peers.
const SHARE: usize = 64;
const PEERS: usize = 256;

/// The bytes of which each sender may have as much as others who have something there. One frame each has always room.
const BYTES: usize = 16 << 20;

/// Whose frames wait. The network itself has places that no peer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Sender {
    /// Another instance, by its address.
    Peer(Ipv4Addr),
    /// What the network answers: ARP, DHCP, pings of the router, names.
    Network,
    /// Datagrams from outside.
    Outside,
    /// Conversations of TCP that end at the [edge](crate::edge).
    Streams,
}

/// The frames of a sender that wait, and their bytes.
#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
}

/// The frames that wait.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    of: HashMap<Sender, Waiting>,
    /// Whose turn it is. Every sender with frames is here once.
    turns: VecDeque<Sender>,
    /// The one whose turn has come, and that was not taken.
    refused: Option<(Sender, Frame)>,
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.turns.is_empty() && self.refused.is_none()
    }

    /// Keeps so many frames of a sender's as it has a share left for, and leaves the others.
    pub(crate) fn fill(&mut self, sender: Sender, frames: &mut VecDeque<Frame>) {
        if frames.is_empty() {
            return;
        }
        let is_known = self.of.contains_key(&sender);
        // Those that are no peers are few.
        if !is_known && matches!(sender, Sender::Peer(_)) && self.of.len() >= PEERS {
            return;
        }
        let share = BYTES / (self.of.len() + usize::from(!is_known));
        let waiting = self.of.entry(sender).or_default();
        while let Some(next) = frames.front() {
            let fits = waiting.frames.is_empty() || waiting.bytes + next.data.len() <= share;
            if waiting.frames.len() >= SHARE || !fits {
                break;
            }
            waiting.bytes += next.data.len();
            waiting.frames.extend(frames.pop_front());
        }
        if !is_known {
            self.turns.push_back(sender);
        }
    }

    /// The frame whose turn it is.
    pub(crate) fn next(&mut self) -> Option<(Sender, Frame)> {
        if let Some(refused) = self.refused.take() {
            return Some(refused);
        }
        let sender = self.turns.pop_front()?;
        let waiting = self.of.get_mut(&sender)?;
        let frame = waiting.frames.pop_front()?;
        waiting.bytes -= frame.data.len();
        if waiting.frames.is_empty() {
            self.of.remove(&sender);
        } else {
            self.turns.push_back(sender);
        }
        Some((sender, frame))
    }

    /// Keeps the frame whose turn it was, which nobody has taken: it is the next one again.
    pub(crate) fn put_back(&mut self, sender: Sender, frame: Frame) {
        self.refused = Some((sender, frame));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOD: Sender = Sender::Peer(Ipv4Addr::new(10, 0, 0, 1));
    const QUIET: Sender = Sender::Peer(Ipv4Addr::new(10, 0, 0, 2));

    fn push(backlog: &mut Backlog, sender: Sender, bytes: Vec<u8>) {
        backlog.fill(sender, &mut [Frame::new(bytes)].into());
    }

    #[test]
    fn who_floods_loses_only_their_own() {
        let mut backlog = Backlog::default();
        (0..1000).for_each(|n| push(&mut backlog, FLOOD, vec![1, n as u8]));
        (0..3).for_each(|n| push(&mut backlog, QUIET, vec![2, n]));
        let mut came = Vec::new();
        for _ in 0..5 {
            // What is not taken at first is the next one still.
            let (sender, frame) = backlog.next().unwrap();
            backlog.put_back(sender, frame);
            came.push(backlog.next().unwrap().1.data);
        }
        assert_eq!(came, [[1, 0], [2, 0], [1, 1], [2, 1], [1, 2]]);
        let rest: Vec<_> = std::iter::from_fn(|| backlog.next()).map(|(_, frame)| frame.data).collect();
        assert_eq!((rest.len(), &rest[..2]), (SHARE - 3 + 1, &[vec![2, 2], vec![1, 3]][..]));
        assert!(backlog.is_empty());
        backlog.put_back(QUIET, Frame::new(vec![]));
        assert!(!backlog.is_empty());
    }

    #[test]
    fn senders_are_bounded() {
        let mut backlog = Backlog::default();
        let peers = (0..10_000).map(|n| Sender::Peer(Ipv4Addr::from(n)));
        peers.for_each(|peer| push(&mut backlog, peer, vec![]));
        assert_eq!((backlog.of.len(), backlog.turns.len()), (PEERS, PEERS));
        // The network has its place however many they are.
        for (n, sender) in [Sender::Network, Sender::Outside, Sender::Streams].into_iter().enumerate() {
            push(&mut backlog, sender, vec![]);
            assert_eq!((backlog.of.len(), backlog.turns.len()), (PEERS + 1 + n, PEERS + 1 + n), "{sender:?}");
        }
    }

    #[test]
    fn long_frames_take_a_bounded_part_of_memory_and_nobody_elses() {
        let mut backlog = Backlog::default();
        let long = || (0..SHARE).map(|_| Frame::new(vec![0; 64 << 10])).collect::<VecDeque<_>>();
        for n in 0..PEERS as u32 {
            backlog.fill(Sender::Peer(Ipv4Addr::from(n)), &mut long());
        }
        let bytes: usize = backlog.of.values().map(|waiting| waiting.bytes).sum();
        assert!(bytes < 8 * BYTES, "{bytes}");
        assert_eq!(backlog.of.len(), PEERS, "each has something");
        let mut last = long();
        backlog.fill(Sender::Streams, &mut last);
        assert_eq!(last.len(), SHARE - 1);
        // Who is alone has all, and what has gone makes room again and again.
        while backlog.next().is_some() {}
        let mut alone = long();
        backlog.fill(Sender::Streams, &mut alone);
        for _ in 0..BYTES / (64 << 10) {
            assert!(alone.is_empty());
            alone.extend(backlog.next().map(|(_, frame)| frame));
            backlog.fill(Sender::Streams, &mut alone);
        }
    }

    #[test]
    fn what_a_sender_has_no_share_for_is_left_to_it() {
        let mut backlog = Backlog::default();
        let mut frames: VecDeque<_> = (0..100).map(|n| Frame::new(vec![n])).collect();
        backlog.fill(Sender::Streams, &mut frames);
        assert_eq!((frames.len(), frames[0].data[0]), (100 - SHARE, SHARE as u8));
        while backlog.next().is_some() {}
        backlog.fill(Sender::Streams, &mut VecDeque::new());
        assert!(backlog.is_empty());
    }
}

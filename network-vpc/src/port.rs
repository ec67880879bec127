//! An interface that a machine is plugged into: frames come from it and go to it.
//!
//! What the machine sends is decided upon in the thread that sends it. What is for the [`edge`](crate::edge) waits
//! for a thread of the interface's own, in a bounded queue: who floods fills only their own.

use std::collections::{HashSet, VecDeque};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::thread::{self, ThreadId};
use std::time::Instant;

use ami_core::VpcId;
use instance_core::net::{Frame, NetPort, Offloads};

use crate::backlog::Sender;
use crate::fabric::Fabric;
use crate::firewall::Conntrack;
use crate::fragments::{self, Fragments};
use crate::metadata::{self, Metadata, Secret, Told};
use crate::outlet::{Given, Outlet};
use crate::packet::{ETHERNET_LEN, Flow};
use crate::switch::{self, Giver, Verdict, View};

/// How many frames wait for the edge.
const INBOX: usize = 512;

/// What a port and its edge share.
pub(crate) struct Port {
    view: RwLock<Arc<View>>,
    metadata: RwLock<Option<Arc<Metadata>>>,
    secret: Secret,
    table: Mutex<Conntrack>,
    cable: NetPort,
    fabric: Weak<Fabric>,
    /// What of its packets is not complete.
    fragments: Mutex<Fragments>,
    /// Through which the machine is given frames.
    outlet: Outlet,
    /// The next number of a packet from the edge that has to be cut.
    next_id: AtomicU16,
    /// Frames for the edge.
    inbox: Mutex<VecDeque<Vec<u8>>>,
    edge: mio::Waker,
    edge_thread: OnceLock<ThreadId>,
    /// The edge has woken itself.
    edge_looks: AtomicBool,
    /// The edge has frames of streams that there is no room for.
    pub(crate) stuck: AtomicBool,
    /// Held by whoever takes frames from the cable, so that they stay in order.
    pumping: Mutex<()>,
    began: Instant,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("interface", &self.view().interface).finish_non_exhaustive()
    }
}

impl Port {
    /// A port at the network's end of a cable. `edge` wakes the thread that serves the edge.
    pub(crate) fn new(
        view: View,
        cable: NetPort,
        fabric: &Arc<Fabric>,
        edge: mio::Waker,
        conversations: usize,
    ) -> std::io::Result<Arc<Self>> {
        cable.set_takes(Offloads::ALL);
        Ok(Arc::new(Self {
            view: RwLock::new(Arc::new(view)),
            metadata: RwLock::default(),
            secret: Secret::random()?,
            table: Mutex::new(Conntrack::new(conversations)),
            outlet: Outlet::new(cable.clone()),
            cable,
            fabric: Arc::downgrade(fabric),
            fragments: Mutex::default(),
            next_id: AtomicU16::new(0),
            inbox: Mutex::default(),
            edge,
            edge_thread: OnceLock::new(),
            edge_looks: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            pumping: Mutex::default(),
            began: Instant::now(),
        }))
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_view(&self, view: View) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    /// What the guest may be told.
    pub(crate) fn told(&self) -> Told {
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner).clone();
        Told { view: self.view(), metadata, secret: self.secret.clone(), now: metadata::now() }
    }

    pub(crate) fn set_metadata(&self, metadata: Option<Metadata>) {
        *self.metadata.write().unwrap_or_else(PoisonError::into_inner) = metadata.map(Arc::new);
    }

    /// Whether the machine is still there.
    pub(crate) fn is_plugged(&self) -> bool {
        self.cable.is_connected()
    }

    /// The thread that calls this is the edge's.
    pub(crate) fn is_served_here(&self) {
        let _ = self.edge_thread.set(thread::current().id());
    }

    pub(crate) fn is_edge_thread(&self) -> bool {
        self.edge_thread.get() == Some(&thread::current().id())
    }

    pub(crate) fn wake_edge(&self) {
        // It is awake, and looks before it sleeps.
        if self.is_edge_thread() {
            return self.edge_looks.store(true, Ordering::Relaxed);
        }
        // Fails only where the thread is woken already.
        let _ = self.edge.wake();
    }

    /// Called when the machine has sent frames, has room again, or is gone.
    pub(crate) fn woken(&self) {
        if !self.is_plugged() {
            self.wake_edge();
        }
        self.catch_up();
        // Whoever holds it takes what is there; it looks once more after it let go.
        while self.cable.waiting() > 0 {
            let Ok(_one) = self.pumping.try_lock() else { return };
            let (view, Some(fabric)) = (self.view(), self.fabric.upgrade()) else { return };
            let mut for_edge = false;
            while let Some(frame) = self.cable.recv() {
                for_edge |= self.take(&view, &fabric, frame);
            }
            if for_edge {
                self.wake_edge();
            }
        }
    }

    /// Does with a frame of the machine's what is to be done. Says whether the edge has to be woken for it.
    fn take(&self, view: &View, fabric: &Fabric, frame: Frame) -> bool {
        if !frame.is_sound() || frame.data.len() < ETHERNET_LEN {
            return false;
        }
        let frame = if fragments::is_fragment(&frame.data) {
            let mut fragments = self.fragments.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(whole) = fragments.take(&frame, self.now()) else { return false };
            whole
        } else {
            frame
        };
        let peers = |address| fabric.find(view.vpc, address).map(|port| port.view().mac);
        let verdict = switch::decide(view, &peers, &mut self.table(), frame, self.now());
        match verdict {
            Verdict::Drop => false,
            Verdict::Reply(answer) => {
                self.answer(Frame::new(answer));
                false
            }
            Verdict::Local(to, frame) => {
                if let Some(receiver) = fabric.find(view.vpc, to) {
                    receiver.receive(view, frame);
                }
                false
            }
            Verdict::Edge(frame) => {
                let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
                // Who has put something in before has woken it, and it takes all.
                let is_asleep = inbox.is_empty();
                for frame in frame.finish(Offloads::ALL) {
                    if inbox.len() < INBOX {
                        inbox.push_back(frame.data);
                    }
                }
                is_asleep
            }
        }
    }

    /// Takes a frame from a peer, if the interface's groups let it in.
    fn receive(&self, sender: &View, frame: Frame) {
        let view = self.view();
        if switch::admit(&view, Giver::Peer(sender), &mut self.table(), &frame.data, self.now()) {
            self.give(Sender::Peer(sender.address), fitting(frame, self.cable.peer_takes(), view.mtu));
        }
    }

    /// Gives the machine frames, or has them wait for their turn. What there is no room for is lost, as on any network.
    pub(crate) fn give(&self, sender: Sender, frames: Vec<Frame>) {
        let given = self.outlet.give(sender, &mut frames.into());
        self.tell_edge(given);
    }

    /// Gives the machine frames of streams in their order, or has them wait for their turn. Says whether there was room for all.
    pub(crate) fn give_streams(&self, frames: &mut VecDeque<Frame>) -> bool {
        let given = self.outlet.give(Sender::Streams, frames);
        self.tell_edge(given);
        frames.is_empty()
    }

    /// Gives the machine what has waited for it, as far as it has room.
    pub(crate) fn catch_up(&self) {
        self.tell_edge(self.outlet.catch_up());
    }

    /// What is left is the edge's to give. And there may be room for more of streams, as something was given that waited, of which
    /// nothing else may tell.
    fn tell_edge(&self, given: Given) {
        if given.is_behind || given.some && self.stuck.load(Ordering::Acquire) {
            self.wake_edge();
        }
    }

    /// Whether the interface's groups let a frame from the edge in.
    pub(crate) fn lets_in(&self, frame: &Frame) -> bool {
        switch::admit(&self.view(), Giver::Edge, &mut self.table(), &frame.data, self.now())
    }

    /// What the machine is given of a frame of the network's.
    pub(crate) fn fitted(&self, frame: Frame) -> Vec<Frame> {
        let view = self.view();
        let is_whole =
            frame.segmentation.is_some() || frame.data.len() <= ETHERNET_LEN + usize::from(view.mtu);
        let frame = if is_whole {
            frame
        } else {
            fragments::numbered(frame, self.next_id.fetch_add(1, Ordering::Relaxed))
        };
        fitting(frame, self.cable.peer_takes(), view.mtu)
    }

    /// Gives the machine a datagram from outside, if the interface's groups let it in.
    pub(crate) fn give_from_outside(&self, frame: Frame) {
        if self.lets_in(&frame) {
            self.give(Sender::Outside, self.fitted(frame));
        }
    }

    /// Gives the machine an answer of the network's own.
    pub(crate) fn answer(&self, frame: Frame) {
        self.give(Sender::Network, self.fitted(frame));
    }

    /// Whether a conversation may come in from outside, which the machine will see as `shown`.
    pub(crate) fn admits(&self, real: &Flow, shown: &Flow) -> bool {
        self.table().admit_as(&self.view().policy, real, shown, self.now())
    }

    /// Whether the edge's thread has brought something about itself that it has to look at, and has not been asked since.
    pub(crate) fn has_woken_itself(&self) -> bool {
        self.edge_looks.swap(false, Ordering::Relaxed)
    }

    /// The frames that wait for the edge.
    pub(crate) fn take_inbox(&self) -> VecDeque<Vec<u8>> {
        std::mem::take(&mut *self.inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Forgets conversations with peers that are no more: what has their addresses next is another.
    pub(crate) fn forget(&self, gone: &HashSet<(VpcId, Ipv4Addr)>) {
        let vpc = self.view().vpc;
        self.table().forget(|peer| gone.contains(&(vpc, peer)));
    }

    /// How many conversations are tracked.
    pub(crate) fn conversations(&self) -> usize {
        self.table().len()
    }

    fn table(&self) -> MutexGuard<'_, Conntrack> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds since the port was made.
    fn now(&self) -> u32 {
        u32::try_from(self.began.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

/// The least that a frame's segments carry that is left to its receiver to cut: what the smallest packet that every host
/// takes (RFC 9293, section 3.7.1) leaves beside TCP's longest options. Smaller ones are many times as long as the frame
/// with their headers. They are cut where they come from, and find room in the cable one by one.
const SMALLEST: u16 = 536 - 40;

/// A frame, or what it is cut into, as an end takes it that takes these offloads and packets so long.
fn fitting(frame: Frame, takes: Offloads, mtu: u16) -> Vec<Frame> {
    let longest = ETHERNET_LEN + usize::from(mtu);
    let is_fit = match frame.segmentation {
        Some(cut) => cut.size >= SMALLEST && usize::from(cut.header_len) + usize::from(cut.size) <= longest,
        None => frame.data.len() <= longest,
    };
    // A checksum goes over the whole of a packet.
    let frames = frame.finish(if is_fit { takes } else { Offloads::NONE });
    frames.into_iter().flat_map(|frame| fragments::cut(frame, mtu)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_frame_stays_whole_where_its_segments_are_neither_too_long_nor_tiny() {
        // With the longest options, and in packets that may be cut.
        let mut data = vec![0; 94 + 60_000];
        data[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0xea, 0xb0, 0, 0, 0, 0, 64, 6]);
        data[46] = 0xf0;
        for (size, mtu, is_whole) in [
            (536, 1500, true),
            (535, 1500, false),
            (41, 1500, false),
            (1460, 1500, true),
            (1461, 1500, false),
            (8960, 9000, true),
            (8960, 1500, false),
        ] {
            let frame = Frame::unfinished_tcp4(data.clone(), size);
            let fit = fitting(frame.clone(), Offloads::ALL, mtu);
            assert_eq!(fit == [frame], is_whole, "{size} {mtu}");
            let cut = fit.iter().filter(|frame| frame.segmentation.is_none());
            assert!(cut.clone().all(|frame| frame.data.len() <= ETHERNET_LEN + usize::from(mtu)));
            assert!(is_whole || cut.count() > 60_000 / usize::from(mtu), "{size} {mtu}");
        }
    }
}

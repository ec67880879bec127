//! An interface that a machine is plugged into: frames come from it and go to it.
//!
//! What the machine sends is decided upon in the thread that sends it. What is for the [`edge`](crate::edge) waits
//! for a thread of the interface's own, in a bounded queue: who floods fills only their own.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Instant;

use ami_core::VpcId;
use instance_core::net::{Frame, NetPort, Offloads, SendError};

use crate::backlog::Backlog;
use crate::firewall::Conntrack;
use crate::metadata::{Metadata, Secret, Told};
use crate::offload;
use crate::packet::{ETHERNET_LEN, Flow};
use crate::switch::{self, Verdict, View};

/// How many packets wait for the edge.
const INBOX: usize = 512;

/// All ports of a network, by where they are.
#[derive(Debug, Default)]
pub(crate) struct Fabric {
    ports: RwLock<HashMap<(VpcId, Ipv4Addr), Arc<Port>>>,
}

impl Fabric {
    pub(crate) fn find(&self, vpc: VpcId, address: Ipv4Addr) -> Option<Arc<Port>> {
        self.ports.read().unwrap_or_else(PoisonError::into_inner).get(&(vpc, address)).cloned()
    }

    pub(crate) fn add(&self, port: &Arc<Port>) {
        let view = port.view();
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.insert((view.vpc, view.address), port.clone());
    }

    /// Takes a port out, unless another has its place by now.
    pub(crate) fn remove(&self, port: &Arc<Port>) {
        let view = port.view();
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        if ports.get(&(view.vpc, view.address)).is_some_and(|there| Arc::ptr_eq(there, port)) {
            ports.remove(&(view.vpc, view.address));
        }
    }
}

/// What a port and its edge share.
pub(crate) struct Port {
    view: RwLock<Arc<View>>,
    metadata: RwLock<Option<Arc<Metadata>>>,
    secret: Secret,
    table: Mutex<Conntrack>,
    cable: NetPort,
    fabric: Weak<Fabric>,
    /// Frames of peers that the machine has no room for yet.
    backlog: Mutex<Backlog>,
    /// The machine has made room, and nobody has looked at the backlog since.
    has_room: AtomicBool,
    /// Packets for the edge, from the IP header on.
    inbox: Mutex<VecDeque<Vec<u8>>>,
    edge: mio::Waker,
    /// The edge has frames that the machine had no room for.
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
            cable,
            fabric: Arc::downgrade(fabric),
            backlog: Mutex::default(),
            has_room: AtomicBool::new(false),
            inbox: Mutex::default(),
            edge,
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
        Told { view: self.view(), metadata, secret: self.secret.clone() }
    }

    pub(crate) fn set_metadata(&self, metadata: Option<Metadata>) {
        *self.metadata.write().unwrap_or_else(PoisonError::into_inner) = metadata.map(Arc::new);
    }

    /// Whether the machine is still there.
    pub(crate) fn is_plugged(&self) -> bool {
        self.cable.is_connected()
    }

    pub(crate) fn wake_edge(&self) {
        // Fails only where the thread is woken already.
        let _ = self.edge.wake();
    }

    /// Called when the machine has sent frames, has room again, or is gone.
    pub(crate) fn woken(&self) {
        if self.stuck.load(Ordering::Acquire) || !self.is_plugged() {
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

    /// Does with a frame of the machine's what is to be done. Says whether it is for the edge.
    fn take(&self, view: &View, fabric: &Fabric, frame: Frame) -> bool {
        if !frame.is_sound() || frame.data.len() < ETHERNET_LEN {
            return false;
        }
        let peers = |address| fabric.find(view.vpc, address).map(|port| port.view().mac);
        let verdict = switch::decide(view, &peers, &mut self.table(), frame, self.now());
        match verdict {
            Verdict::Drop => false,
            Verdict::Reply(answer) => {
                self.send(Frame::new(answer));
                false
            }
            Verdict::Local(to, frame) => {
                if let Some(receiver) = fabric.find(view.vpc, to) {
                    receiver.receive(view.address, frame);
                }
                false
            }
            Verdict::Edge(frame) => {
                let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
                for mut frame in offload::finish(frame, Offloads::ALL) {
                    if inbox.len() < INBOX {
                        frame.data.drain(..ETHERNET_LEN);
                        inbox.push_back(frame.data);
                    }
                }
                true
            }
        }
    }

    /// Takes a frame from a peer, if the interface's groups let it in.
    fn receive(&self, sender: Ipv4Addr, frame: Frame) {
        if !switch::admit(&self.view(), &mut self.table(), &frame.data, self.now()) {
            return;
        }
        for frame in offload::finish(frame, self.cable.peer_takes()) {
            let mut backlog = self.backlog();
            let refused = if backlog.is_empty() { self.offer(frame) } else { Err(frame) };
            if let Err(frame) = refused {
                backlog.push(sender, frame);
            }
        }
        if self.has_room.load(Ordering::Acquire) {
            self.catch_up();
        }
    }

    /// Gives the machine what has waited for it, as far as it has room.
    fn catch_up(&self) {
        self.has_room.store(true, Ordering::Release);
        while self.has_room.load(Ordering::Acquire) {
            // Whoever holds it looks again when done: that may be who called this, in whose hands a frame was
            // taken at once.
            let Ok(mut backlog) = self.backlog.try_lock() else { return };
            self.has_room.store(false, Ordering::Release);
            backlog.drain(|frame| self.offer(frame));
        }
    }

    /// Gives the machine a frame, which comes back if it has no room.
    fn offer(&self, frame: Frame) -> Result<(), Frame> {
        match self.cable.send(frame) {
            Err(SendError::Full(frame)) => Err(frame),
            Ok(()) | Err(SendError::Disconnected) => Ok(()),
        }
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame from the edge. Given back while the machine has no room for it.
    pub(crate) fn send_from_edge(&self, frame: Frame, through_groups: bool) -> Result<(), Frame> {
        if through_groups && !switch::admit(&self.view(), &mut self.table(), &frame.data, self.now()) {
            return Ok(());
        }
        self.offer(frame)
    }

    /// Whether a conversation may come in from outside, which the machine will see as `shown`.
    pub(crate) fn admits(&self, real: &Flow, shown: &Flow) -> bool {
        self.table().admit_as(&self.view().policy, real, shown, self.now())
    }

    /// The packets that wait for the edge.
    pub(crate) fn take_inbox(&self) -> VecDeque<Vec<u8>> {
        std::mem::take(&mut *self.inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many conversations are tracked.
    pub(crate) fn conversations(&self) -> usize {
        self.table().len()
    }

    /// Sends a frame; what finds no room is lost, as on any network.
    fn send(&self, frame: Frame) {
        for frame in offload::finish(frame, self.cable.peer_takes()) {
            let _ = self.cable.send(frame);
        }
    }

    fn table(&self) -> MutexGuard<'_, Conntrack> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds since the port was made.
    fn now(&self) -> u32 {
        u32::try_from(self.began.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

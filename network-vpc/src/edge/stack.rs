//! The stack that speaks TCP with the guest, for whatever address it speaks to.

use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Cidr};

use super::wire::{Key, Wire};
use crate::switch::View;

/// The room of a conversation each way. Its memory is taken as it is used.
///
/// What is on its way to the guest is here until the guest has acknowledged it: with no more than is written to a machine's socket
/// at a time, guest and network wait for each other in turn. Of many conversations at once each has less, so that a guest
/// that reads nothing takes a bounded part of the host's memory.
const TO_GUEST: usize = 1 << 20;
const TO_GUEST_OF_MANY: usize = 256 << 10;
const MANY: usize = 64;
const FROM_GUEST: usize = 256 << 10;

/// How often a guest that does not answer is asked whether it is there; and a guest that has no room for what waits for
/// it, whether it still has none, as what it said of that may have been lost.
const KEEP_ALIVE: StackDuration = StackDuration::from_secs(60);
const PROBE: StackDuration = StackDuration::from_secs(1);

/// A stack without a device: frames go in and come out.
pub(super) struct Stack {
    interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    wire: Wire,
    began: Instant,
}

impl Stack {
    pub(super) fn new(view: &View) -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        let mut seed = [0; 8];
        // Without randomness the sequence numbers begin where they can be told.
        let _ = getrandom::fill(&mut seed);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(config, &mut wire, StackInstant::ZERO);
        let router = view.router();
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::Ipv4(Ipv4Cidr::new(router, view.subnet.prefix_len()));
            // There is room for two.
            let _ = addresses.push(own);
        });
        // It takes packets to every address that it has a way to by itself.
        interface.set_any_ip(true);
        let _ = interface.routes_mut().add_default_ipv4_route(router);
        Self { interface, sockets: SocketSet::new(Vec::new()), wire, began: Instant::now() }
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Has it be so much later than it is.
    #[cfg(test)]
    pub(super) fn let_pass(&mut self, time: Duration) {
        self.began = self.began.checked_sub(time).unwrap_or(self.began);
    }

    /// A frame of the guest's, for when there is work to do.
    pub(super) fn take(&mut self, frame: Vec<u8>) {
        self.wire.take(frame);
    }

    /// The same of one by which the guest begins or accepts a conversation that is there.
    pub(super) fn take_syn(&mut self, key: Key, frame: Vec<u8>) {
        self.wire.take_syn(key, frame);
    }

    /// Has the stack take in what the guest has sent. What it has to say to that comes with its [work](Self::work).
    pub(super) fn hear(&mut self) {
        let now = self.now();
        while !matches!(
            self.interface.poll_ingress_single(now, &mut self.wire, &mut self.sockets),
            PollIngressSingleResult::None
        ) {}
    }

    /// Has the stack do what there is to do.
    pub(super) fn work(&mut self) {
        let now = self.now();
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        // Each conversation says one thing at a time.
        while !self.wire.is_full()
            && self.interface.poll_egress(now, &mut self.wire, &mut self.sockets) != PollResult::None
        {
        }
    }

    /// When there is something to do although nothing comes.
    pub(super) fn patience(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(|delay| Duration::from_micros(delay.total_micros()))
    }

    /// Whether it may have more to say than it had room for.
    pub(super) fn is_full(&self) -> bool {
        self.wire.is_full()
    }

    /// The next packet to the guest, behind room for its Ethernet header. The checksum of TCP is still to be computed.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.wire.next()
    }

    /// The longest segments that the guest takes in a conversation, if it has said so.
    pub(super) fn segment_size(&self, key: &Key) -> Option<u16> {
        self.wire.segment_size(key)
    }

    fn socket(&self) -> tcp::Socket<'static> {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let to_guest = if self.sockets.iter().count() < MANY { TO_GUEST } else { TO_GUEST_OF_MANY };
        let mut socket = tcp::Socket::new(buffer(FROM_GUEST), buffer(to_guest));
        socket.set_nagle_enabled(false);
        // Where an acknowledgement waits and the end of a window goes back as it is rounded, smoltcp panics.
        socket.set_ack_delay(None);
        socket.set_timeout(Some(StackDuration::from_secs(120)));
        socket.set_keep_alive(Some(KEEP_ALIVE));
        socket
    }

    /// A socket for the conversation that the guest is about to begin.
    pub(super) fn expect(&mut self, key: Key) -> Option<SocketHandle> {
        let mut socket = self.socket();
        socket.listen(key.1).ok()?;
        Some(self.sockets.add(socket))
    }

    /// A socket for a conversation that begins outside.
    pub(super) fn connect(&mut self, key: Key) -> Option<SocketHandle> {
        let mut socket = self.socket();
        socket.connect(self.interface.context(), key.0, key.1).ok()?;
        Some(self.sockets.add(socket))
    }

    pub(super) fn get(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Whether a conversation is over, and only waits for what may still come of the guest.
    pub(super) fn waits(&self, handle: SocketHandle) -> bool {
        self.sockets.get::<tcp::Socket<'_>>(handle).state() == tcp::State::TimeWait
    }

    /// Whether a conversation waits for its beginning: the guest has not begun it, or has taken that back.
    pub(super) fn listens(&self, handle: SocketHandle) -> bool {
        self.sockets.get::<tcp::Socket<'_>>(handle).is_listening()
    }

    /// Has a guest that has no room for what waits for it asked for it again soon.
    pub(super) fn ask_for_room(&mut self, handle: SocketHandle) {
        let socket = self.get(handle);
        let interval = if socket.send_queue() > 0 { PROBE } else { KEEP_ALIVE };
        if socket.keep_alive() != Some(interval) {
            socket.set_keep_alive(Some(interval));
        }
    }

    pub(super) fn remove(&mut self, key: &Key, handle: SocketHandle) {
        self.wire.forget(key);
        self.sockets.remove(handle);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing::Segment;
    use super::*;
    use smoltcp::wire::TcpSeqNumber;
    use std::net::Ipv4Addr;

    #[test]
    fn a_guest_that_takes_nothing_is_not_answered_without_end() {
        let view = crate::fuzzing::view().unwrap();
        let mut stack = Stack::new(&view);
        let key = ((view.address, 4000), (Ipv4Addr::new(10, 0, 0, 9), 80));
        let (begin, acknowledged) = (TcpSeqNumber(1), Some(TcpSeqNumber(2)));
        let segment =
            Segment { key, begin, acknowledged, window: 1000, flags: 0, options: &[], payload: vec![] };
        let mut answers = |segments| {
            for _ in 0..segments {
                stack.take(segment.frame());
                stack.hear();
            }
            std::iter::from_fn(|| stack.next()).count()
        };
        assert_eq!(answers(3), 3, "each is told that there is no such conversation");
        assert!((3..200).contains(&answers(10_000)));
        assert_eq!(answers(3), 3, "there is room again");
    }

    #[test]
    fn conversations_have_less_room_where_they_are_many() {
        let view = crate::fuzzing::view().unwrap();
        let mut stack = Stack::new(&view);
        let mut rooms = (0..2 * MANY as u16).map(|port| {
            let handle =
                stack.connect(((view.address, 22), (Ipv4Addr::new(10, 0, 0, 9), 1024 + port))).unwrap();
            stack.get(handle).send_capacity()
        });
        assert!(rooms.by_ref().take(MANY).all(|room| room == TO_GUEST));
        assert!(rooms.all(|room| room == TO_GUEST_OF_MANY));
    }
}

//! The stack that speaks TCP with the guest, for whatever address it speaks to.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Cidr};

use crate::packet::ETHERNET_LEN;
use crate::switch::View;

/// The room of a conversation each way. Its memory is taken as it is used.
const TO_GUEST: usize = 256 << 10;
const FROM_GUEST: usize = 256 << 10;

/// Packets that are made while the machine takes none.
const OUTBOX: usize = 128;

/// A stack without a device: frames go in and come out.
pub(super) struct Stack {
    interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    wire: Wire,
    began: Instant,
}

struct Wire {
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
    mtu: usize,
}

impl Stack {
    pub(super) fn new(view: &View) -> Self {
        let mut wire = Wire { inbox: VecDeque::new(), outbox: VecDeque::new(), mtu: view.mtu.into() };
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

    /// A frame of the guest's, for when there is work to do.
    pub(super) fn take(&mut self, frame: Vec<u8>) {
        self.wire.inbox.push_back(frame);
    }

    /// Has the stack do what there is to do.
    pub(super) fn work(&mut self) {
        let now = self.now();
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// When there is something to do although nothing comes.
    pub(super) fn patience(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(|delay| Duration::from_micros(delay.total_micros()))
    }

    /// Whether it may have more to say than it had room for.
    pub(super) fn is_full(&self) -> bool {
        self.wire.outbox.len() >= OUTBOX
    }

    /// Whether there are frames that the guest has had no room for.
    pub(super) fn has_waiting(&self) -> bool {
        !self.wire.outbox.is_empty()
    }

    /// The next frame to the guest, whose Ethernet header is still to be written.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.wire.outbox.pop_front()
    }

    /// A frame that the guest had no room for.
    pub(super) fn put_back(&mut self, frame: Vec<u8>) {
        self.wire.outbox.push_front(frame);
    }

    fn socket() -> tcp::Socket<'static> {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(FROM_GUEST), buffer(TO_GUEST));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(smoltcp::time::Duration::from_secs(120)));
        socket.set_keep_alive(Some(smoltcp::time::Duration::from_secs(60)));
        socket
    }

    /// A socket for the conversation that the guest is about to begin with an address.
    pub(super) fn expect(&mut self, at: (Ipv4Addr, u16), hops: Option<u8>) -> Option<SocketHandle> {
        let mut socket = Self::socket();
        socket.set_hop_limit(hops);
        socket.listen(at).ok()?;
        Some(self.sockets.add(socket))
    }

    /// A socket for a conversation that begins outside.
    pub(super) fn connect(&mut self, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Option<SocketHandle> {
        let mut socket = Self::socket();
        socket.connect(self.interface.context(), to, from).ok()?;
        Some(self.sockets.add(socket))
    }

    pub(super) fn get(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn remove(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Outbox<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Outbox<'_>)> {
        let packet = self.inbox.pop_front()?;
        Some((Received(packet), Outbox(&mut self.outbox)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Outbox<'_>> {
        (self.outbox.len() < OUTBOX).then_some(Outbox(&mut self.outbox))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // What the guest sends came through memory, and may have a checksum that is still to be computed.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.get(ETHERNET_LEN..).unwrap_or_default())
    }
}

struct Outbox<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outbox<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; ETHERNET_LEN + len];
        let result = f(&mut frame[ETHERNET_LEN..]);
        self.0.push_back(frame);
        result
    }
}

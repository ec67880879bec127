//! A guest without a machine: a TCP/IP stack at the machine's end of a cable.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod packets;
pub(crate) mod region;
pub(crate) mod setup;

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use instance_core::machine::NetSpec;
use instance_core::net::{Frame, MacAddress, NetPort, Offloads};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

/// Where a packet's time to live is in a frame.
const TIME_TO_LIVE: usize = 14 + 8;
/// The longest packet of a guest's.
const MTU: usize = 1500;
/// What a guest has room for each way in a conversation. Where windows are scaled, smoltcp 0.12 to 0.14 ends its thread if
/// what comes fills one whose end it has rounded.
pub(crate) const ROOM: usize = 65_535;
/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long is waited for an answer that may never come.
pub(crate) const SILENCE: Duration = Duration::from_secs(1);

/// A guest. It answers only while a method of it runs.
pub(crate) struct Guest {
    pub(crate) port: NetPort,
    pub(crate) mac: MacAddress,
    interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    cable: Cable,
    /// What it takes at a time, as a machine does that is slow.
    pub(crate) bite: usize,
    /// Frames that were longer than its packets may be.
    pub(crate) long_frames: usize,
    /// How many hops it is away: packets that are not for so many do not come.
    pub(crate) hops: u8,
    woken: Receiver<()>,
    began: Instant,
    /// What DHCP gave.
    pub(crate) address: Ipv4Addr,
    pub(crate) router: Ipv4Addr,
    pub(crate) resolvers: Vec<Ipv4Addr>,
    /// The options that DHCP told, by their numbers.
    pub(crate) told: BTreeMap<u8, Vec<u8>>,
    /// The port before the one that it speaks from next.
    pub(crate) next_port: u16,
}

struct Cable {
    port: NetPort,
    inbox: VecDeque<Vec<u8>>,
    takes: Offloads,
    /// What it sends is lost.
    cut: bool,
}

impl Guest {
    /// A guest at a port, which has asked for its address.
    pub(crate) fn boot(spec: NetSpec) -> Self {
        let mut guest = Self::plugged(spec);
        guest.ask_for_address();
        guest
    }

    /// The same without an address.
    pub(crate) fn plugged(spec: NetSpec) -> Self {
        Self::taking(Offloads::NONE, spec)
    }

    /// The same of a guest that takes frames that are not complete.
    pub(crate) fn taking(takes: Offloads, spec: NetSpec) -> Self {
        let (wake, woken) = channel();
        spec.port.set_takes(takes);
        let mut cable = Cable { port: spec.port.clone(), inbox: VecDeque::new(), takes, cut: false };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(spec.mac.0)));
        let interface = Interface::new(config, &mut cable, StackInstant::ZERO);
        spec.port.set_waker(Some(std::sync::Arc::new(move || _ = wake.send(()))));
        Self {
            port: spec.port,
            mac: spec.mac,
            interface,
            sockets: SocketSet::new(Vec::new()),
            cable,
            bite: usize::MAX,
            long_frames: 0,
            hops: 1,
            woken,
            began: Instant::now(),
            address: Ipv4Addr::UNSPECIFIED,
            router: Ipv4Addr::UNSPECIFIED,
            resolvers: Vec::new(),
            told: BTreeMap::new(),
            next_port: 40_000,
        }
    }

    /// Has what it sends be lost, or no longer.
    pub(crate) fn cut_off(&mut self, cut: bool) {
        self.cable.cut = cut;
    }

    pub(crate) fn ask_for_address(&mut self) {
        let mut socket = dhcpv4::Socket::new();
        socket.set_receive_packet_buffer(Box::leak(vec![0; MTU].into_boxed_slice()));
        let handle = self.sockets.add(socket);
        let given = self.until(|guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                let packet = config.packet.expect("there is room for it");
                let told = packet.options().map(|option| (option.kind, option.data.to_vec())).collect();
                Some((config.address, config.router, config.dns_servers.to_vec(), told))
            }
            _ => None,
        });
        let (address, router, resolvers, told) = given.expect("DHCP gives an address");
        self.sockets.remove(handle);
        self.set_address(address, router.expect("DHCP names a router"));
        (self.resolvers, self.told) = (resolvers, told);
    }

    pub(crate) fn set_address(&mut self, address: Ipv4Cidr, router: Ipv4Addr) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(IpCidr::Ipv4(address)).unwrap();
        });
        self.interface.routes_mut().add_default_ipv4_route(router).unwrap();
        (self.address, self.router) = (address.address(), router);
    }

    /// Does what there is to do.
    pub(crate) fn work(&mut self) {
        let now = StackInstant::from_micros(self.began.elapsed().as_micros() as i64);
        for _ in 0..self.bite {
            let Some(frame) = self.port.recv() else { break };
            assert!(frame.is_taken_by(self.cable.takes), "too much is left to be done to {frame:?}");
            self.long_frames += usize::from(frame.data.len() > MTU + 14);
            let is_ip = frame.data[12..14] == [8, 0];
            if !is_ip || frame.data[TIME_TO_LIVE] >= self.hops {
                self.cable.inbox.push_back(frame.data);
            }
        }
        self.interface.poll(now, &mut self.cable, &mut self.sockets);
    }

    /// Works until `done` gives something; none if that takes too long.
    pub(crate) fn until<T>(&mut self, done: impl FnMut(&mut Self) -> Option<T>) -> Option<T> {
        self.within(PATIENCE, done)
    }

    /// Works for at most so long until `done` gives something.
    pub(crate) fn within<T>(
        &mut self,
        time: Duration,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<T> {
        let deadline = Instant::now() + time;
        loop {
            self.work();
            if let Some(done) = done(self) {
                self.work();
                return Some(done);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if self.port.waiting() == 0 {
                // The stack has timers of its own, too.
                let _ = self.woken.recv_timeout(left.min(Duration::from_millis(20)));
            }
        }
    }

    fn socket() -> tcp::Socket<'static> {
        let buffer = || tcp::SocketBuffer::new(vec![0; ROOM]);
        tcp::Socket::new(buffer(), buffer())
    }

    pub(crate) fn listen(&mut self, port: u16) -> SocketHandle {
        let mut socket = Self::socket();
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    /// Begins a connection, and does not wait for it.
    pub(crate) fn begin_connecting(&mut self, to: Ipv4Addr, port: u16) -> SocketHandle {
        let mut socket = Self::socket();
        self.next_port += 1;
        socket.connect(self.interface.context(), (to, port), self.next_port).unwrap();
        let handle = self.sockets.add(socket);
        self.work();
        handle
    }

    /// A connection; none if it is refused or nobody answers for a while.
    pub(crate) fn connect(&mut self, patience: Duration, to: Ipv4Addr, port: u16) -> Option<SocketHandle> {
        let handle = self.begin_connecting(to, port);
        let state = self.within(patience, |guest| {
            let state = guest.tcp(handle).state();
            (state != tcp::State::SynSent).then_some(state)
        });
        (state == Some(tcp::State::Established)).then_some(handle)
    }

    pub(crate) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(crate) fn say(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut rest = bytes;
        self.until(|guest| {
            let sent = guest.tcp(handle).send_slice(rest).unwrap();
            rest = &rest[sent..];
            rest.is_empty().then_some(())
        })
        .expect("what is said is taken");
    }

    /// What comes, until it is so long or ends.
    pub(crate) fn hear(&mut self, handle: SocketHandle, len: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        self.until(|guest| {
            let socket = guest.tcp(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), heard.extend(&*bytes))).unwrap();
            }
            (heard.len() >= len || !socket.may_recv()).then_some(())
        })
        .expect("something comes");
        heard
    }

    /// A question by UDP, and its answer.
    pub(crate) fn ask(&mut self, to: Ipv4Addr, port: u16, question: &[u8]) -> Option<Vec<u8>> {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket.bind(self.next_port).unwrap();
        socket.send_slice(question, (to, port)).unwrap();
        let handle = self.sockets.add(socket);
        let answer = self.until(|guest| {
            let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.recv().ok().map(|(bytes, _)| bytes.to_vec())
        });
        self.sockets.remove(handle);
        answer
    }

    /// Sends a datagram, and waits for nothing.
    pub(crate) fn tell(&mut self, to: Ipv4Addr, port: u16, text: &[u8]) {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(9999).unwrap();
        socket.send_slice(text, (to, port)).unwrap();
        let handle = self.sockets.add(socket);
        self.work();
        self.sockets.remove(handle);
    }

    /// A request of HTTP/1.1 over a connection of its own: status and body.
    pub(crate) fn http(&mut self, to: Ipv4Addr, request: &str) -> (u16, String) {
        let connection = self.connect(PATIENCE, to, 80).expect("the server is there");
        self.say(connection, format!("{request}Connection: close\r\n\r\n").as_bytes());
        let answer = String::from_utf8(self.hear(connection, usize::MAX)).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

/// Has guests work until `done` gives something.
pub(crate) fn together<T>(
    patience: Duration,
    guests: &mut [&mut Guest],
    mut done: impl FnMut(&mut [&mut Guest]) -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        guests.iter_mut().for_each(|guest| guest.work());
        if let Some(done) = done(guests) {
            guests.iter_mut().for_each(|guest| guest.work());
            return Some(done);
        }
        let _ = guests[0].woken.recv_timeout(Duration::from_millis(1));
    }
    None
}

impl Device for Cable {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sender<'_>)> {
        let frame = self.inbox.pop_front()?;
        Some((Received(frame), Sender(&self.port, self.cut)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sender<'_>> {
        Some(Sender(&self.port, self.cut))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU + 14;
        if self.takes.checksum {
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}

pub(crate) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Sender<'a>(&'a NetPort, bool);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        if !self.1 {
            let _ = self.0.send(Frame::new(bytes));
        }
        result
    }
}

/// That one guest reaches a port of another's.
pub(crate) fn assert_reaches(from: &mut Guest, to: &mut Guest, port: u16) {
    assert!(reaches(from, to, port, PATIENCE), "{} does not reach {}", from.address, to.address);
}

/// Whether a guest reaches a port of another's before it loses patience.
pub(crate) fn reaches(from: &mut Guest, to: &mut Guest, port: u16, patience: Duration) -> bool {
    let listener = to.listen(port);
    let address = to.address;
    let connection = from.begin_connecting(address, port);
    let connected = together(patience, &mut [from, to], |guests| {
        let state = guests[0].tcp(connection).state();
        (state != tcp::State::SynSent).then_some(state)
    });
    from.sockets.remove(connection);
    to.sockets.remove(listener);
    connected == Some(tcp::State::Established)
}

//! Conversations over TCP: of the guest with hosts outside, of clients outside with the guest, and with the
//! metadata service.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use instance_core::net::Frame;
use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::EthernetProtocol;

use super::budget::{Permit, Share};
use super::names::Names;
use super::pipe::Pipe;
use super::stack::Stack;
use super::wire::Key;
use super::{Entrance, Reach, Tokens, shown_as};
use crate::answer::write_ethernet;
use crate::metadata::Session;
use crate::packet::{ETHERNET_LEN, Flow, TcpFlags, Transport};
use crate::port::Port;
use crate::switch::{METADATA, ROUTER_MAC, View};

/// The most conversations of an interface. More are refused, but where one of those that are over makes room.
const MOST: usize = 1024;

/// The most of them that wait for what may still come of a guest (TIME-WAIT, RFC 9293, section 3.3.2). For more the oldest goes:
/// a guest whose last word is lost then hears that nobody is there.
const MOST_WAITING: usize = 128;

/// The shortest segments that conversations are cut into, however short a guest says that it takes them: options of TCP
/// go off them.
const SHORTEST: u16 = 88;

/// How long a host outside may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);

/// The conversations of an interface.
pub(super) struct Streams {
    stack: Stack,
    reach: Reach,
    share: Share,
    tokens: Tokens,
    conversations: HashMap<Key, Conversation>,
    /// Frames that the machine has had no room for.
    outbox: VecDeque<Frame>,
    /// Whose the host's connections are.
    owners: HashMap<Token, Key>,
    listeners: Vec<Listener>,
}

struct Listener {
    socket: TcpListener,
    entrance: Entrance,
}

enum Conversation {
    /// The host outside has not answered; with the frame by which the guest began.
    Connecting { host: TcpStream, permit: Permit, token: Token, frame: Vec<u8>, until: Instant },
    /// Both sides are there.
    Open { socket: SocketHandle, other: Other, token: Option<Token> },
    /// Nothing comes any more from either side, and the other side is let go; since when. What the guest has not
    /// acknowledged it is still told.
    Over { socket: SocketHandle, since: Instant },
    /// What the guest is told of its end.
    Ending { socket: SocketHandle, token: Option<Token> },
}

/// The other side of a conversation.
enum Other {
    Host(Pipe),
    Metadata(Session),
    Names(Names),
}

impl Streams {
    pub(super) fn new(view: &View, reach: Reach, share: Share) -> Self {
        Self {
            stack: Stack::new(view),
            reach,
            share,
            tokens: Tokens(1),
            conversations: HashMap::new(),
            outbox: VecDeque::new(),
            owners: HashMap::new(),
            listeners: Vec::new(),
        }
    }

    /// Offers a port of the instance's to the world.
    pub(super) fn listen(
        &mut self,
        registry: &Registry,
        socket: std::net::TcpListener,
        entrance: Entrance,
    ) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let mut socket = TcpListener::from_std(socket);
        registry.register(&mut socket, self.tokens.next(), Interest::READABLE)?;
        self.listeners.push(Listener { socket, entrance });
        Ok(())
    }

    pub(super) fn unlisten(&mut self, at: SocketAddr) {
        self.listeners.retain(|listener| listener.entrance.at != at);
    }

    /// A frame of the guest's.
    pub(super) fn take(&mut self, registry: &Registry, view: &View, flow: &Flow, frame: Vec<u8>) {
        let Transport::Tcp { source, destination, flags } = flow.transport else { return };
        let key = ((flow.source, source), (flow.destination, destination));
        if flags.syn && !flags.ack && self.is_free(&key) && self.has_room() {
            self.forget_waiting(key);
            let is_service = flow.destination == METADATA || view.is_resolver(flow.destination);
            // The stack refuses what there is no socket for.
            let refused = if is_service { self.serve(key, frame) } else { self.begin(registry, key, frame) };
            refused.into_iter().for_each(|frame| self.stack.take(frame));
            return;
        }
        match self.conversations.get(&key) {
            Some(Conversation::Open { .. }) if flags.syn => self.stack.take_syn(key, frame),
            Some(Conversation::Connecting { .. }) => {}
            _ => self.stack.take(frame),
        }
    }

    /// Those that only wait for what may still come of the guest, the oldest first.
    fn waiting(&self) -> Vec<(Instant, Key)> {
        let since = |(key, there): (&Key, &Conversation)| match there {
            Conversation::Over { socket, since } if self.stack.waits(*socket) => Some((*since, *key)),
            _ => None,
        };
        let mut waiting: Vec<_> = self.conversations.iter().filter_map(since).collect();
        waiting.sort_unstable();
        waiting
    }

    /// Whether there is room for another conversation: the oldest that only waits makes some.
    fn has_room(&mut self) -> bool {
        if self.conversations.len() >= MOST {
            self.waiting().first().into_iter().for_each(|(_, key)| self.forget_waiting(*key));
        }
        self.conversations.len() < MOST
    }

    /// Whether the key is free: one that only waits has its place no longer when its client or its guest begins anew.
    fn is_free(&self, key: &Key) -> bool {
        match self.conversations.get(key) {
            Some(Conversation::Over { socket, .. }) => self.stack.waits(*socket),
            there => there.is_none(),
        }
    }

    /// Forgets a conversation that only waits, if there is one.
    fn forget_waiting(&mut self, key: Key) {
        if let Some(Conversation::Over { socket, .. }) = self.conversations.remove(&key) {
            self.stack.remove(&key, socket);
        }
    }

    /// Begins a conversation with a service of the network's. Gives the frame back if there is no room.
    fn serve(&mut self, key: Key, frame: Vec<u8>) -> Option<Vec<u8>> {
        let (_, (at, _)) = key;
        let Some(socket) = self.stack.expect(key) else { return Some(frame) };
        let other = match at {
            METADATA => Other::Metadata(Session::default()),
            _ => Other::Names(Names::new(self.reach.resolver)),
        };
        self.conversations.insert(key, Conversation::Open { socket, other, token: None });
        self.stack.take_syn(key, frame);
        // Before another waits at the same place.
        self.stack.work();
        None
    }

    /// Begins a conversation with a host outside. Gives the frame back if that cannot be.
    fn begin(&mut self, registry: &Registry, key: Key, frame: Vec<u8>) -> Option<Vec<u8>> {
        let (_, (address, port)) = key;
        if !self.reach.allows(address) {
            return Some(frame);
        }
        let Some(permit) = self.share.take() else { return Some(frame) };
        let Ok(mut host) = TcpStream::connect(SocketAddr::new(address.into(), port)) else {
            return Some(frame);
        };
        let token = self.tokens.next();
        if registry.register(&mut host, token, Interest::READABLE | Interest::WRITABLE).is_err() {
            return Some(frame);
        }
        let until = Instant::now() + CONNECT_WITHIN;
        self.owners.insert(token, key);
        self.conversations.insert(key, Conversation::Connecting { host, permit, token, frame, until });
        None
    }

    /// Something has happened to a socket of the host's.
    pub(super) fn notice(&mut self, event: &Event) {
        let owner = self.owners.get(&event.token()).and_then(|key| self.conversations.get_mut(key));
        if let Some(Conversation::Open { other: Other::Host(pipe), .. }) = owner {
            pipe.notice(event);
        }
    }

    /// Moves what can be moved.
    pub(super) fn work(&mut self, registry: &Registry, port: &Port) {
        self.accept(registry, port);
        // The guest is answered below, when the other sides have made room.
        self.stack.hear();
        let keys: Vec<Key> = self.conversations.keys().copied().collect();
        for key in keys {
            let Some(conversation) = self.conversations.remove(&key) else { continue };
            let token = conversation.token();
            match self.advance(registry, key, conversation, port) {
                Some(goes_on) => {
                    let let_go = token.filter(|_| goes_on.token().is_none());
                    let_go.and_then(|token| self.owners.remove(&token));
                    self.conversations.insert(key, goes_on);
                }
                None => drop(token.and_then(|token| self.owners.remove(&token))),
            }
        }
        let waiting = self.waiting();
        let too_many = waiting.len().saturating_sub(MOST_WAITING);
        waiting[..too_many].iter().for_each(|(_, key)| self.forget_waiting(*key));
        loop {
            self.stack.work();
            let is_full = self.stack.is_full();
            if !self.send(port) || !is_full {
                break;
            }
        }
    }

    /// How long nothing has to be done if nothing comes. While the machine has no room there is nothing to do until it
    /// says that it has.
    pub(super) fn patience(&mut self) -> Option<Duration> {
        if !self.outbox.is_empty() { None } else { self.stack.patience() }
    }

    /// None of a conversation that is over.
    fn advance(
        &mut self,
        registry: &Registry,
        key: Key,
        conversation: Conversation,
        port: &Port,
    ) -> Option<Conversation> {
        match conversation {
            Conversation::Connecting { host, permit, token, frame, until } => match is_connected(&host) {
                Ok(true) => {
                    let _ = host.set_nodelay(true);
                    let Some(socket) = self.stack.expect(key) else {
                        self.stack.take(frame);
                        return None;
                    };
                    self.stack.take_syn(key, frame);
                    self.stack.work();
                    let other = Other::Host(Pipe::new(host, permit));
                    Some(Conversation::Open { socket, other, token: Some(token) })
                }
                Ok(false) if Instant::now() < until => {
                    Some(Conversation::Connecting { host, permit, token, frame, until })
                }
                Ok(false) | Err(_) => {
                    self.stack.take(frame);
                    self.stack.work();
                    None
                }
            },
            Conversation::Open { socket, mut other, token } => {
                let stack = self.stack.get(socket);
                let goes_on = stack.state() != tcp::State::Closed
                    && match &mut other {
                        Other::Host(pipe) => pipe.pump(stack).is_ok(),
                        Other::Metadata(session) => serve(session, stack, port),
                        Other::Names(names) => {
                            names.pump(stack, &port.view(), (registry, &mut self.tokens, &self.share)).is_ok()
                        }
                    };
                if !goes_on {
                    stack.abort();
                    return Some(Conversation::Ending { socket, token });
                }
                self.stack.ask_for_room(socket);
                let is_over = match &other {
                    Other::Host(pipe) => pipe.is_over(),
                    Other::Metadata(_) | Other::Names(_) => self.stack.waits(socket),
                };
                Some(match is_over {
                    true => Conversation::Over { socket, since: Instant::now() },
                    false => Conversation::Open { socket, other, token },
                })
            }
            Conversation::Over { socket, since } => {
                if self.stack.get(socket).state() == tcp::State::Closed {
                    self.stack.remove(&key, socket);
                    return None;
                }
                self.stack.ask_for_room(socket);
                Some(Conversation::Over { socket, since })
            }
            Conversation::Ending { socket, .. } => {
                self.stack.remove(&key, socket);
                None
            }
        }
    }

    /// Takes clients in whom the instance's groups let in.
    fn accept(&mut self, registry: &Registry, port: &Port) {
        let view = port.view();
        for n in 0..self.listeners.len() {
            let Entrance { port: inside, to, .. } = self.listeners[n].entrance;
            let own = to.unwrap_or(view.address);
            while let Ok((mut host, client)) = self.listeners[n].socket.accept() {
                let IpAddr::V4(real) = client.ip() else { continue };
                let shown = shown_as(&view, real);
                let flow = |source| {
                    let flags = TcpFlags { syn: true, ..TcpFlags::default() };
                    let transport = Transport::Tcp { source: client.port(), destination: inside, flags };
                    Flow { source, destination: own, transport }
                };
                let key = ((own, inside), (shown, client.port()));
                // Dropped, the connection is reset or closed: nobody is told why.
                if !self.is_free(&key) || !self.has_room() || !port.admits(&flow(real), &flow(shown)) {
                    continue;
                }
                self.forget_waiting(key);
                let Some(permit) = self.share.take() else { continue };
                let _ = host.set_nodelay(true);
                let (token, interest) = (self.tokens.next(), Interest::READABLE | Interest::WRITABLE);
                if registry.register(&mut host, token, interest).is_err() {
                    continue;
                }
                if let Some(socket) = self.stack.connect(key) {
                    let other = Other::Host(Pipe::new(host, permit));
                    self.owners.insert(token, key);
                    self.conversations.insert(key, Conversation::Open { socket, other, token: Some(token) });
                }
            }
        }
    }

    /// Gives the machine the stack's packets, as far as it has room. Says whether it had room for all.
    fn send(&mut self, port: &Port) -> bool {
        let view = port.view();
        port.stuck.store(false, Ordering::Release);
        loop {
            if self.outbox.is_empty() {
                while let Some(packet) = self.stack.next() {
                    self.outbox.extend(fitted(packet, &self.stack, port, &view));
                }
            }
            if self.outbox.is_empty() {
                return true;
            }
            if !port.offer_all(&mut self.outbox) {
                // There may be room again by now, of which nobody tells any more.
                port.stuck.store(true, Ordering::Release);
                if !port.offer_all(&mut self.outbox) {
                    return false;
                }
            }
        }
    }
}

/// What the machine is given of a packet of the stack's.
fn fitted(mut packet: Vec<u8>, stack: &Stack, port: &Port, view: &View) -> Vec<Frame> {
    write_ethernet(ROUTER_MAC, view.mac, EthernetProtocol::Ipv4, &mut packet);
    let Some(flow) = Flow::parse(&packet[ETHERNET_LEN..]) else { return Vec::new() };
    let frame = match flow.transport {
        Transport::Tcp { source, destination, .. } => {
            let longest = view.mtu - 40;
            let size = stack.segment_size(&((flow.destination, destination), (flow.source, source)));
            Frame::unfinished_tcp4(packet, size.map_or(longest, |size| size.clamp(SHORTEST, longest)))
        }
        _ => Frame::new(packet),
    };
    let from_service = flow.source == METADATA || view.is_resolver(flow.source);
    port.fitted(frame, !from_service)
}

impl Conversation {
    /// What tells its connection of the host's from others.
    fn token(&self) -> Option<Token> {
        match self {
            Self::Connecting { token, .. } => Some(*token),
            Self::Open { token, .. } | Self::Ending { token, .. } => *token,
            Self::Over { .. } => None,
        }
    }
}

/// Whether a connection that was begun is there.
fn is_connected(host: &TcpStream) -> io::Result<bool> {
    if let Some(error) = host.take_error()? {
        return Err(error);
    }
    match host.peer_addr() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}

/// Answers the guest's questions. False when the conversation is over.
fn serve(session: &mut Session, guest: &mut tcp::Socket<'_>, port: &Port) -> bool {
    loop {
        let mut heard = 0;
        let hear = |bytes: &mut [u8]| {
            heard = session.hear(bytes, || port.told());
            (heard, ())
        };
        // What was heard before may be answered now that there is room for it.
        if guest.can_recv() && guest.recv(hear).is_err() {
            return false;
        }
        if heard == 0 {
            session.hear(&[], || port.told());
        }
        guest.set_hop_limit(session.hops());
        let mut said = 0;
        while guest.can_send() && !session.answer().is_empty() {
            match guest.send_slice(session.answer()) {
                Ok(sent) => session.said(sent),
                Err(_) => return false,
            }
            said += 1;
        }
        if heard == 0 && said == 0 {
            break;
        }
    }
    let has_ended = !guest.may_recv() && guest.state() != tcp::State::SynReceived;
    if session.answer().is_empty() && (session.is_over() || has_ended) {
        guest.close();
    }
    true
}

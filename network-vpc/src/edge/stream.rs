//! Conversations over TCP: of the guest with hosts outside, of clients outside with the guest, and with the
//! metadata service.

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use instance_core::net::Frame;
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::EthernetProtocol;

use self::clients::Listener;
use super::budget::Opener;
use super::conversation::{Conversation, Conversations, Kind, Other, lets_in};
use super::datagram::Datagrams;
use super::names::Names;
use super::pipe::{Pipe, is_connected};
use super::questions::serve;
use super::stack::Stack;
use super::wire::Key;
use super::{Reach, Tokens};
use crate::answer::write_ethernet;
use crate::metadata::Session;
use crate::packet::{ETHERNET_LEN, Flow, Transport};
use crate::port::Port;
use crate::switch::{METADATA, ROUTER_MAC, View};

mod clients;
#[cfg(test)]
mod tests;

/// The most conversations that wait for what may still come of a guest (TIME-WAIT, RFC 9293, section 3.3.2). For more the oldest goes:
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
    tokens: Tokens,
    conversations: Conversations,
    /// Frames that the machine has had no room for.
    outbox: VecDeque<Frame>,
    /// Whose the host's connections are.
    owners: HashMap<Token, Key>,
    listeners: Vec<Listener>,
    /// The guest may have taken back what it had begun.
    was_reset: bool,
}

impl Streams {
    pub(super) fn new(view: &View, reach: Reach) -> Self {
        Self {
            stack: Stack::new(view),
            reach,
            tokens: Tokens(1),
            conversations: Conversations::default(),
            outbox: VecDeque::new(),
            owners: HashMap::new(),
            listeners: Vec::new(),
            was_reset: false,
        }
    }

    /// A frame of the guest's.
    pub(super) fn take(
        &mut self,
        registry: &Registry,
        sockets: &mut Datagrams,
        view: &View,
        flow: &Flow,
        frame: Vec<u8>,
    ) {
        let Transport::Tcp { source, destination, flags } = flow.transport else { return };
        let key = ((flow.source, source), (flow.destination, destination));
        let is_service = flow.destination == METADATA || view.is_resolver(flow.destination);
        let kind = if is_service { Kind::Service } else { Kind::Host };
        self.was_reset |= flags.rst;
        if flags.syn && !flags.ack && self.was_reset {
            self.hear();
        }
        if flags.syn && !flags.ack && self.is_free(&key) && self.has_room(kind) {
            self.forget_waiting(key);
            // The stack refuses what there is no socket for.
            if is_service {
                self.serve(key, frame);
            } else if let Some(refused) = self.begin(registry, sockets, key, frame) {
                self.stack.take(refused);
            }
            return;
        }
        match self.conversations.get(&key) {
            Some(Conversation::Open { .. }) if flags.syn => self.stack.take_syn(key, frame),
            Some(Conversation::Connecting { .. }) => {}
            _ => self.stack.take(frame),
        }
    }

    /// Those that only wait for what may still come of the guest, the oldest first.
    fn waiting(&self) -> Vec<(Instant, Key, Kind)> {
        let since = |(key, kind, there): (&Key, Kind, &Conversation)| match there {
            Conversation::Over { socket, since } if self.stack.waits(*socket) => Some((*since, *key, kind)),
            _ => None,
        };
        let mut waiting: Vec<_> = self.conversations.iter().filter_map(since).collect();
        waiting.sort_unstable_by_key(|(since, key, _)| (*since, *key));
        waiting
    }

    /// Whether there is room for another conversation: one that only waits may make some.
    fn has_room(&mut self, kind: Kind) -> bool {
        if !self.conversations.has_room(kind) {
            let goes = self.conversations.who_goes(kind, &self.waiting());
            goes.into_iter().for_each(|key| self.forget_waiting(key));
        }
        self.conversations.has_room(kind)
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
        if let Some((_, Conversation::Over { socket, .. })) = self.conversations.remove(&key) {
            self.stack.remove(&key, socket);
        }
    }

    /// Has the stack take in what the guest has sent, and ends the conversations that it has taken back before they were there:
    /// their sockets listen again (RFC 9293, section 3.10.7.4), and would have whatever it begins next at the same place.
    fn hear(&mut self) {
        self.was_reset = false;
        self.stack.hear();
        let listens = |(key, _, there): (&Key, Kind, &Conversation)| match there {
            Conversation::Open { socket, .. } if self.stack.listens(*socket) => Some(*key),
            _ => None,
        };
        let taken_back: Vec<_> = self.conversations.iter().filter_map(listens).collect();
        for key in taken_back {
            if let Some((_, Conversation::Open { socket, token, .. })) = self.conversations.remove(&key) {
                token.and_then(|token| self.owners.remove(&token));
                self.stack.remove(&key, socket);
            }
        }
    }

    /// The socket of a conversation that the guest begins by `frame`. None if there can be none, or the stack takes that for no
    /// beginning: its socket would have the next one at the same place.
    fn expect(&mut self, key: Key, frame: Vec<u8>) -> Option<SocketHandle> {
        let Some(socket) = self.stack.expect(key) else {
            self.stack.take(frame);
            return None;
        };
        self.stack.take_syn(key, frame);
        // Before another waits at the same place.
        self.stack.work();
        if self.stack.listens(socket) {
            self.stack.remove(&key, socket);
            return None;
        }
        Some(socket)
    }

    /// Begins a conversation with a service of the network's.
    fn serve(&mut self, key: Key, frame: Vec<u8>) {
        let (_, (at, _)) = key;
        let Some(socket) = self.expect(key, frame) else { return };
        let other = match at {
            METADATA => Other::Metadata(Session::default()),
            _ => Other::Names(Names::new(self.reach.resolver)),
        };
        let open = Conversation::Open { socket, other, token: None, client: None };
        self.conversations.insert(key, Kind::Service, open);
    }

    /// Begins a conversation with a host outside. Gives the frame back if that cannot be.
    fn begin(
        &mut self,
        registry: &Registry,
        sockets: &mut Datagrams,
        key: Key,
        frame: Vec<u8>,
    ) -> Option<Vec<u8>> {
        let (_, (address, port)) = key;
        if !self.reach.allows(address) {
            return Some(frame);
        }
        let Some(permit) = sockets.permit(Opener::Guest) else { return Some(frame) };
        let Ok(mut host) = TcpStream::connect(SocketAddr::new(address.into(), port)) else {
            return Some(frame);
        };
        let token = self.tokens.next();
        if registry.register(&mut host, token, Interest::READABLE | Interest::WRITABLE).is_err() {
            return Some(frame);
        }
        let until = Instant::now() + CONNECT_WITHIN;
        self.owners.insert(token, key);
        let connecting = Conversation::Connecting { host, permit, token, frame, until };
        self.conversations.insert(key, Kind::Host, connecting);
        None
    }

    /// Something has happened to a socket of the host's.
    pub(super) fn notice(&mut self, event: &Event) {
        let owner = self.owners.get(&event.token()).and_then(|key| self.conversations.get_mut(key));
        if let Some(Conversation::Open { other: Other::Host(pipe), .. }) = owner {
            pipe.notice(event);
        }
    }

    /// Moves what can be moved. Says whether there may be more clients than it has looked at.
    pub(super) fn work(&mut self, registry: &Registry, sockets: &mut Datagrams, port: &Port) -> bool {
        let more = self.accept(registry, sockets, port);
        // The guest is answered below, when the other sides have made room.
        self.hear();
        for key in self.conversations.keys() {
            let Some((kind, conversation)) = self.conversations.remove(&key) else { continue };
            let token = conversation.token();
            match self.advance(registry, sockets, key, conversation, port) {
                Some(goes_on) => {
                    let let_go = token.filter(|_| goes_on.token().is_none());
                    let_go.and_then(|token| self.owners.remove(&token));
                    self.conversations.insert(key, kind, goes_on);
                }
                None => drop(token.and_then(|token| self.owners.remove(&token))),
            }
        }
        let waiting = self.waiting();
        let too_many = waiting.len().saturating_sub(MOST_WAITING);
        waiting[..too_many].iter().for_each(|(_, key, _)| self.forget_waiting(*key));
        loop {
            self.stack.work();
            let is_full = self.stack.is_full();
            if !self.send(port) || !is_full {
                return more;
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
        sockets: &mut Datagrams,
        key: Key,
        conversation: Conversation,
        port: &Port,
    ) -> Option<Conversation> {
        match conversation {
            Conversation::Connecting { host, permit, token, frame, until } => match is_connected(&host) {
                Ok(true) => {
                    let other = Other::Host(Pipe::new(host, permit));
                    let socket = self.expect(key, frame)?;
                    Some(Conversation::Open { socket, other, token: Some(token), client: None })
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
            Conversation::Open { socket, mut other, token, client } => {
                let stack = self.stack.get(socket);
                let goes_on = match &mut other {
                    Other::Host(pipe) => pipe.pump(stack).is_ok(),
                    _ if stack.state() == tcp::State::Closed => false,
                    Other::Metadata(session) => serve(session, stack, port),
                    Other::Names(names) => {
                        names.pump(stack, &port.view(), (registry, &mut self.tokens, sockets)).is_ok()
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
                if is_over {
                    let over = Conversation::Over { socket, since: Instant::now() };
                    return self.advance(registry, sockets, key, over, port);
                }
                Some(Conversation::Open { socket, other, token, client })
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

    /// Gives the machine the stack's packets, as far as it has room. Says whether it had room for all.
    fn send(&mut self, port: &Port) -> bool {
        let view = port.view();
        port.stuck.store(false, Ordering::Release);
        loop {
            if self.outbox.is_empty() {
                while let Some(packet) = self.stack.next() {
                    let frames = self.fitted(packet, port, &view);
                    self.outbox.extend(frames);
                }
            }
            if self.outbox.is_empty() {
                return true;
            }
            if !port.give_streams(&mut self.outbox) {
                // There may be room again by now, of which nobody tells any more.
                port.stuck.store(true, Ordering::Release);
                if !port.give_streams(&mut self.outbox) {
                    return false;
                }
            }
        }
    }

    /// What the machine is given of a packet of the stack's: nothing, where the interface's groups do not let it in.
    fn fitted(&self, mut packet: Vec<u8>, port: &Port, view: &View) -> Vec<Frame> {
        write_ethernet(ROUTER_MAC, view.mac, EthernetProtocol::Ipv4, &mut packet);
        let Some(flow) = Flow::parse(&packet[ETHERNET_LEN..]) else { return Vec::new() };
        let Transport::Tcp { source, destination, .. } = flow.transport else { return Vec::new() };
        let key = ((flow.destination, destination), (flow.source, source));
        let longest = view.mtu - 40;
        let size = self.stack.segment_size(&key).map_or(longest, |size| size.clamp(SHORTEST, longest));
        let frame = Frame::unfinished_tcp4(packet, size);
        let from_service = flow.source == METADATA || view.is_resolver(flow.source);
        // Who came in a while ago may have been forgotten since, as the guest does not answer yet, and nobody is let in as whom
        // it sees.
        let is_let_in = from_service
            || port.lets_in(&frame)
            || self.client(&key).is_some_and(|real| lets_in(port, real, &key)) && port.lets_in(&frame);
        if is_let_in { port.fitted(frame) } else { Vec::new() }
    }

    /// The address of the client who began a conversation.
    fn client(&self, key: &Key) -> Option<Ipv4Addr> {
        match self.conversations.get(key)? {
            Conversation::Open { client, .. } => *client,
            _ => None,
        }
    }
}

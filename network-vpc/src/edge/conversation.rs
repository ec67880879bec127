//! The conversations over TCP of an interface, and how many of which kind there may be.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Instant;

use mio::Token;
use mio::net::TcpStream;
use smoltcp::iface::SocketHandle;

use super::budget::Permit;
use super::names::Names;
use super::pipe::Pipe;
use super::wire::Key;
use crate::metadata::Session;
use crate::packet::{Flow, TcpFlags, Transport};
use crate::port::Port;

/// The most conversations of an interface with the world outside. More are refused, but where one of those that are over makes
/// room.
const MOST: usize = 1024;

/// The most of them that clients began: what they leave is the guest's own.
const MOST_OF_CLIENTS: usize = MOST / 4 * 3;

/// The most with the network's own services.
const MOST_WITH_SERVICES: usize = 256;

/// Who a conversation is with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A service of the network's.
    Service,
    /// One outside, with whom the guest began it.
    Host,
    /// One outside who began it.
    Client,
}

pub(super) enum Conversation {
    /// The host outside has not answered; with the frame by which the guest began.
    Connecting { host: TcpStream, permit: Permit, token: Token, frame: Vec<u8>, until: Instant },
    /// Both sides are there, or the other side is and the guest is asked. With the address of the client who began it.
    Open { socket: SocketHandle, other: Other, token: Option<Token>, client: Option<Ipv4Addr> },
    /// Nothing comes any more from either side, and the other side is let go; since when. What the guest has not
    /// acknowledged it is still told.
    Over { socket: SocketHandle, since: Instant },
    /// What the guest is told of its end.
    Ending { socket: SocketHandle, token: Option<Token> },
}

/// The other side of a conversation.
pub(super) enum Other {
    Host(Pipe),
    Metadata(Session),
    Names(Names),
}

impl Conversation {
    /// What tells its connection of the host's from others.
    pub(super) fn token(&self) -> Option<Token> {
        match self {
            Self::Connecting { token, .. } => Some(*token),
            Self::Open { token, .. } | Self::Ending { token, .. } => *token,
            Self::Over { .. } => None,
        }
    }
}

/// The conversations, counted by their kinds.
#[derive(Default)]
pub(super) struct Conversations {
    of: HashMap<Key, (Kind, Conversation)>,
    counts: [usize; 3],
}

impl Conversations {
    pub(super) fn get(&self, key: &Key) -> Option<&Conversation> {
        self.of.get(key).map(|(_, there)| there)
    }

    pub(super) fn get_mut(&mut self, key: &Key) -> Option<&mut Conversation> {
        self.of.get_mut(key).map(|(_, there)| there)
    }

    pub(super) fn keys(&self) -> Vec<Key> {
        self.of.keys().copied().collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, Kind, &Conversation)> {
        self.of.iter().map(|(key, (kind, there))| (key, *kind, there))
    }

    pub(super) fn insert(&mut self, key: Key, kind: Kind, conversation: Conversation) {
        self.counts[kind as usize] += 1;
        if let Some((before, _)) = self.of.insert(key, (kind, conversation)) {
            self.counts[before as usize] -= 1;
        }
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<(Kind, Conversation)> {
        let (kind, conversation) = self.of.remove(key)?;
        self.counts[kind as usize] -= 1;
        Some((kind, conversation))
    }

    /// Whether there is room for another of a kind.
    pub(super) fn has_room(&self, kind: Kind) -> bool {
        is_room(self.counts, kind)
    }

    /// Which of those that only wait, the oldest first, makes room for another of a kind where there is none: one of the same
    /// kind, or else one that it shares its room with. None goes to no use.
    pub(super) fn who_goes(&self, kind: Kind, waiting: &[(Instant, Key, Kind)]) -> Option<Key> {
        if self.has_room(kind) {
            return None;
        }
        let is_of_use = |gone: Kind| {
            let mut counts = self.counts;
            counts[gone as usize] = counts[gone as usize].saturating_sub(1);
            is_room(counts, kind)
        };
        let of_use = || waiting.iter().filter(|(.., gone)| is_of_use(*gone));
        let goes = of_use().find(|(.., gone)| *gone == kind).or_else(|| of_use().next());
        goes.map(|(_, key, _)| *key)
    }
}

fn is_room([services, hosts, clients]: [usize; 3], kind: Kind) -> bool {
    match kind {
        Kind::Service => services < MOST_WITH_SERVICES,
        Kind::Host => hosts + clients < MOST,
        Kind::Client => hosts + clients < MOST && clients < MOST_OF_CLIENTS,
    }
}

/// Whether the interface's groups let a client begin a conversation, whom the guest sees as the conversation's key says.
pub(super) fn lets_in(port: &Port, real: Ipv4Addr, key: &Key) -> bool {
    let ((own, destination), (shown, source)) = *key;
    let flow = |client| {
        let flags = TcpFlags { syn: true, ..TcpFlags::default() };
        let transport = Transport::Tcp { source, destination, flags };
        Flow { source: client, destination: own, transport }
    };
    port.admits(&flow(real), &flow(shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: Kind, n: usize) -> Key {
        let port = |n| (Ipv4Addr::new(10, 0, 0, 4), n);
        (port(kind as u16), port(n as u16))
    }

    fn over() -> Conversation {
        Conversation::Over { socket: SocketHandle::default(), since: Instant::now() }
    }

    fn fill(all: &mut Conversations, kind: Kind) -> usize {
        let mut count = 0;
        while all.has_room(kind) {
            all.insert(key(kind, count), kind, over());
            count += 1;
        }
        count
    }

    /// Who has as many as it may have makes none of another kind go: that would be to no use.
    #[test]
    fn who_only_waits_goes_where_that_makes_room() {
        let mut all = Conversations::default();
        let waits = |kind, n| (Instant::now(), key(kind, n), kind);
        let every =
            [waits(Kind::Service, 0), waits(Kind::Host, 0), waits(Kind::Client, 0), waits(Kind::Client, 1)];
        let [service, host, client, _] = every.map(|(_, key, _)| Some(key));
        assert_eq!(all.who_goes(Kind::Client, &every), None, "there is room");
        fill(&mut all, Kind::Client);
        assert_eq!(all.who_goes(Kind::Client, &every), client);
        assert_eq!(all.who_goes(Kind::Client, &every[..2]), None, "clients are as many as they may be");
        assert_eq!(all.who_goes(Kind::Host, &every), None);
        fill(&mut all, Kind::Host);
        assert_eq!(all.who_goes(Kind::Client, &every[..2]), None);
        assert_eq!(all.who_goes(Kind::Host, &every), host);
        assert_eq!(all.who_goes(Kind::Host, &every[2..]), client);
        fill(&mut all, Kind::Service);
        assert_eq!(all.who_goes(Kind::Service, &every), service);
        assert_eq!(all.who_goes(Kind::Service, &every[1..]), None);
        // Where the guest has more than it is left, it makes room for clients.
        let gone = [0, 1, 2].map(|n| all.remove(&key(Kind::Client, n)));
        assert!(gone.iter().all(Option::is_some));
        (1000..1003).for_each(|n| all.insert(key(Kind::Host, n), Kind::Host, over()));
        assert_eq!(all.who_goes(Kind::Client, &every[..2]), host);
        assert_eq!(all.who_goes(Kind::Client, &every), client);
    }

    #[test]
    fn clients_leave_room_for_the_guest_and_nobody_takes_that_of_services() {
        let mut all = Conversations::default();
        assert_eq!(fill(&mut all, Kind::Client), MOST_OF_CLIENTS);
        assert_eq!(fill(&mut all, Kind::Host), MOST - MOST_OF_CLIENTS);
        assert_eq!(fill(&mut all, Kind::Service), MOST_WITH_SERVICES);
        // Whoever goes makes room, and who has another's place takes none.
        let [client, host] = [key(Kind::Client, 0), key(Kind::Host, 0)];
        assert!(all.remove(&client).is_some() && all.remove(&client).is_none());
        for n in 0..2 {
            assert!(all.has_room(Kind::Client) && all.has_room(Kind::Host), "{n}");
            assert!(!all.has_room(Kind::Service), "{n}");
            all.insert(host, Kind::Host, over());
        }
        all.insert(client, Kind::Client, over());
        assert!(!all.has_room(Kind::Client) && !all.has_room(Kind::Host));
    }
}

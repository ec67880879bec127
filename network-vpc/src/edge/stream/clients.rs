//! Clients outside who begin conversations with the guest.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mio::net::TcpListener;
use mio::{Interest, Registry};

use super::super::budget::Opener;
use super::super::conversation::{Conversation, Kind, Other, lets_in};
use super::super::datagram::{Datagrams, TURN};
use super::super::pipe::Pipe;
use super::super::{Entrance, shown_as};
use super::Streams;
use crate::port::Port;

pub(super) struct Listener {
    pub(super) socket: TcpListener,
    entrance: Entrance,
}

impl Streams {
    /// Offers a port of the instance's to the world.
    pub(in super::super) fn listen(
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

    pub(in super::super) fn unlisten(&mut self, at: SocketAddr) {
        self.listeners.retain(|listener| listener.entrance.at != at);
    }

    /// Takes clients in whom the instance's groups let in: no more in a turn than that others have theirs, however fast they come.
    /// Says whether there may be more.
    pub(super) fn accept(&mut self, registry: &Registry, sockets: &mut Datagrams, port: &Port) -> bool {
        let mut more = false;
        let view = port.view();
        for n in 0..self.listeners.len() {
            let entrance = self.listeners[n].entrance;
            let own = entrance.to.unwrap_or(view.address);
            for turn in 1..=TURN {
                let Ok((mut host, client)) = self.listeners[n].socket.accept() else { break };
                more |= turn == TURN;
                let IpAddr::V4(real) = client.ip() else { continue };
                let shown = shown_as(&view, real, &entrance);
                let key = ((own, entrance.port), (shown, client.port()));
                // Dropped, the connection is reset or closed: nobody is told why.
                // Nor does anything go for those whom the rules keep out.
                if !self.is_free(&key) || !lets_in(port, real, &key) || !self.has_room(Kind::Client) {
                    continue;
                }
                self.forget_waiting(key);
                let Some(permit) = sockets.permit(Opener::Client) else { continue };
                let (token, interest) = (self.tokens.next(), Interest::READABLE | Interest::WRITABLE);
                if registry.register(&mut host, token, interest).is_err() {
                    continue;
                }
                if let Some(socket) = self.stack.connect(key) {
                    let other = Other::Host(Pipe::new(host, permit));
                    self.owners.insert(token, key);
                    let (token, client) = (Some(token), Some(real));
                    let open = Conversation::Open { socket, other, token, client };
                    self.conversations.insert(key, Kind::Client, open);
                }
            }
        }
        more
    }
}

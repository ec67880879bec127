use std::net::{Ipv4Addr, TcpListener, TcpStream as Client};
use std::time::Instant;

use smoltcp::iface::SocketHandle;
use socket2::{Domain, Socket, Type};

use super::super::budget::{Budget, Opener};
use super::super::stack::Stack;
use super::super::wire::Key;
use super::*;

const KEY: Key = ((Ipv4Addr::new(10, 0, 0, 12), 4000), (Ipv4Addr::new(198, 51, 100, 7), 80));
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the stack takes of a guest at once, and the host's kernel does not.
const MUCH: usize = 200_000;

/// A guest that has a conversation, what it goes through, and who it is with.
struct Conversation {
    guest: Stack,
    at_guest: SocketHandle,
    edge: Stack,
    at_edge: SocketHandle,
    pipe: Pipe,
    client: Client,
}

impl Conversation {
    fn new() -> Self {
        let view = crate::fuzzing::view().unwrap();
        let (mut guest, mut edge) = (Stack::new(&view), Stack::new(&view));
        let at_edge = edge.expect(KEY).unwrap();
        let at_guest = guest.connect((KEY.1, KEY.0)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        let host = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        host.set_send_buffer_size(4096).unwrap();
        host.connect(&listener.local_addr().unwrap().into()).unwrap();
        host.set_nonblocking(true).unwrap();
        let client = listener.accept().unwrap().0;
        client.set_nonblocking(true).unwrap();
        let permit = Budget::new(2).share().take(Opener::Guest).unwrap();
        let pipe = Pipe::new(TcpStream::from_std(host.into()), permit);
        let mut there = Self { guest, at_guest, edge, at_edge, pipe, client };
        there.exchange();
        assert_eq!(there.state(), tcp::State::Established);
        there
    }

    /// Each hears all that the other has to say.
    fn exchange(&mut self) {
        let mut moves = true;
        while std::mem::take(&mut moves) {
            self.guest.work();
            moves |= self.reaches_edge();
            self.edge.work();
            while let Some(frame) = self.edge.next() {
                self.guest.take(frame);
                moves = true;
            }
        }
    }

    /// Gives the edge what the guest has said. Says whether that was something.
    fn reaches_edge(&mut self) -> bool {
        let frames: Vec<_> = std::iter::from_fn(|| self.guest.next()).collect();
        let some = !frames.is_empty();
        frames.into_iter().for_each(|frame| self.edge.take(frame));
        some
    }

    /// The guest breaks it off.
    fn is_broken_off(&mut self) {
        self.guest.get(self.at_guest).abort();
        self.guest.work();
        assert!(self.reaches_edge());
        self.edge.hear();
        assert_eq!(self.state(), tcp::State::Closed);
    }

    fn state(&mut self) -> tcp::State {
        self.edge.get(self.at_edge).state()
    }

    /// The guest says much, and that it says no more.
    fn guest_says_all(&mut self) -> Vec<u8> {
        let text: Vec<_> = (0..MUCH).map(|n| (n / 3 + n / 251) as u8).collect();
        let socket = self.guest.get(self.at_guest);
        assert_eq!(socket.send_slice(&text), Ok(MUCH));
        socket.close();
        self.exchange();
        text
    }

    /// As if the host's socket had said that it may have something, and room.
    fn pump(&mut self) -> io::Result<()> {
        (self.pipe.readable, self.pipe.writable) = (true, true);
        self.pipe.pump(self.edge.get(self.at_edge))
    }

    /// The client says that it says no more.
    fn client_ends(&mut self) {
        self.client.shutdown(Shutdown::Write).unwrap();
        let begun = Instant::now();
        while !self.pipe.host_done {
            assert!(begun.elapsed() < PATIENCE);
            self.pump().unwrap();
        }
    }

    /// What the client hears until it is told that nothing more comes. The pipe goes as soon as it is over.
    fn client_hears(self) -> Vec<u8> {
        let Self { mut edge, at_edge, pipe, mut client, .. } = self;
        let (mut heard, mut bytes, begun) = (Vec::new(), [0; 4096], Instant::now());
        let mut pipe = Some(pipe);
        while begun.elapsed() < PATIENCE {
            pipe.take_if(|pipe| pipe.is_over());
            match client.read(&mut bytes) {
                Ok(0) => {
                    assert!(pipe.is_none(), "it is not over");
                    return heard;
                }
                Ok(len) => heard.extend(&bytes[..len]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let Some(pipe) = &mut pipe else { continue };
                    pipe.writable = true;
                    pipe.pump(edge.get(at_edge)).unwrap();
                }
                Err(e) => panic!("{e} behind {} bytes", heard.len()),
            }
        }
        panic!("{} bytes came, and no end", heard.len());
    }
}

#[test]
fn what_a_guest_has_said_comes_although_it_is_over_for_the_guest() {
    for guest_ends_first in [true, false] {
        let mut there = Conversation::new();
        if !guest_ends_first {
            there.client_ends();
            there.exchange();
            assert_eq!(there.state(), tcp::State::FinWait2);
        }
        let said = there.guest_says_all();
        there.pump().unwrap();
        if guest_ends_first {
            there.client_ends();
        } else {
            assert_eq!(there.state(), tcp::State::TimeWait);
            there.edge.let_pass(Duration::from_secs(11));
        }
        there.exchange();
        assert_eq!(there.state(), tcp::State::Closed, "the stack has forgotten it");
        assert!(!there.pipe.is_over(), "there is something left");
        assert!(there.client_hears() == said);
    }
}

/// As if its program had been killed, or its kernel had forgotten a connection that nobody has there any more.
#[test]
fn what_a_guest_has_said_to_its_end_comes_although_it_breaks_off_then() {
    for client_speaks in [false, true] {
        let mut there = Conversation::new();
        let said = there.guest_says_all();
        there.pump().unwrap();
        if client_speaks {
            // Which the guest does not hear.
            there.client.write_all(b"hello").unwrap();
            there.client_ends();
            assert_eq!(there.state(), tcp::State::LastAck);
        }
        there.is_broken_off();
        assert!(there.client_hears() == said);
    }
}

#[test]
fn who_takes_nothing_is_not_waited_for_for_ever_when_the_guest_is_gone() {
    let mut there = Conversation::new();
    there.guest_says_all();
    there.pump().unwrap();
    there.is_broken_off();
    there.pump().unwrap();
    let long_ago = || Instant::now().checked_sub(TAKES_WITHIN);
    there.pipe.waits = long_ago();
    assert!(there.pump().is_err());
    // Until it has taken so much that there is room again.
    let begun = Instant::now();
    let goes_on = |there: &mut Conversation| {
        let _ = there.client.read(&mut [0; 4096]);
        there.pipe.waits = long_ago();
        there.pump().is_ok()
    };
    while !goes_on(&mut there) {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(there.pipe.waits.is_none_or(|since| since >= begun), "it waits anew");
}

#[test]
fn what_a_guest_breaks_off_is_broken_off() {
    let mut there = Conversation::new();
    there.guest.get(there.at_guest).send_slice(b"hello").unwrap();
    there.exchange();
    there.pump().unwrap();
    there.is_broken_off();
    assert!(there.pump().is_err() && !there.pipe.is_over());
}

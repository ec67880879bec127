//! The resolver over TCP (RFC 7766), where messages have their lengths before them.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;

use mio::net::TcpStream;
use mio::{Interest, Registry};
use smoltcp::socket::tcp;

use super::Tokens;
use super::budget::{Opener, Permit};
use super::datagram::Datagrams;
use super::pipe::settle;
use crate::dns;
use crate::switch::View;

/// The bytes that say how long a message is, and how long one is at most.
const PREFIX: usize = 2;
const LONGEST: usize = PREFIX + u16::MAX as usize;

/// What a guest asks over a connection, and what it is answered.
#[derive(Debug)]
pub(super) struct Names {
    resolver: Option<SocketAddr>,
    /// The resolver, once there is something to ask it.
    upstream: Option<(TcpStream, Permit)>,
    /// Of the guest's, what is no whole message yet; then what the resolver has not taken.
    heard: Vec<u8>,
    questions: Vec<u8>,
    /// Of the resolver's, what is no whole message yet; then what the guest has not taken.
    learned: Vec<u8>,
    answers: Vec<u8>,
}

impl Names {
    pub(super) fn new(resolver: Option<SocketAddr>) -> Self {
        let (heard, questions, learned, answers) = Default::default();
        Self { resolver, upstream: None, heard, questions, learned, answers }
    }

    /// Moves what can be moved. An error is the end of the connection.
    pub(super) fn pump(
        &mut self,
        guest: &mut tcp::Socket<'_>,
        view: &View,
        (registry, tokens, sockets): (&Registry, &mut Tokens, &mut Datagrams),
    ) -> io::Result<()> {
        // Who takes no answers is not listened to.
        while guest.can_recv() && self.answers.len() < LONGEST && self.questions.len() < LONGEST {
            let hear = |bytes: &mut [u8]| (self.hear(view, bytes), ());
            guest.recv(hear).map_err(|_| ErrorKind::ConnectionReset)?;
        }
        self.ask(registry, tokens, sockets)?;
        while guest.can_send() && !self.answers.is_empty() {
            let sent = guest.send_slice(&self.answers).map_err(|_| ErrorKind::ConnectionReset)?;
            self.answers.drain(..sent);
        }
        // A guest that has nothing more to ask may still wait for answers; the resolver ends then by itself.
        let has_ended = !guest.may_recv() && guest.state() != tcp::State::SynReceived;
        if has_ended && self.answers.is_empty() && self.upstream.is_none() {
            guest.close();
        }
        Ok(())
    }

    /// Takes in what the guest says, as far as there is room for it: what the VPC knows itself is answered, the rest waits
    /// for the resolver. Says how much was taken.
    fn hear(&mut self, view: &View, bytes: &[u8]) -> usize {
        // A message that fills the room is whole, so that there always is some.
        let taken = bytes.len().min(LONGEST - self.heard.len());
        self.heard.extend(&bytes[..taken]);
        let (answers, questions) = (&mut self.answers, &mut self.questions);
        take_messages(&mut self.heard, |message| match dns::answer(view, &message[PREFIX..]) {
            Some(answer) => answers.extend(with_length(&answer)),
            None => questions.extend(message),
        });
        taken
    }

    /// Passes questions on to the resolver, and takes what it says.
    fn ask(&mut self, registry: &Registry, tokens: &mut Tokens, sockets: &mut Datagrams) -> io::Result<()> {
        if self.upstream.is_none() && !self.questions.is_empty() {
            let resolver = self.resolver.ok_or(ErrorKind::ConnectionRefused)?;
            let permit = sockets.permit(Opener::Guest).ok_or(ErrorKind::ConnectionRefused)?;
            let mut upstream = TcpStream::connect(resolver)?;
            settle(&upstream);
            registry.register(&mut upstream, tokens.next(), Interest::READABLE | Interest::WRITABLE)?;
            self.upstream = Some((upstream, permit));
        }
        let Some((upstream, _)) = &mut self.upstream else { return Ok(()) };
        while !self.questions.is_empty() {
            match upstream.write(&self.questions) {
                Ok(0) => break,
                Ok(taken) => drop(self.questions.drain(..taken)),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let mut bytes = [0; 4096];
        while self.answers.len() < LONGEST {
            match upstream.read(&mut bytes) {
                Ok(0) => {
                    // What is asked next is asked anew.
                    self.upstream = None;
                    self.learned.clear();
                    break;
                }
                Ok(len) => self.learned.extend(&bytes[..len]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            let answers = &mut self.answers;
            take_messages(&mut self.learned, |message| answers.extend(message));
        }
        Ok(())
    }
}

/// Takes the messages out that are whole, each with its length before it.
fn take_messages(bytes: &mut Vec<u8>, mut each: impl FnMut(&[u8])) {
    let mut rest = &bytes[..];
    while let Some((message, behind)) = first_message(rest) {
        each(message);
        rest = behind;
    }
    let taken = bytes.len() - rest.len();
    bytes.drain(..taken);
}

fn first_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let prefix: [u8; PREFIX] = *bytes.first_chunk()?;
    bytes.split_at_checked(PREFIX + usize::from(u16::from_be_bytes(prefix)))
}

fn with_length(message: &[u8]) -> Vec<u8> {
    // The VPC's own answers are short.
    let len = u16::try_from(message.len()).unwrap_or_default();
    [&len.to_be_bytes(), &message[..usize::from(len)]].concat()
}

/// A guest that says these bytes over a connection. Each message is answered or passed on, in its order and by itself,
/// however its bytes come.
#[cfg(any(test, fuzzing))]
pub(crate) fn heard(view: &View, bytes: &[u8]) {
    let all_in = |size: usize| {
        let mut names = Names::new(None);
        for mut piece in bytes.chunks(size) {
            while !piece.is_empty() {
                let taken = names.hear(view, piece);
                assert!(taken > 0 && names.heard.len() < LONGEST, "there is always room");
                piece = &piece[taken..];
            }
        }
        (names.answers, names.questions, names.heard)
    };
    let (mut answers, mut questions, mut rest) = (Vec::new(), Vec::new(), bytes);
    while let [high, low, behind @ ..] = rest {
        let Some((message, behind)) = behind.split_at_checked(usize::from(*high) << 8 | usize::from(*low))
        else {
            break;
        };
        match dns::answer(view, message) {
            Some(answer) => answers.extend([&(answer.len() as u16).to_be_bytes(), &answer[..]].concat()),
            None => questions.extend(&rest[..PREFIX + message.len()]),
        }
        rest = behind;
    }
    for size in [bytes.len().max(1), 1, 7] {
        assert!(all_in(size) == (answers.clone(), questions.clone(), rest.to_vec()), "in pieces of {size}");
    }
}

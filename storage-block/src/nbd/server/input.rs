//! Requests as they come off a connection: many with one call, and large payloads straight to where they are
//! needed.

use std::io;

use super::replies::Replies;
use crate::nbd::channel::Channel;
use crate::nbd::proto::{Command, PAYLOAD_MAX, REQUEST_LEN, Request};

/// What is received at once, at most.
const ROOM: usize = 128 << 10;
/// The longest payload that may be received in there.
pub(super) const SMALL: u32 = 64 << 10;
const _: () = assert!(SMALL as usize + REQUEST_LEN <= ROOM);

#[derive(Debug)]
pub(super) struct Input {
    room: Box<[u8]>,
    start: usize,
    end: usize,
    /// Nothing that follows can be understood, or nothing will.
    over: bool,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { room: vec![0; ROOM].into(), start: 0, end: 0, over: false }
    }

    /// Whether there is a whole request already.
    pub(super) fn ready(&self) -> bool {
        let request = self.peek().and_then(|head| Request::parse(&head));
        self.over || request.is_some_and(|request| self.end - self.start >= REQUEST_LEN + payload(&request))
    }

    fn peek(&self) -> Option<[u8; REQUEST_LEN]> {
        self.room[self.start..self.end].first_chunk().copied()
    }

    /// The next request without what it brings along; `None` after the last.
    pub(super) fn next(&mut self, channel: &Channel) -> Option<Request> {
        let request = if self.over { None } else { self.receive_head(channel).ok().flatten() };
        self.over = request.is_none();
        request
    }

    fn receive_head(&mut self, channel: &Channel) -> io::Result<Option<Request>> {
        self.fill(REQUEST_LEN, channel)?;
        let Some(head) = self.peek() else { return Ok(None) };
        self.start += REQUEST_LEN;
        Ok(Request::parse(&head).filter(|request| match request.command {
            Command::Disconnect => false,
            // What follows cannot be skipped at a price worth paying.
            Command::Write => request.len <= PAYLOAD_MAX,
            _ => true,
        }))
    }

    /// Receives until there are `len` bytes, which have to fit into the room.
    fn fill(&mut self, len: usize, channel: &Channel) -> io::Result<()> {
        if self.room.len() - self.start < len || self.start == self.end {
            self.room.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < len {
            match channel.receive(&mut self.room[self.end..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        Ok(())
    }

    /// What a small request brings along. `None` if it does not come.
    pub(super) fn payload(&mut self, request: &Request, channel: &Channel) -> Option<&[u8]> {
        let len = payload(request);
        let filled = self.fill(len, channel);
        self.over |= filled.is_err();
        filled.ok()?;
        self.start += len;
        Some(&self.room[self.start - len..self.start])
    }

    /// Puts what the request brings along into `data`. `None` if it does not come.
    pub(super) fn receive_payload(
        &mut self,
        request: &Request,
        channel: &Channel,
        data: &mut Replies,
    ) -> Option<()> {
        let room = data.room(payload(request));
        let here = room.len().min(self.end - self.start);
        let (first, rest) = room.split_at_mut(here);
        first.copy_from_slice(&self.room[self.start..self.start + here]);
        self.start += here;
        let received = channel.receive_exact(rest);
        self.over |= received.is_err();
        received.ok()
    }
}

fn payload(request: &Request) -> usize {
    if request.command == Command::Write { request.len as usize } else { 0 }
}

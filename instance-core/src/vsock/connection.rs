//! One stream, as the host's end of it: a function of packets and of what the host's program does.

use std::collections::VecDeque;
use std::io::Read;

use super::packet::Op;
use super::{BUFFER, DATA_MAX};

/// How far a stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The host asked for it; the guest has not answered.
    Connecting,
    Connected,
    /// The guest did not want it.
    Refused,
    /// It ended as both wanted.
    Closed,
    /// It was broken off.
    Broken,
}

impl State {
    /// Whether the guest knows of it, or may get to know.
    pub(super) fn is_live(self) -> bool {
        matches!(self, Self::Connecting | Self::Connected)
    }
}

/// One direction or both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ways {
    pub(super) receive: bool,
    pub(super) send: bool,
}

impl Ways {
    pub(super) const BOTH: Self = Self { receive: true, send: true };

    fn add(&mut self, other: Self) {
        self.receive |= other.receive;
        self.send |= other.send;
    }
}

/// The guest has broken the rules of the stream, which is broken off.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// One stream.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) state: State,
    /// What came from the guest and was not read yet.
    inbox: VecDeque<u8>,
    /// What the guest is to get.
    outbox: VecDeque<u8>,
    /// What the guest's side receives and sends no more, and what the host's.
    guest_ended: Ways,
    host_ended: Ways,
    /// What of the latter the guest was told.
    told_ended: Ways,
    credit: Credit,
    due: Due,
}

/// How many bytes either side has sent and taken, modulo 2³² (virtio 1.2, 5.10.6.3).
#[derive(Debug, Default)]
struct Credit {
    /// From the guest.
    received: u32,
    /// Those of them that the host's program has taken.
    taken: u32,
    /// What of that the guest was told.
    told: u32,
    /// To the guest.
    sent: u32,
    /// The guest's room, and what its program has taken.
    guest_room: u32,
    guest_taken: u32,
    /// The guest was asked for its room, and has not told it.
    asked: bool,
}

impl Credit {
    /// How many bytes the guest has room for.
    fn for_guest(&self) -> usize {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_taken)) as usize
    }
}

/// What the guest is to be told as soon as it can be.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
}

impl Connection {
    /// A stream that the host asks for.
    pub(super) fn to_guest() -> Self {
        Self::new(State::Connecting, Due { request: true, ..Due::default() })
    }

    /// A stream that the guest has asked for, and gets.
    pub(super) fn from_guest() -> Self {
        Self::new(State::Connected, Due { response: true, ..Due::default() })
    }

    fn new(state: State, due: Due) -> Self {
        Self {
            state,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            guest_ended: Ways::default(),
            host_ended: Ways::default(),
            told_ended: Ways::default(),
            credit: Credit::default(),
            due,
        }
    }

    /// Whether the guest has not been told of it at all.
    pub(super) fn is_unheard_of(&self) -> bool {
        self.state == State::Connecting && self.due.request
    }

    /// Takes what each packet says of the guest's room.
    pub(super) fn learn_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        (self.credit.guest_room, self.credit.guest_taken) = (buf_alloc, fwd_cnt);
        self.credit.asked = false;
    }

    /// Takes a packet of the guest's. Whether the stream then is no more, the state says.
    pub(super) fn take(&mut self, op: Op) -> Result<(), Violation> {
        match (self.state, op) {
            (State::Connecting, Op::Reset) => self.state = State::Refused,
            (State::Connecting, Op::Response) if !self.due.request => self.state = State::Connected,
            (State::Connected, Op::Reset) => {
                let ended = self.guest_ended.send || self.host_ended == Ways::BOTH;
                self.state = if ended { State::Closed } else { State::Broken };
            }
            (State::Connected, Op::Data(bytes)) => self.take_bytes(&bytes)?,
            (State::Connected, Op::Shutdown { receive, send }) => {
                self.guest_ended.add(Ways { receive, send });
                if self.guest_ended.receive {
                    self.outbox = VecDeque::new();
                }
            }
            (State::Connected, Op::CreditUpdate) => {}
            (State::Connected, Op::CreditRequest) => self.due.credit_update = true,
            _ => return Err(Violation),
        }
        Ok(())
    }

    fn take_bytes(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let waiting = self.credit.received.wrapping_sub(self.credit.taken) as usize;
        if self.guest_ended.send || bytes.len() > BUFFER - waiting {
            return Err(Violation);
        }
        self.credit.received = self.credit.received.wrapping_add(bytes.len() as u32);
        if self.host_ended.receive {
            self.have_taken(bytes.len());
        } else {
            self.inbox.extend(bytes);
        }
        Ok(())
    }

    /// Whether the guest has ended it both ways, which is to be acknowledged by a reset.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_ended == Ways::BOTH
    }

    fn have_taken(&mut self, count: usize) {
        self.credit.taken = self.credit.taken.wrapping_add(count as u32);
        // Not for each byte; but before the guest has no room left.
        let untold = self.credit.taken.wrapping_sub(self.credit.told);
        self.due.credit_update |= untold as usize >= BUFFER / 4;
    }

    /// Reads what has come. None where one has to wait.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> Option<Result<usize, State>> {
        if !self.inbox.is_empty() {
            // Does not fail.
            let count = self.inbox.read(buf).unwrap_or(0);
            self.have_taken(count);
            return Some(Ok(count));
        }
        match self.state {
            State::Refused | State::Broken => Some(Err(self.state)),
            State::Closed => Some(Ok(0)),
            _ if self.guest_ended.send || self.host_ended.receive => Some(Ok(0)),
            State::Connecting | State::Connected => None,
        }
    }

    /// Takes bytes for the guest. None where one has to wait.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Option<Result<usize, State>> {
        if self.state != State::Connected {
            return Some(Err(self.state));
        }
        if self.host_ended.send || self.guest_ended.receive {
            return Some(Err(State::Closed));
        }
        let count = bytes.len().min(BUFFER - self.outbox.len());
        self.outbox.extend(&bytes[..count]);
        (count > 0 || bytes.is_empty()).then_some(Ok(count))
    }

    /// The host's program receives or sends no more. What it has written still goes to the guest.
    pub(super) fn end(&mut self, ways: Ways) {
        self.host_ended.add(ways);
        if ways.receive {
            let unread = std::mem::take(&mut self.inbox).len();
            self.have_taken(unread);
        }
    }

    /// Whether all that the host's program wanted has been said, so that nobody needs to know of it.
    pub(super) fn is_over(&self) -> bool {
        !self.state.is_live() || self.told_ended == Ways::BOTH
    }

    /// The next packet for the guest, with at most `room` bytes of data, and the room to be told with it.
    pub(super) fn next(&mut self, room: usize) -> Option<Op> {
        let op = self.next_op(room)?;
        (self.credit.told, self.due.credit_update) = (self.credit.taken, false);
        Some(op)
    }

    fn next_op(&mut self, room: usize) -> Option<Op> {
        if self.is_unheard_of() {
            self.due.request = false;
            return Some(Op::Request);
        }
        if self.state != State::Connected {
            return None;
        }
        if std::mem::take(&mut self.due.response) {
            return Some(Op::Response);
        }
        if !self.outbox.is_empty() {
            let count = self.outbox.len().min(self.credit.for_guest()).min(DATA_MAX).min(room);
            if count > 0 {
                self.credit.sent = self.credit.sent.wrapping_add(count as u32);
                return Some(Op::Data(self.outbox.drain(..count).collect()));
            }
            if self.credit.for_guest() == 0 && !std::mem::replace(&mut self.credit.asked, true) {
                return Some(Op::CreditRequest);
            }
        } else if self.told_ended != self.host_ended {
            self.told_ended = self.host_ended;
            return Some(Op::Shutdown { receive: self.host_ended.receive, send: self.host_ended.send });
        }
        std::mem::take(&mut self.due.credit_update).then_some(Op::CreditUpdate)
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_next(&self) -> bool {
        let ends = self.outbox.is_empty() && self.told_ended != self.host_ended;
        let sends = !self.outbox.is_empty() && (self.credit.for_guest() > 0 || !self.credit.asked);
        let connected = self.due.response || sends || ends || self.due.credit_update;
        self.is_unheard_of() || self.state == State::Connected && connected
    }

    /// How many of the guest's bytes have been taken, modulo 2³².
    pub(super) fn taken(&self) -> u32 {
        self.credit.taken
    }
}

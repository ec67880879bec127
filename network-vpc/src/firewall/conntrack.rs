//! What becomes of conversations.
//!
//! A TCP conversation is begun by a SYN alone, and goes on when who began it has acknowledged the other's initial
//! sequence number: whoever makes up addresses does not learn it, so a flood of SYNs fills the places of those
//! that wait and no others, also where the instance answers each. In the same way it ends only with a reset that has
//! the number which its receiver waits for (RFC 5961, section 3.2), or when both sides have ended it.

use std::net::Ipv4Addr;

use super::table::{Class, Key, Phase, State, Table};
use crate::firewall::{Direction, Policy};
use crate::packet::{ECHO, ECHO_REPLY, Flow, TcpFlags, Transport};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The conversations of an interface.
#[derive(Debug)]
pub(crate) struct Conntrack {
    table: Table,
    now: u32,
}

/// Who of a conversation sends a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// The one that began it.
    First = 0,
    Second = 1,
}

/// What a packet is to the conversation that it seems to belong to.
enum Step {
    /// A part of it.
    Pass,
    /// A part of it that shows that it lives.
    Hear,
    /// The rules have to decide.
    Ask,
    /// The rules have to decide, and it begins anew if they allow it.
    BeginAnew,
    /// Its end.
    Remove,
    /// It becomes one that goes on, if there is room.
    Promote(Class),
}

impl Conntrack {
    /// Remembers at most so many conversations, and at least a few.
    pub(crate) fn new(most: usize) -> Self {
        Self { table: Table::new(most), now: 0 }
    }

    /// How many conversations are remembered.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether a packet belongs to a conversation that goes on, or `policy` allows it by itself. Whatever `policy`
    /// allows passes. `now` is in seconds.
    pub(crate) fn allows(&mut self, policy: &Policy, direction: Direction, flow: &Flow, now: u32) -> bool {
        self.follow(policy, direction, flow, now, |flow| policy.allows(direction, flow))
    }

    /// The same of a packet that comes in from one who has not the address that it is from, and so is in no group.
    pub(crate) fn allows_stranger(&mut self, policy: &Policy, flow: &Flow, now: u32) -> bool {
        self.follow(policy, Direction::Ingress, flow, now, |flow| policy.allows_stranger(flow))
    }

    fn follow(
        &mut self,
        policy: &Policy,
        direction: Direction,
        flow: &Flow,
        now: u32,
        by_rule: impl Fn(&Flow) -> bool,
    ) -> bool {
        let now = self.advance(now);
        if policy.leaves_untracked(direction, flow) {
            return true;
        }
        // What has nothing to tell its conversations by goes by the rules.
        let Some(key) = Key::of(direction, flow) else { return by_rule(flow) };
        let Some((slot, mut state)) = self.table.find(&key, now) else {
            return by_rule(flow) && self.begin(key, direction, flow);
        };
        let from_inwards = direction == Direction::Ingress;
        let side = if state.inwards == from_inwards { Side::First } else { Side::Second };
        let step = match flow.transport {
            Transport::Tcp { flags, .. } => state.follow_tcp(side, flags),
            Transport::Udp { .. } => state.follow_udp(side),
            Transport::Icmp { kind, .. } => state.follow_echo(side, kind),
            Transport::Other(_) => Step::Hear,
        };
        match step {
            Step::Ask => return by_rule(flow),
            Step::BeginAnew => return by_rule(flow) && self.begin(key, direction, flow),
            Step::Pass => self.table.set(slot, state),
            Step::Hear => {
                self.table.set(slot, state);
                self.table.hear(slot, now);
            }
            Step::Remove => self.table.remove(slot),
            Step::Promote(class) => {
                if self.table.promote(slot, class, now) {
                    self.table.set(slot, state);
                } else {
                    // It waits on for a place, as what it was.
                    self.table.hear(slot, now);
                }
            }
        }
        true
    }

    /// Whether `policy` lets a conversation in from outside that begins with `real`, which the instance sees as `shown`.
    pub(crate) fn admit_as(&mut self, policy: &Policy, real: &Flow, shown: &Flow, now: u32) -> bool {
        let now = self.advance(now);
        if policy.leaves_untracked(Direction::Ingress, real) {
            return true;
        }
        let Some(key) = Key::of(Direction::Ingress, shown) else { return false };
        if !policy.allows_stranger(real) {
            return false;
        }
        let state = State { inwards: true, phase: Phase::Expected, ended: 0, numbers: [0; 2] };
        self.table.begin(key, Class::WaitingIn, state, now);
        true
    }

    /// Whether an ICMP error may pass, which is about the packet `about`: because that one's conversation goes on, or
    /// because a rule allows the error by itself.
    pub(crate) fn allows_error(
        &mut self,
        policy: &Policy,
        direction: Direction,
        about: &Flow,
        by_rule: bool,
        now: u32,
    ) -> bool {
        let now = self.advance(now);
        // The packet went the other way.
        let went = direction.opposite();
        let goes_on = || Key::of(went, about).is_some_and(|key| self.table.find(&key, now).is_some());
        by_rule || policy.leaves_untracked(went, about) || goes_on()
    }

    /// Forgets all conversations of which an end is gone.
    pub(crate) fn forget(&mut self, is_gone: impl Fn(Ipv4Addr) -> bool) {
        self.table.forget(is_gone);
    }

    /// That all is as it has to be.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check(&self) {
        self.table.check();
    }

    /// Time does not go back.
    fn advance(&mut self, now: u32) -> u32 {
        self.now = self.now.max(now);
        self.table.expire(self.now);
        self.now
    }

    /// Remembers a conversation if this packet begins one. What it is for: that one may pass, that is decided.
    fn begin(&mut self, key: Key, direction: Direction, flow: &Flow) -> bool {
        let number = match flow.transport {
            Transport::Tcp { flags, .. } if flags.begins() => Some(flags.sequence),
            // It is in the middle of something, of which nothing is known.
            Transport::Tcp { .. } | Transport::Icmp { kind: ECHO_REPLY, .. } => None,
            _ => Some(0),
        };
        let Some(number) = number else { return true };
        let inwards = direction == Direction::Ingress;
        let class = match (flow.transport, inwards) {
            (Transport::Other(_), _) => Class::Portless,
            (_, true) => Class::WaitingIn,
            (_, false) => Class::WaitingOut,
        };
        let state = State { inwards, phase: Phase::Begun, ended: 0, numbers: [number, 0] };
        self.table.begin(key, class, state, self.now);
        true
    }
}

impl State {
    fn follow_tcp(&mut self, side: Side, flags: TcpFlags) -> Step {
        match self.phase {
            Phase::GoesOn => self.follow_established(side, flags),
            _ => self.follow_handshake(side, flags),
        }
    }

    fn follow_handshake(&mut self, side: Side, flags: TcpFlags) -> Step {
        // How far apart the initial number and the first acknowledgement may be: what the other side has sent
        // along with its SYN.
        const AHEAD: u32 = u16::MAX as u32;
        let [first, second] = self.numbers;
        let acknowledges_first = flags.ack && flags.acknowledged == first.wrapping_add(1);
        match side {
            Side::First if flags.begins() => match self.phase {
                Phase::Expected => {
                    (self.phase, self.numbers) = (Phase::Begun, [flags.sequence, 0]);
                    Step::Pass
                }
                // Said again. It is not heard of: who is not answered asks the rules from time to time.
                _ if flags.sequence == first => Step::Pass,
                _ => Step::BeginAnew,
            },
            // It was let in before, and what has begun it was forgotten meanwhile: who may say so is whom it was let in for.
            Side::First if self.phase == Phase::Expected && flags.ack && !flags.syn && !flags.rst => {
                self.phase = Phase::GoesOn;
                self.numbers = [flags.acknowledged, flags.sequence];
                self.ended = u8::from(flags.fin);
                Step::Promote(Class::Established)
            }
            Side::First => {
                let ahead = flags.acknowledged.wrapping_sub(second.wrapping_add(1));
                if self.phase != Phase::Answered || !flags.ack || flags.rst || ahead > AHEAD {
                    return Step::Pass;
                }
                self.phase = Phase::GoesOn;
                self.numbers = [flags.acknowledged, first.wrapping_add(1)];
                self.ended = u8::from(flags.fin);
                Step::Promote(Class::Established)
            }
            Side::Second if flags.begins() => Step::Ask,
            Side::Second if flags.rst && acknowledges_first => Step::Remove,
            Side::Second if flags.syn && acknowledges_first => {
                let answered_before = self.phase == Phase::Answered;
                (self.phase, self.numbers[1]) = (Phase::Answered, flags.sequence);
                if answered_before { Step::Pass } else { Step::Hear }
            }
            Side::Second => Step::Pass,
        }
    }

    fn follow_established(&mut self, side: Side, flags: TcpFlags) -> Step {
        const BOTH: u8 = 0b11;
        let is_closed = self.ended == BOTH;
        if flags.begins() {
            // A conversation does not begin anew without a rule. And it does not end with what anyone can say.
            return if is_closed { Step::BeginAnew } else { Step::Ask };
        }
        if flags.rst {
            let expected = self.numbers[1 - side as usize];
            if is_closed || flags.sequence != expected {
                return Step::Pass;
            }
            self.ended = BOTH;
            return Step::Promote(Class::Closing);
        }
        if flags.ack {
            self.numbers[side as usize] = flags.acknowledged;
        }
        if flags.fin {
            self.ended |= 1 << side as u8;
        }
        if self.ended == BOTH && !is_closed { Step::Promote(Class::Closing) } else { Step::Hear }
    }

    fn follow_udp(&mut self, side: Side) -> Step {
        match (self.phase, side) {
            // Not heard of, as a SYN that is said again.
            (Phase::Expected | Phase::Begun, Side::First) => return Step::Pass,
            (Phase::Expected | Phase::Begun, Side::Second) => self.phase = Phase::Answered,
            (Phase::Answered, Side::First) => self.phase = Phase::AskedAgain,
            (Phase::AskedAgain, Side::Second) => {
                self.phase = Phase::GoesOn;
                return Step::Promote(Class::Stream);
            }
            _ => {}
        }
        Step::Hear
    }

    fn follow_echo(&mut self, side: Side, kind: u8) -> Step {
        match (side, kind == ECHO) {
            (Side::First, true) if self.phase == Phase::Answered => Step::Hear,
            (Side::First, true) => Step::Pass,
            (Side::Second, false) => {
                self.phase = Phase::Answered;
                Step::Hear
            }
            // The same number the other way is another conversation.
            (Side::First, false) | (Side::Second, true) => Step::Ask,
        }
    }
}

impl Key {
    /// None of a packet that has nothing to tell its conversation by.
    fn of(direction: Direction, flow: &Flow) -> Option<Self> {
        let (from, to, protocol) = match flow.transport {
            Transport::Tcp { source, destination, .. } => (source, destination, TCP),
            Transport::Udp { source, destination } => (source, destination, UDP),
            Transport::Icmp { kind: ECHO | ECHO_REPLY, id, .. } => (id, id, ICMP),
            Transport::Icmp { .. } => return None,
            Transport::Other(number) => (0, 0, number),
        };
        Some(match direction {
            Direction::Ingress => {
                Self { own: flow.destination, peer: flow.source, peer_port: from, port: to, protocol }
            }
            Direction::Egress => {
                Self { own: flow.source, peer: flow.destination, peer_port: to, port: from, protocol }
            }
        })
    }
}

//! What carries frames between a stream socket and a port, without waiting for either.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::run::Run;
use crate::machine::NetSpec;
use crate::net::{Frame, FrameLimits, NetPort, Offloads};

/// Addresses and type of a frame, and the same with a VLAN tag.
const ETHERNET_MIN: usize = 14;
const ETHERNET_MAX: usize = ETHERNET_MIN + 4;

/// The bytes that say how long a frame is.
pub(super) const PREFIX: usize = 4;
/// How much goes through the socket at a time.
const CHUNK: usize = 256 << 10;
/// How many frames are taken before it is the turn of who does something with them.
const TURN: usize = 256;
/// How many times the machine is written to before it is the turn of others.
const ROUNDS: usize = 4;

/// What a machine is given that is not complete: it is completed, and cut, as it is written to the socket.
const TAKES: Offloads = Offloads { checksum: true, tcp4: true, tcp6: false };

#[derive(Debug)]
pub(super) struct Carrier {
    pub(super) socket: UnixStream,
    pub(super) port: NetPort,
    /// The longest frame of the network.
    longest: usize,
    to_machine: FrameLimits,
    from_machine: FrameLimits,
    /// What the machine has sent, and the part of it that has not gone on.
    received: Box<[u8]>,
    begin: usize,
    end: usize,
    /// The frames that the network has no room for.
    held: VecDeque<Frame>,
    /// What was made ready for the machine, and how much of it has been sent.
    unsent: Vec<u8>,
    sent: usize,
}

/// What became of the whole frames that had come.
enum Delivery {
    Done,
    /// There are more, and enough for once.
    Turn,
    /// The network has no room for the next.
    NoRoom,
    /// The next has to wait so long.
    Limited(Duration),
}

impl Carrier {
    pub(super) fn new(socket: UnixStream, spec: &NetSpec) -> Self {
        spec.port.set_takes(TAKES);
        Self {
            socket,
            port: spec.port.clone(),
            longest: usize::from(spec.mtu) + ETHERNET_MAX,
            to_machine: spec.receive_limits.clone(),
            from_machine: spec.transmit_limits.clone(),
            received: vec![0; CHUNK].into_boxed_slice(),
            begin: 0,
            end: 0,
            held: VecDeque::new(),
            unsent: Vec::new(),
            sent: 0,
        }
    }

    /// Whether the machine has not taken all that was written to it.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether the network has no room for what the machine has sent.
    pub(super) fn is_held_up(&self) -> bool {
        !self.held.is_empty()
    }

    /// Gives the machine the frames that wait, as far as it takes them; says how long the next one has to wait for the
    /// limits or for its turn, if it has.
    pub(super) fn send(&mut self) -> io::Result<Option<Duration>> {
        for _ in 0..ROUNDS {
            let delay = if self.unsent.is_empty() { self.fill() } else { None };
            if self.unsent.is_empty() {
                return Ok(delay);
            }
            match self.socket.write(&self.unsent[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // It takes no more, and most likely is gone. What it has sent is received first, and then its end.
                Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    self.forget_unsent();
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
            if self.sent == self.unsent.len() {
                self.forget_unsent();
            }
        }
        Ok(Some(Duration::ZERO))
    }

    fn forget_unsent(&mut self) {
        self.unsent.clear();
        // Frames with tiny segments become a lot longer as they are cut.
        self.unsent.shrink_to(2 * CHUNK);
        self.sent = 0;
    }

    /// Makes frames ready that wait, about as many as go through the socket at a time.
    fn fill(&mut self) -> Option<Duration> {
        let mut taken = 0;
        // Not all that is taken is made ready.
        while self.unsent.len().max(taken) < CHUNK {
            let delay = self.to_machine.delay();
            if delay.is_some() {
                return delay;
            }
            let frame = self.port.recv()?;
            taken += PREFIX + frame.data.len();
            if !frame.is_taken_by(TAKES) {
                continue;
            }
            frame.finish_into(|header, payload| {
                let len = header.len() + payload.len();
                self.to_machine.charge(len);
                if (ETHERNET_MIN..=self.longest).contains(&len) {
                    self.unsent.extend((len as u32).to_be_bytes());
                    self.unsent.extend(header);
                    self.unsent.extend(payload);
                }
            });
        }
        Some(Duration::ZERO)
    }

    /// Takes the machine's frames, as far as the network has room for them; says how long the next one has to wait for
    /// the limits or for its turn, if it has.
    pub(super) fn receive(&mut self) -> io::Result<Option<Duration>> {
        let mut came = 0;
        loop {
            match self.deliver()? {
                Delivery::NoRoom => return Ok(None),
                Delivery::Limited(delay) => return Ok(Some(delay)),
                Delivery::Turn => return Ok(Some(Duration::ZERO)),
                Delivery::Done if came >= CHUNK => return Ok(Some(Duration::ZERO)),
                Delivery::Done => {}
            }
            // There is room behind the part of a frame that may be left.
            self.received.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
            match self.socket.read(&mut self.received[self.end..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => (self.end, came) = (self.end + len, came + len),
                // Not before that has all been read that the socket has told of: its end may be among it.
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends on the whole frames that have come.
    fn deliver(&mut self) -> io::Result<Delivery> {
        if !self.port.send_all(&mut self.held) {
            return Ok(Delivery::NoRoom);
        }
        // Where frames are held to a rate, each waits for its own time.
        let takes = self.port.peer_takes();
        let merges = takes.checksum && takes.tcp4 && self.from_machine.is_none();
        let mut delivery = Delivery::Done;
        while let Some(frame) = first_frame(&self.received[self.begin..self.end])? {
            if self.held.len() == TURN {
                delivery = Delivery::Turn;
                break;
            }
            if let Some(delay) = self.from_machine.delay() {
                delivery = Delivery::Limited(delay);
                break;
            }
            self.from_machine.charge(frame.len());
            self.begin += PREFIX + frame.len();
            if !(ETHERNET_MIN..=self.longest).contains(&frame.len()) {
                continue;
            }
            // Room for a tag is for frames that have one; a segment of a joined one fits without.
            let joins = merges && frame.len() <= self.longest - (ETHERNET_MAX - ETHERNET_MIN);
            let mut run = if joins { Run::new(frame) } else { Run::alone(frame) };
            while let Some(next) = first_frame(&self.received[self.begin..self.end])? {
                if !run.takes(next) {
                    break;
                }
                self.begin += PREFIX + next.len();
            }
            self.held.push_back(run.into_frame());
        }
        Ok(if self.port.send_all(&mut self.held) { delivery } else { Delivery::NoRoom })
    }
}

/// The first frame of a stream, if it is there as a whole.
fn first_frame(stream: &[u8]) -> io::Result<Option<&[u8]>> {
    let Some((prefix, rest)) = stream.split_first_chunk::<PREFIX>() else { return Ok(None) };
    let len = u32::from_be_bytes(*prefix) as usize;
    if len > Frame::MAX_LEN {
        return Err(io::Error::new(ErrorKind::InvalidData, "the machine sent a frame that is none"));
    }
    Ok(rest.get(..len))
}

/// What a port's waker may hold goes with the port's.
impl Drop for Carrier {
    fn drop(&mut self) {
        self.port.set_waker(None);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::net::{self, FRAMES_KEPT, MacAddress};

    fn carrier() -> (Carrier, NetPort, UnixStream) {
        let (port, network) = net::link();
        let (machine, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        machine.set_nonblocking(true).unwrap();
        (Carrier::new(socket, &NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]))), network, machine)
    }

    fn framed(len: usize) -> Vec<u8> {
        [&(len as u32).to_be_bytes()[..], &vec![7; len]].concat()
    }

    #[test]
    fn a_machine_that_never_stops_writing_has_its_turn_like_others() {
        let (mut carrier, network, mut machine) = carrier();
        let network = Arc::new(network);
        machine.write_all(&framed(1500)).unwrap();
        // Each frame that comes is followed by more, up to a lot.
        let (came, weak) = (Arc::new(AtomicUsize::new(0)), Arc::downgrade(&network));
        let so_far = came.clone();
        network.set_waker(Some(Arc::new(move || {
            while let Some(frame) = weak.upgrade().and_then(|network| network.recv()) {
                if so_far.fetch_add(frame.data.len(), Ordering::Relaxed) < 16 * CHUNK {
                    (&machine).write_all(&framed(1500).repeat(2)).unwrap_or_default();
                }
            }
        })));
        assert_eq!(carrier.receive().unwrap(), Some(Duration::ZERO));
        let first = came.load(Ordering::Relaxed);
        assert!((CHUNK / 2..2 * CHUNK).contains(&first), "{first} bytes");
        assert_eq!(carrier.receive().unwrap(), Some(Duration::ZERO));
        assert!(came.load(Ordering::Relaxed) > first);
    }

    #[test]
    fn frames_that_come_to_nothing_count() {
        let (mut carrier, network, machine) = carrier();
        let too_long = || Frame::new(vec![1; 60_000]);
        while network.send(too_long()).is_ok() {}
        assert_eq!(carrier.send().unwrap(), Some(Duration::ZERO));
        assert!(network.send(too_long()).is_ok());
        (0..FRAMES_KEPT).for_each(|_| _ = carrier.send().unwrap());
        assert_eq!(carrier.send().unwrap(), None);
        drop(machine);
    }

    #[test]
    fn an_end_that_came_with_the_last_frame_is_seen_with_it() {
        let (mut carrier, network, mut machine) = carrier();
        machine.write_all(&framed(60)).unwrap();
        drop(machine);
        assert!(carrier.receive().is_err());
        assert!(network.recv().is_some());
    }

    #[test]
    fn what_a_machine_sent_before_it_went_is_received_although_it_takes_no_more() {
        let (mut carrier, network, mut machine) = carrier();
        machine.write_all(&framed(60)).unwrap();
        network.send(Frame::new(vec![1; 60])).unwrap();
        drop(machine);
        assert_eq!(carrier.send().unwrap(), None);
        assert!(!carrier.is_behind());
        assert!(carrier.receive().is_err());
        assert!(network.recv().is_some());
    }

    #[test]
    fn memory_for_a_frame_that_became_long_is_given_back() {
        let (mut carrier, network, mut machine) = carrier();
        let mut data = vec![0; 54 + 60_000];
        data[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0xea, 0x88, 0, 0, 0x40, 0, 64, 6]);
        data[46] = 0x50;
        network.send(Frame::unfinished_tcp4(data, 1)).unwrap();
        let mut read = vec![0; CHUNK];
        carrier.send().unwrap();
        assert!(carrier.is_behind() && carrier.unsent.capacity() > 8 * CHUNK);
        while carrier.is_behind() {
            while machine.read(&mut read).is_ok() {}
            carrier.send().unwrap();
        }
        assert!(carrier.unsent.capacity() <= 2 * CHUNK);
    }
}

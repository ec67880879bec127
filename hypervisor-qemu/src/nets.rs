//! A machine's network ports: each a cable on our side and, for the child, a stream of frames with their
//! lengths before them (QEMU's `-netdev socket`).

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use instance_core::machine::NetSpec;
use instance_core::net::{Frame, FrameLimits, NetPort, Offloads, SendError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::child::Inherited;
use crate::shared::Waker;

/// The most network ports of a machine: as many as the largest of EC2's have.
pub(crate) const MAX_NETS: usize = 15;

/// Addresses and type of a frame, and the same with a VLAN tag.
const ETHERNET_MIN: usize = 14;
const ETHERNET_MAX: usize = ETHERNET_MIN + 4;

/// The bytes that say how long a frame is.
const PREFIX: usize = 4;
/// How much goes through the socket at a time.
const CHUNK: usize = 256 << 10;
/// How often the child is read from before it is the network's turn.
const READS: usize = 4;

/// The threads that carry frames, one a port.
#[derive(Debug)]
pub(crate) struct Nets {
    _bridges: Vec<Bridge>,
}

#[derive(Debug)]
struct Bridge {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    wake: Waker,
    over: AtomicBool,
}

impl Nets {
    /// Plugs the ports in, and gives the child's ends.
    pub(crate) fn plug(ports: &[NetSpec], thread_name: &str) -> io::Result<(Self, Vec<Inherited>)> {
        let (mut bridges, mut ends) = (Vec::new(), Vec::new());
        for (n, spec) in ports.iter().enumerate() {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            ends.push(Inherited::new(theirs)?);
            let stop = Arc::new(Stop { wake: Waker::new()?, over: AtomicBool::new(false) });
            let carrier = Carrier::new(ours, spec, stop.clone());
            let name: String = format!("net{n}-{thread_name}").chars().take(15).collect();
            let thread = thread::Builder::new().name(name).spawn(move || carrier.carry())?;
            bridges.push(Bridge { stop, thread: Some(thread) });
        }
        Ok((Self { _bridges: bridges }, ends))
    }
}

/// Unplugs the ports. No frame is under way any more when this returns.
impl Drop for Bridge {
    fn drop(&mut self) {
        self.stop.over.store(true, Ordering::SeqCst);
        self.stop.wake.wake();
        // It panics only where a waker of the network's does.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Carries frames between a socket and a port.
struct Carrier {
    socket: UnixStream,
    port: NetPort,
    longest: usize,
    /// Of frames to the child, and of those from it.
    limits: [FrameLimits; 2],
    stop: Arc<Stop>,
    /// What the child has sent and is not yet a whole frame.
    received: Vec<u8>,
    chunk: Vec<u8>,
    /// The frames that the network has no room for.
    held: VecDeque<Frame>,
    /// What the child has not taken.
    unsent: Vec<u8>,
}

impl Carrier {
    fn new(socket: UnixStream, spec: &NetSpec, stop: Arc<Stop>) -> Self {
        let longest = usize::from(spec.mtu) + ETHERNET_MAX;
        let (received, unsent, chunk) = (Vec::new(), Vec::new(), vec![0; CHUNK]);
        let limits = [spec.receive_limits.clone(), spec.transmit_limits.clone()];
        let (port, held) = (spec.port.clone(), VecDeque::new());
        Self { socket, port, longest, limits, stop, received, chunk, held, unsent }
    }

    fn carry(mut self) {
        let stop = self.stop.clone();
        self.port.set_waker(Some(Arc::new(move || stop.wake.wake())));
        let end = self.carry_until_the_end();
        self.port.set_waker(None);
        tracing::debug!(?end, "a network port is unplugged");
    }

    fn carry_until_the_end(&mut self) -> io::Result<()> {
        loop {
            self.stop.wake.clear();
            if self.stop.over.load(Ordering::SeqCst) {
                return Ok(());
            }
            // What waits for a limit is looked at again when it may pass.
            let (to_child, from_child) = (self.send()?, self.receive()?);
            let due_in = [to_child, from_child].into_iter().flatten().min();
            let timeout = due_in.and_then(|due_in| Timespec::try_from(due_in).ok());
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, self.held.is_empty());
            wanted.set(PollFlags::OUT, !self.unsent.is_empty());
            // A TAP device calls no waker; it is heard as long as the child takes frames.
            let hears = self.unsent.is_empty() && to_child.is_none() && self.port.is_connected();
            let heard = self.port.descriptor().filter(|_| hears);
            let mut fds =
                vec![PollFd::new(&self.socket, wanted), PollFd::new(&self.stop.wake.0, PollFlags::IN)];
            fds.extend(heard.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                // Closed by the child, which may be seen although nothing is wanted of it.
                Ok(_) if fds[0].revents().contains(PollFlags::HUP) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Gives the child the frames that wait, as far as it takes them; says how long the next one has to wait for the
    /// limits, if it has.
    fn send(&mut self) -> io::Result<Option<Duration>> {
        loop {
            let mut delay = None;
            while self.unsent.len() < CHUNK {
                delay = self.limits[0].delay();
                if delay.is_some() {
                    break;
                }
                let Some(frame) = self.port.recv() else { break };
                let len = frame.data.len();
                self.limits[0].charge(len);
                if frame.is_taken_by(Offloads::NONE) && (ETHERNET_MIN..=self.longest).contains(&len) {
                    self.unsent.extend((len as u32).to_be_bytes());
                    self.unsent.extend(&frame.data);
                }
            }
            if self.unsent.is_empty() {
                return Ok(delay);
            }
            match self.socket.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(delay),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes the child's frames, as far as the network has room for them; says how long the next one has to wait for
    /// the limits, if it has.
    fn receive(&mut self) -> io::Result<Option<Duration>> {
        for _ in 0..READS {
            match self.deliver()? {
                Delivery::Done => {}
                Delivery::NoRoom => return Ok(None),
                Delivery::Limited(delay) => return Ok(Some(delay)),
            }
            match self.socket.read(&mut self.chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.received.extend(&self.chunk[..len]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(match self.deliver()? {
            Delivery::Limited(delay) => Some(delay),
            Delivery::Done | Delivery::NoRoom => None,
        })
    }

    /// Sends on the whole frames that have come.
    fn deliver(&mut self) -> io::Result<Delivery> {
        let mut rest = &self.received[..];
        while let Some((prefix, after)) = rest.split_first_chunk::<PREFIX>() {
            let len = u32::from_be_bytes(*prefix) as usize;
            if len > Frame::MAX_LEN {
                return Err(io::Error::new(ErrorKind::InvalidData, "QEMU sent a frame that is none"));
            }
            let Some((frame, after)) = after.split_at_checked(len) else { break };
            rest = after;
            if (ETHERNET_MIN..=self.longest).contains(&len) {
                self.held.push_back(Frame::new(frame.to_vec()));
            }
        }
        let taken = self.received.len() - rest.len();
        self.received.drain(..taken);
        if self.limits[1].is_none() {
            return Ok(if self.port.send_all(&mut self.held) { Delivery::Done } else { Delivery::NoRoom });
        }
        while let Some(frame) = self.held.pop_front() {
            if let Some(delay) = self.limits[1].delay() {
                self.held.push_front(frame);
                return Ok(Delivery::Limited(delay));
            }
            let cost = frame.data.len();
            match self.port.send(frame) {
                Err(SendError::Full(frame)) => {
                    self.held.push_front(frame);
                    return Ok(Delivery::NoRoom);
                }
                _ => self.limits[1].charge(cost),
            }
        }
        Ok(Delivery::Done)
    }
}

/// What became of the whole frames that had come.
enum Delivery {
    Done,
    /// The network has no room for the next.
    NoRoom,
    /// The next has to wait so long.
    Limited(Duration),
}

#[cfg(test)]
mod tests {
    use super::*;
    use instance_core::net::{self, FRAMES_KEPT, MacAddress};
    use std::os::fd::AsFd;
    use std::time::Instant;
    use storage_block::{IoLimits, Limiter, Rate};

    struct Rig {
        nets: Option<Nets>,
        network: NetPort,
        child: UnixStream,
    }

    fn rig() -> Rig {
        rig_with(|_| ())
    }

    fn rig_with(change: impl FnOnce(&mut NetSpec)) -> Rig {
        let (port, network) = net::link();
        let mut spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
        change(&mut spec);
        let (nets, ends) = Nets::plug(&[spec], "test").unwrap();
        let child = UnixStream::from(ends[0].as_fd().try_clone_to_owned().unwrap());
        Rig { nets: Some(nets), network, child }
    }

    impl Rig {
        fn recv(&self) -> Frame {
            let (came, comes) = std::sync::mpsc::channel();
            self.network.set_waker(Some(Arc::new(move || _ = came.send(()))));
            loop {
                if let Some(frame) = self.network.recv() {
                    return frame;
                }
                comes.recv().unwrap();
            }
        }
    }

    fn framed(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
    }

    #[test]
    fn carries_frames_both_ways_however_they_are_cut() {
        let mut rig = rig();
        let frames: Vec<Vec<u8>> = (14..1519).map(|len| vec![len as u8; len]).collect();
        let stream: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut child = rig.child.try_clone().unwrap();
        let sender = thread::spawn(move || stream.chunks(1000).try_for_each(|part| child.write_all(part)));
        for frame in &frames {
            assert_eq!(rig.recv().data, *frame);
        }
        sender.join().unwrap().unwrap();
        for frame in &frames {
            rig.network.send(Frame::new(frame.clone())).unwrap();
            let mut got = vec![0; PREFIX + frame.len()];
            rig.child.read_exact(&mut got).unwrap();
            assert_eq!(got, framed(frame));
        }
    }

    #[test]
    fn what_is_no_frame_of_the_network_is_dropped() {
        let mut rig = rig();
        for len in [0, 13, 1519, Frame::MAX_LEN] {
            rig.child.write_all(&framed(&vec![1; len])).unwrap();
            rig.network.send(Frame::new(vec![1; len])).unwrap();
        }
        rig.child.write_all(&framed(&[2; 60])).unwrap();
        assert_eq!(rig.recv().data, [2; 60]);
        rig.network.send(Frame::new(vec![3; 60])).unwrap();
        let mut got = [0; PREFIX + 60];
        rig.child.read_exact(&mut got).unwrap();
        assert_eq!(got[..], framed(&[3; 60]));
    }

    #[test]
    fn a_full_network_holds_the_child_back_and_loses_nothing() {
        let rig = rig();
        let mut child = rig.child.try_clone().unwrap();
        const COUNT: u32 = 4 * FRAMES_KEPT as u32;
        let sender = thread::spawn(move || {
            (0..COUNT).try_for_each(|n| child.write_all(&framed(&n.to_be_bytes().repeat(300))))
        });
        for n in 0..COUNT {
            assert_eq!(rig.recv().data[..4], n.to_be_bytes());
        }
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn a_child_that_lies_about_a_length_or_goes_is_unplugged() {
        for lie in [true, false] {
            let mut rig = rig();
            let (came, comes) = std::sync::mpsc::channel();
            rig.network.set_waker(Some(Arc::new(move || _ = came.send(()))));
            if lie {
                rig.child.write_all(&u32::MAX.to_be_bytes()).unwrap();
            } else {
                rig.child.shutdown(std::net::Shutdown::Both).unwrap();
            }
            while rig.network.is_connected() {
                comes.recv().unwrap();
            }
        }
    }

    #[test]
    fn frames_wait_for_limits_and_go_on_by_themselves() {
        // Two at once, and then twenty in a second.
        let limits = IoLimits { ops: Some(Rate { per_second: 20, burst: 2 }), ..IoLimits::NONE };
        let limited = || FrameLimits::new([Limiter::new(limits)]);
        let mut rig = rig_with(|spec| (spec.receive_limits, spec.transmit_limits) = (limited(), limited()));
        let frame = vec![7; 60];
        for direction in ["from the child", "to the child"] {
            let begun = Instant::now();
            for _ in 0..6 {
                match direction {
                    "from the child" => rig.child.write_all(&framed(&frame)).unwrap(),
                    _ => rig.network.send(Frame::new(frame.clone())).unwrap(),
                }
            }
            for _ in 0..6 {
                match direction {
                    "from the child" => assert_eq!(rig.recv().data, frame),
                    _ => rig.child.read_exact(&mut [0; PREFIX + 60]).unwrap(),
                }
            }
            assert!(begun.elapsed() >= Duration::from_millis(190), "{direction}: {:?}", begun.elapsed());
        }
    }

    #[test]
    fn dropping_unplugs() {
        let mut rig = rig();
        assert!(rig.network.is_connected());
        rig.nets.take();
        assert!(!rig.network.is_connected());
    }
}

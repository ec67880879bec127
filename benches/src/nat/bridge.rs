//! What `hypervisor-qemu` has between QEMU's socket and a cable.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use instance_core::net::{Frame, NetPort, Offloads};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use super::{CHUNK, for_each_frame, send, wait};

/// Carries frames between a socket and a cable.
pub(super) struct Bridge {
    socket: UnixStream,
    port: NetPort,
    woken: Arc<OwnedFd>,
}

impl Bridge {
    pub(super) fn new(socket: UnixStream, port: NetPort) -> anyhow::Result<Self> {
        socket.set_nonblocking(true)?;
        let woken = Arc::new(eventfd(0, EventfdFlags::NONBLOCK)?);
        let wake = woken.clone();
        port.set_takes(Offloads::NONE);
        port.set_waker(Some(Arc::new(move || {
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        })));
        Ok(Self { socket, port, woken })
    }

    /// Gives the guest what waits, until nothing does or it takes no more: what still waits then wakes nobody.
    fn send(&mut self, unsent: &mut Vec<u8>) -> anyhow::Result<()> {
        loop {
            while unsent.len() < CHUNK {
                let Some(frame) = self.port.recv() else { break };
                unsent.extend((frame.data.len() as u32).to_be_bytes());
                unsent.extend(frame.data);
            }
            send(&mut self.socket, unsent)?;
            if !unsent.is_empty() || self.port.waiting() == 0 {
                return Ok(());
            }
        }
    }

    pub(super) fn carry(mut self) -> anyhow::Result<()> {
        let (mut received, mut unsent, mut bytes) = (Vec::new(), Vec::new(), vec![0; CHUNK]);
        let mut held = VecDeque::new();
        loop {
            let _ = rustix::io::read(&*self.woken, &mut [0u8; 8]);
            self.send(&mut unsent)?;
            match self.socket.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(len) => received.extend(&bytes[..len]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            let taken = for_each_frame(&received, |frame| held.push_back(Frame::new(frame.to_vec())));
            received.drain(..taken);
            // What finds no room is lost, as on any network.
            self.port.send_all(&mut held);
            held.clear();
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, !unsent.is_empty());
            wait(&mut [PollFd::new(&self.socket, wanted), PollFd::new(&*self.woken, PollFlags::IN)], None)?;
        }
    }
}

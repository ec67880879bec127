//! A machine's network ports, each a stream of frames with their lengths before them for the child (QEMU's
//! `-netdev socket`).

use std::io;
use std::os::unix::net::UnixStream;

use instance_core::machine::NetSpec;
use instance_core::net::FrameStream;

use crate::child::Inherited;

/// The most network ports of a machine: as many as the largest of EC2's have.
pub(crate) const MAX_NETS: usize = 15;

/// What is plugged in, until this is dropped.
#[derive(Debug)]
pub(crate) struct Nets(#[expect(dead_code, reason = "it is kept to be dropped")] Vec<FrameStream>);

impl Nets {
    /// Plugs the ports in, and gives the child's ends.
    pub(crate) fn plug(ports: &[NetSpec], thread_name: &str) -> io::Result<(Self, Vec<Inherited>)> {
        let (mut streams, mut ends) = (Vec::new(), Vec::new());
        for (n, spec) in ports.iter().enumerate() {
            let (ours, theirs) = UnixStream::pair()?;
            ends.push(Inherited::new(theirs)?);
            streams.push(FrameStream::plug(ours, spec, &format!("net{n}-{thread_name}"))?);
        }
        Ok((Self(streams), ends))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use instance_core::net::{self, Frame, MacAddress};

    use super::*;

    #[test]
    fn a_child_has_its_port_until_it_is_dropped() {
        let (port, network) = net::link();
        let spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
        let (nets, ends) = Nets::plug(&[spec], "test").unwrap();
        let mut child = UnixStream::from(ends[0].as_fd().try_clone_to_owned().unwrap());
        network.send(Frame::new(vec![7; 60])).unwrap();
        let mut got = [0; 64];
        child.read_exact(&mut got).unwrap();
        assert_eq!((&got[..4], &got[4..]), (&60u32.to_be_bytes()[..], &[7; 60][..]));
        let (came, comes) = std::sync::mpsc::channel();
        network.set_waker(Some(std::sync::Arc::new(move || _ = came.send(()))));
        child.write_all(&got).unwrap();
        while network.waiting() == 0 {
            comes.recv().unwrap();
        }
        assert_eq!(network.recv().map(|frame| frame.data), Some(vec![7; 60]));
        assert!(network.is_connected());
        drop(nets);
        assert!(!network.is_connected());
    }
}

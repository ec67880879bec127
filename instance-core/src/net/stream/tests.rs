//! Streams, served by the network and by a thread of their own.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::Instant;

use storage_block::{IoLimits, Limiter, Rate};

use super::carrier::PREFIX;
use super::*;
use crate::net::{self, Checksum, FRAMES_KEPT, Frame, FrameLimits, MacAddress, NetPort};

struct Rig {
    stream: Option<FrameStream>,
    network: NetPort,
    machine: UnixStream,
}

/// A machine plugged in by a stream, for each way in which that is served.
fn rigs(change: impl Fn(&mut NetSpec)) -> impl Iterator<Item = Rig> {
    [false, true].into_iter().map(move |by_network| {
        let (port, network) = net::link();
        if by_network {
            network.set_stream_server(Some(Arc::new(|stream| drop(thread::spawn(|| serve(stream))))));
        }
        let mut spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
        change(&mut spec);
        let (machine, socket) = UnixStream::pair().unwrap();
        let stream = Some(FrameStream::plug(socket, &spec, "test").unwrap());
        assert_eq!(matches!(stream, Some(FrameStream(Served::ByPeer(_)))), by_network);
        Rig { stream, network, machine }
    })
}

/// Serves a stream as a network does, until it is over.
fn serve(stream: ServedStream) {
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let (waker, mut socket) = (wake.clone(), None);
    let waker = Arc::new(move || _ = rustix::io::write(&*waker, &1u64.to_ne_bytes()));
    let watch = |fd: BorrowedFd<'_>| {
        socket = Some(fd.as_raw_fd());
        Ok(())
    };
    stream.begin(waker, watch).unwrap();
    assert!(socket.is_some());
    loop {
        let _ = rustix::io::read(&*wake, &mut [0; 8]);
        if stream.receive().is_err() || stream.send().is_err() {
            return;
        }
        // What the socket has to tell is asked for every millisecond, since it may be closed at any time.
        let millisecond = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        poll(&mut [PollFd::new(&*wake, PollFlags::IN)], Some(&millisecond)).unwrap();
    }
}

impl Rig {
    fn wait(&self, until: impl Fn(&NetPort) -> bool) {
        let (came, comes) = channel();
        self.network.set_waker(Some(Arc::new(move || _ = came.send(()))));
        while !until(&self.network) {
            comes.recv().unwrap();
        }
    }

    fn recv(&self) -> Frame {
        self.wait(|network| network.waiting() > 0);
        self.network.recv().unwrap()
    }

    /// The next frame that the machine gets.
    fn read(&mut self) -> Vec<u8> {
        let mut prefix = [0; PREFIX];
        self.machine.read_exact(&mut prefix).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
        self.machine.read_exact(&mut frame).unwrap();
        frame
    }
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

#[test]
fn carries_frames_both_ways_however_they_are_cut() {
    for mut rig in rigs(|_| ()) {
        let frames: Vec<Vec<u8>> = (14..1519).map(|len| vec![len as u8; len]).collect();
        let stream: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut machine = rig.machine.try_clone().unwrap();
        let sender = thread::spawn(move || stream.chunks(1000).try_for_each(|part| machine.write_all(part)));
        for frame in &frames {
            assert_eq!(rig.recv().data, *frame);
        }
        sender.join().unwrap().unwrap();
        for frame in &frames {
            rig.network.send(Frame::new(frame.clone())).unwrap();
            assert_eq!(rig.read(), *frame);
        }
    }
}

#[test]
fn what_is_no_frame_of_the_network_is_dropped() {
    for mut rig in rigs(|_| ()) {
        for len in [0, 13, 1519, Frame::MAX_LEN] {
            rig.machine.write_all(&framed(&vec![1; len])).unwrap();
            rig.network.send(Frame::new(vec![1; len])).unwrap();
        }
        rig.machine.write_all(&framed(&[2; 60])).unwrap();
        assert_eq!(rig.recv().data, [2; 60]);
        let mut lie = Frame::new(vec![4; 60]);
        lie.checksum = Checksum::Partial { start: 58, offset: 1 };
        rig.network.send(lie).unwrap();
        rig.network.send(Frame::new(vec![3; 60])).unwrap();
        assert_eq!(rig.read(), [3; 60]);
    }
}

#[test]
fn a_full_network_holds_the_machine_back_and_loses_nothing() {
    for rig in rigs(|_| ()) {
        let mut machine = rig.machine.try_clone().unwrap();
        const COUNT: u32 = 4 * FRAMES_KEPT as u32;
        let sender = thread::spawn(move || {
            (0..COUNT).try_for_each(|n| machine.write_all(&framed(&n.to_be_bytes().repeat(300))))
        });
        for n in 0..COUNT {
            assert_eq!(rig.recv().data[..4], n.to_be_bytes());
        }
        sender.join().unwrap().unwrap();
    }
}

#[test]
fn a_machine_that_takes_no_frames_holds_the_network_back_and_loses_nothing() {
    for mut rig in rigs(|_| ()) {
        let send = |n: u32| rig.network.send(Frame::new(n.to_be_bytes().repeat(300)));
        let mut sent = 0;
        // The socket and what was made ready for it take some; then the cable is full for good.
        let full_since = |sent| (Instant::now(), sent);
        let mut last = full_since(sent);
        while last.0.elapsed() < Duration::from_millis(100) {
            if send(sent).is_ok() {
                sent += 1;
                last = full_since(sent);
            }
        }
        assert!(rig.network.is_connected() && sent < 4 * FRAMES_KEPT as u32, "{sent} frames wait somewhere");
        for n in 0..sent {
            assert_eq!(rig.read()[..4], n.to_be_bytes());
        }
        rig.network.send(Frame::new(vec![9; 60])).unwrap();
        assert_eq!(rig.read(), [9; 60]);
    }
}

#[test]
fn a_machine_that_lies_about_a_length_or_goes_is_unplugged() {
    let lie = |len: usize| (len as u32).to_be_bytes().to_vec();
    let frame = framed(&[5; 60]);
    for (says, goes, comes) in [
        (lie(u32::MAX as usize), false, 0),
        (lie(Frame::MAX_LEN + 1), false, 0),
        ([&frame[..], &lie(Frame::MAX_LEN + 1)].concat(), false, 0),
        (vec![], true, 0),
        // In the middle of a length, of a frame, and behind one.
        (frame[..3].to_vec(), true, 0),
        (frame[..30].to_vec(), true, 0),
        (frame.clone(), true, 1),
    ] {
        for mut rig in rigs(|_| ()) {
            rig.machine.write_all(&says).unwrap();
            if goes {
                rig.machine.shutdown(Shutdown::Both).unwrap();
            }
            rig.wait(|network| !network.is_connected());
            let came = std::iter::from_fn(|| rig.network.recv()).count();
            // What came before may be heard or not where the next is a lie.
            assert!(if goes { came == comes } else { came <= 1 }, "{came} of {says:?}");
            // The socket is closed, too.
            assert_eq!(rig.machine.read(&mut [0; 1]).unwrap_or(0), 0);
        }
    }
}

#[test]
fn what_a_machine_sent_before_it_went_waits_for_a_full_network() {
    for mut rig in rigs(|_| ()) {
        const COUNT: u32 = FRAMES_KEPT as u32 + 500;
        let stream: Vec<u8> = (0..COUNT).flat_map(|n| framed(&n.to_be_bytes().repeat(10))).collect();
        rig.machine.write_all(&stream).unwrap();
        rig.machine.shutdown(Shutdown::Both).unwrap();
        for n in 0..COUNT {
            assert_eq!(rig.recv().data[..4], n.to_be_bytes());
        }
        rig.wait(|network| !network.is_connected());
    }
}

#[test]
fn frames_wait_for_limits_and_go_on_by_themselves() {
    // Two at once, and then twenty in a second.
    let limits = IoLimits { ops: Some(Rate { per_second: 20, burst: 2 }), ..IoLimits::NONE };
    let limited = || FrameLimits::new([Limiter::new(limits)]);
    for mut rig in rigs(|spec| (spec.receive_limits, spec.transmit_limits) = (limited(), limited())) {
        let frame = vec![7; 60];
        for direction in ["from the machine", "to the machine"] {
            let begun = Instant::now();
            for _ in 0..6 {
                match direction {
                    "from the machine" => rig.machine.write_all(&framed(&frame)).unwrap(),
                    _ => rig.network.send(Frame::new(frame.clone())).unwrap(),
                }
            }
            for _ in 0..6 {
                match direction {
                    "from the machine" => assert_eq!(rig.recv().data, frame),
                    _ => assert_eq!(rig.read(), frame),
                }
            }
            assert!(begun.elapsed() >= Duration::from_millis(190), "{direction}: {:?}", begun.elapsed());
        }
    }
}

#[test]
fn dropping_unplugs() {
    for mut rig in rigs(|_| ()) {
        assert!(rig.network.is_connected());
        rig.stream.take();
        assert!(!rig.network.is_connected());
        assert_eq!(rig.machine.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn a_network_that_serves_no_more_unplugs() {
    let (port, network) = net::link();
    let (came, comes) = channel();
    network.set_stream_server(Some(Arc::new(move |stream| _ = came.send(stream))));
    let spec = NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1]));
    let (mut machine, socket) = UnixStream::pair().unwrap();
    let _stream = FrameStream::plug(socket, &spec, "test").unwrap();
    drop(spec);
    drop(comes.recv().unwrap());
    assert!(!network.is_connected());
    assert_eq!(machine.read(&mut [0; 1]).unwrap(), 0);
}

/// Of four thousand bytes.
fn long_frame() -> Frame {
    let mut data = vec![0; 54];
    data[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0x0f, 0xc8, 0, 0, 0x40, 0, 64, 6]);
    (data[46], data[47]) = (0x50, 0x10);
    data.extend((0..4000).map(|n| (n / 11) as u8));
    Frame::unfinished_tcp4(data, 1460)
}

#[test]
fn segments_are_one_frame_for_a_network_that_takes_it() {
    let whole = long_frame();
    let segments = whole.clone().finish(net::Offloads::NONE);
    let stream: Vec<u8> = segments.iter().flat_map(|frame| framed(&frame.data)).collect();
    let limited = FrameLimits::new([Limiter::new(IoLimits::NONE)]);
    for (takes, limits) in [
        (net::Offloads::ALL, FrameLimits::default()),
        (net::Offloads::NONE, FrameLimits::default()),
        (net::Offloads::ALL, limited),
    ] {
        let is_one = takes == net::Offloads::ALL && limits.is_none();
        for mut rig in rigs(|spec| spec.transmit_limits = limits.clone()) {
            rig.network.set_takes(takes);
            rig.machine.write_all(&stream).unwrap();
            if is_one {
                let came = rig.recv();
                assert_eq!(came.clone().finish(net::Offloads::NONE), segments);
                assert_eq!(
                    (came.segmentation, came.data[54..] == whole.data[54..]),
                    (whole.segmentation, true)
                );
            } else {
                segments.iter().for_each(|segment| assert_eq!(rig.recv(), *segment));
            }
        }
    }
}

#[test]
fn segments_that_are_longer_than_a_packet_stay_apart() {
    let segments = long_frame().finish(net::Offloads::NONE);
    // The first are as long as a frame with a tag may be.
    for mut rig in rigs(|spec| spec.mtu = 1496) {
        rig.network.set_takes(net::Offloads::ALL);
        segments.iter().for_each(|segment| rig.machine.write_all(&framed(&segment.data)).unwrap());
        segments.iter().for_each(|segment| assert_eq!(rig.recv(), *segment));
    }
}

#[test]
fn a_long_frame_is_cut_for_the_machine() {
    for mut rig in rigs(|_| ()) {
        let frame = long_frame();
        assert!(frame.is_taken_by(rig.network.peer_takes()));
        rig.network.send(frame.clone()).unwrap();
        let expect = frame.finish(net::Offloads::NONE);
        assert_eq!(expect.len(), 3);
        expect.iter().for_each(|frame| assert_eq!(rig.read(), frame.data));
    }
}

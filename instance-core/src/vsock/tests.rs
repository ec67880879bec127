//! Programs at one end of a cable, and a guest's side that is written packet by packet at the other.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use super::*;

/// The room that the guest says it has.
const ROOM: u32 = 1 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn now() -> Instant {
    Instant::now()
}

/// The guest's side: its port is always 7.
struct Guest(VsockPort);

impl Guest {
    fn send(&self, host_port: u32, op: Op) {
        self.send_from(7, host_port, op);
    }

    fn send_from(&self, guest_port: u32, host_port: u32, op: Op) {
        assert!(self.0.has_room());
        self.0.deliver(Packet { host_port, guest_port, op, buf_alloc: ROOM, fwd_cnt: 0 });
    }

    /// What it gets, until there is no more.
    fn received(&self) -> Vec<Op> {
        let packets: Vec<_> = std::iter::from_fn(|| self.0.next(usize::MAX)).collect();
        assert!(!self.0.has_next());
        packets.into_iter().map(|packet| packet.op).collect()
    }

    /// Waits for the next packet.
    fn next(&self) -> Packet {
        let until = soon();
        loop {
            if let Some(packet) = self.0.next(usize::MAX) {
                return packet;
            }
            assert!(now() < until, "no packet comes");
            thread::yield_now();
        }
    }
}

fn plugged() -> (Guest, Vsock) {
    let (port, vsock) = cable();
    (Guest(port), vsock)
}

/// A stream that the guest has made to port 1 and that was accepted.
fn connected() -> (Guest, Stream) {
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    guest.send(1, Op::Request);
    assert_eq!(guest.received(), [Op::Response]);
    let mut stream = listener.accept(now()).unwrap();
    stream.set_deadline(Some(now()));
    (guest, stream)
}

fn kind<T: fmt::Debug>(result: io::Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn data(bytes: &[u8]) -> Op {
    Op::Data(bytes.to_vec())
}

#[test]
fn the_host_connects_and_is_answered_or_not() {
    for (answer, expect) in [
        (Some(Op::Response), None),
        (Some(Op::Reset), Some(ErrorKind::ConnectionRefused)),
        (None, Some(ErrorKind::TimedOut)),
    ] {
        let (guest, vsock) = plugged();
        let (guest, deadline) = (Arc::new(guest), if answer.is_some() { soon() } else { now() });
        let other = guest.clone();
        let answering = thread::spawn(move || {
            if let Some(answer) = answer {
                let request = other.next();
                assert_eq!((request.op, request.guest_port), (Op::Request, 80));
                other.send_from(80, request.host_port, answer);
            }
        });
        let got = vsock.connect(80, deadline);
        answering.join().unwrap();
        assert_eq!(got.as_ref().err().map(io::Error::kind), expect);
        if expect == Some(ErrorKind::TimedOut) {
            assert_eq!(guest.received(), [], "a request that nobody has seen is not made any more");
        }
    }
}

#[test]
fn a_request_that_came_to_nothing_is_taken_back() {
    let (guest, vsock) = plugged();
    let (guest, asking) =
        (Arc::new(guest), thread::spawn(move || vsock.connect(80, now() + Duration::from_millis(50))));
    let host_port = guest.next().host_port;
    assert_eq!(kind(asking.join().unwrap()), ErrorKind::TimedOut);
    assert_eq!(guest.received(), [Op::Reset]);
    // It answers too late.
    guest.send_from(80, host_port, Op::Response);
    assert_eq!(guest.received(), [Op::Reset]);
}

#[test]
fn a_stream_waits_for_what_comes_and_for_room() {
    let (guest, mut stream) = connected();
    assert_eq!(kind(stream.read(&mut [0])), ErrorKind::TimedOut);
    guest.send(1, data(b"abc"));
    let mut two = [0; 2];
    assert_eq!((stream.read(&mut two).unwrap(), &two), (2, b"ab"));
    assert_eq!((stream.read(&mut two).unwrap(), two[0]), (1, b'c'));

    let sent = vec![5; BUFFER + 1];
    assert_eq!(stream.write(&sent).unwrap(), BUFFER);
    assert_eq!(kind(stream.write(&[1])), ErrorKind::TimedOut);
    stream.set_deadline(Some(soon()));
    let (mut writer, mut reader) = (stream.clone(), stream);
    let writing = thread::spawn(move || writer.write_all(&[6]));
    let reading = thread::spawn(move || reader.read(&mut [0; 8]));
    let mut got = Vec::new();
    while got.len() < BUFFER + 1 {
        let Op::Data(bytes) = guest.next().op else { panic!("after {} bytes", got.len()) };
        assert!(bytes.len() <= DATA_MAX);
        got.extend(bytes);
    }
    assert_eq!((&got[..BUFFER], got[BUFFER]), (&sent[..BUFFER], 6));
    writing.join().unwrap().unwrap();
    guest.send(1, data(b"de"));
    assert_eq!(reading.join().unwrap().unwrap(), 2);
}

#[test]
fn the_guest_is_told_of_room_before_it_has_none() {
    let (guest, mut stream) = connected();
    // Three times round the buffer, with the credit that a guest would have.
    let (mut sent, mut taken, mut updates) = (0, 0, 0);
    let mut buf = vec![0; 1000];
    while sent < 3 * BUFFER {
        let chunk = (BUFFER - (sent - taken)).min(10_000);
        if chunk > 0 {
            guest.send(1, data(&vec![1; chunk]));
            sent += chunk;
        } else {
            panic!("stuck after {sent} bytes and {updates} updates");
        }
        while stream.read(&mut buf).is_ok() {}
        while let Some(packet) = guest.0.next(usize::MAX) {
            assert_eq!(packet.op, Op::CreditUpdate);
            assert!(packet.fwd_cnt as usize > taken && packet.buf_alloc as usize == BUFFER);
            taken = packet.fwd_cnt as usize;
            updates += 1;
        }
    }
    assert!(updates < 3 * 5, "{updates} updates are too many");
    guest.send(1, Op::CreditRequest);
    assert_eq!(
        guest.0.next(0).map(|packet| (packet.op, packet.fwd_cnt as usize)),
        Some((Op::CreditUpdate, sent))
    );
}

#[test]
fn a_guest_that_breaks_the_rules_has_its_stream_broken_off() {
    let both = Op::Shutdown { receive: true, send: true };
    let half = Op::Shutdown { receive: false, send: true };
    for (packets, read) in [
        (vec![data(&vec![0; BUFFER]), data(&[0])], BUFFER),
        (vec![data(&vec![0; BUFFER + 1])], 0),
        (vec![Op::Request], 0),
        (vec![Op::Response], 0),
        (vec![half, data(&[0])], 0),
    ] {
        let (guest, mut stream) = connected();
        packets.into_iter().for_each(|op| guest.send(1, op));
        assert_eq!(guest.received(), [Op::Reset]);
        assert_eq!(kind(stream.write(&[0])), ErrorKind::ConnectionReset);
        let mut bytes = Vec::new();
        assert_eq!(kind(stream.read_to_end(&mut bytes)), ErrorKind::ConnectionReset);
        assert_eq!(bytes.len(), read);
        // Nobody has it any more.
        guest.send(1, both.clone());
        assert_eq!(guest.received(), [Op::Reset]);
    }
    // An answer to what was not asked yet.
    let (guest, vsock) = plugged();
    let guest = Arc::new(guest);
    let (id, _) = vsock.0.lock().connect(80).unwrap();
    let host_port = vsock.0.lock().ports(id).0;
    guest.send_from(80, host_port, Op::Response);
    assert_eq!(guest.received(), [Op::Reset]);
    assert_eq!(vsock.0.lock().state(id), State::Broken);
}

#[test]
fn either_side_ends_a_direction() {
    let (guest, mut stream) = connected();
    guest.send(1, data(b"end"));
    guest.send(1, Op::Shutdown { receive: false, send: true });
    let mut bytes = Vec::new();
    assert_eq!(stream.read_to_end(&mut bytes).unwrap(), 3);
    stream.write_all(b"answer").unwrap();
    stream.shutdown(Shutdown::Write);
    assert_eq!(kind(stream.write(&[0])), ErrorKind::BrokenPipe);
    assert_eq!(guest.received(), [data(b"answer"), Op::Shutdown { receive: false, send: true }]);
    guest.send(1, Op::Shutdown { receive: true, send: false });
    assert_eq!(guest.received(), [Op::Reset], "which says that this is the end");
    drop(stream);
    assert_eq!(guest.received(), []);

    // Who reads no more takes what comes all the same, so that the guest is not kept waiting.
    let (guest, mut stream) = connected();
    guest.send(1, data(&[1; 100]));
    stream.shutdown(Shutdown::Read);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.received(), [Op::Shutdown { receive: true, send: false }]);
    for _ in 0..4 {
        guest.send(1, data(&vec![1; BUFFER]));
        assert_eq!(guest.received(), [Op::CreditUpdate]);
    }
    stream.write_all(b"x").unwrap();

    // The guest reads no more.
    guest.send(1, Op::Shutdown { receive: true, send: false });
    assert_eq!(kind(stream.write(&[0])), ErrorKind::BrokenPipe);
    assert!(!guest.received().contains(&data(b"x")));
}

#[test]
fn what_was_written_goes_out_after_the_stream_is_dropped() {
    let (guest, mut stream) = connected();
    stream.write_all(b"farewell").unwrap();
    drop(stream);
    assert_eq!(guest.received(), [data(b"farewell"), Op::Shutdown { receive: true, send: true }]);
    guest.send(1, data(b"late"));
    assert_eq!(guest.received(), [Op::Reset]);
}

#[test]
fn streams_without_number_are_not_kept() {
    // Those that wait at a listener.
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    let made = (0..2 * BACKLOG as u32).filter(|n| {
        guest.send_from(*n, 1, Op::Request);
        guest.received() == [Op::Response]
    });
    assert_eq!(made.count(), BACKLOG);
    drop(listener);
    let mut resets = 0;
    // No more answers wait than a guest's packets may cause, but for those that were waiting.
    while let Some(packet) = guest.0.next(0) {
        assert_eq!(packet.op, Op::Reset);
        resets += 1;
    }
    assert_eq!(resets, BACKLOG);

    // All of them.
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    let mut streams = Vec::new();
    for n in 0.. {
        guest.send_from(n, 1, Op::Request);
        if guest.received() != [Op::Response] {
            break;
        }
        streams.push(listener.accept(now()).unwrap());
    }
    assert_eq!(streams.len(), STREAMS);
    assert_eq!(kind(vsock.connect(1, now())), ErrorKind::QuotaExceeded);
    // Those whose last words the guest does not take.
    for stream in &mut streams {
        stream.write_all(b"x").unwrap();
    }
    for n in 0..STREAMS as u32 {
        guest.0.deliver(Packet {
            host_port: 1,
            guest_port: n,
            op: Op::CreditUpdate,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }
    drop(streams);
    let left = guest.received();
    assert_eq!(left.iter().filter(|op| **op == Op::Reset).count(), STREAMS - LINGERING);
    assert_eq!(left.iter().filter(|op| **op == Op::CreditRequest).count(), LINGERING);
}

#[test]
fn streams_speak_in_turn() {
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    let mut streams = Vec::new();
    for n in 0..3 {
        guest.send_from(n, 1, Op::Request);
        streams.push(listener.accept(now()).unwrap());
    }
    guest.received();
    for stream in &mut streams {
        stream.write_all(&[0; 10]).unwrap();
    }
    let from: Vec<u32> = (0..9).map(|_| guest.0.next(4).unwrap().guest_port).collect();
    assert_eq!(from, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    // One that is given no room neither speaks nor is forgotten.
    streams[0].write_all(&[1]).unwrap();
    assert_eq!((guest.0.next(0), guest.0.has_next()), (None, true));
    assert_eq!(guest.received(), [data(&[1])]);
}

#[test]
fn the_machine_is_woken_when_there_is_something_for_its_guest() {
    let (guest, mut stream) = connected();
    let woken = Arc::new(AtomicUsize::new(0));
    let counted = woken.clone();
    guest.0.set_waker(Some(Arc::new(move || _ = counted.fetch_add(1, SeqCst))));
    let mut expect = woken.load(SeqCst);
    assert_eq!(expect, 1, "so that nothing of before is missed");
    let mut more = |what: &str| {
        let now = woken.load(SeqCst);
        assert!(std::mem::replace(&mut expect, now) < now, "{what}");
        guest.received();
    };
    stream.write_all(b"x").unwrap();
    more("bytes");
    guest.send(1, data(&vec![0; BUFFER]));
    assert_eq!(stream.read(&mut vec![0; BUFFER]).unwrap(), BUFFER);
    more("room");
    stream.shutdown(Shutdown::Write);
    more("an end");
    drop(stream);
    more("the other end");
}

#[test]
fn a_port_has_one_listener_and_is_free_after_it() {
    let (_guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    assert_eq!((listener.port(), kind(vsock.listen(1))), (1, ErrorKind::AddrInUse));
    assert_eq!(kind(listener.accept(now())), ErrorKind::TimedOut);
    drop(listener);
    vsock.listen(1).unwrap();
}

#[test]
fn a_machine_that_goes_is_noticed_by_all_who_wait() {
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    guest.send(1, Op::Request);
    let mut stream = listener.accept(now()).unwrap();
    guest.send(1, data(b"last"));
    let reader = stream.clone();
    let connecting = vsock.clone();
    let waiting = [
        thread::spawn(move || kind(listener.accept(soon()))),
        thread::spawn(move || kind(connecting.connect(9, soon()))),
        thread::spawn(move || kind({ reader }.read_to_end(&mut Vec::new()))),
    ];
    guest.next();
    drop(guest);
    let kinds = waiting.map(|thread| thread.join().unwrap());
    assert_eq!(kinds[0], ErrorKind::NotConnected);
    assert!(matches!(kinds[1], ErrorKind::NotConnected | ErrorKind::ConnectionReset), "{:?}", kinds[1]);
    assert_eq!(kinds[2], ErrorKind::ConnectionReset);
    assert_eq!(kind(stream.write(&[0])), ErrorKind::ConnectionReset);
    assert_eq!(kind(vsock.connect(9, soon())), ErrorKind::NotConnected);
}

#[test]
fn a_guest_that_begins_anew_keeps_listeners_and_requests_it_has_not_seen() {
    let (guest, vsock) = plugged();
    let listener = vsock.listen(1).unwrap();
    guest.send(1, Op::Request);
    let mut stream = listener.accept(now()).unwrap();
    guest.send_from(8, 1, Op::Request);
    guest.received();
    let (guest, connecting) = (Arc::new(guest), vsock.clone());
    let asking = thread::spawn(move || connecting.connect(80, soon()));
    while !guest.0.has_next() {
        thread::yield_now();
    }
    guest.0.reset();
    assert_eq!(kind(stream.read(&mut [0])), ErrorKind::ConnectionReset);
    assert_eq!(kind(listener.accept(now())), ErrorKind::TimedOut, "who waited there is gone");
    let request = guest.next();
    guest.send_from(80, request.host_port, Op::Response);
    asking.join().unwrap().unwrap();
    guest.send(1, Op::Request);
    listener.accept(now()).unwrap();
}

//! Frames to the guest.

use super::*;

#[test]
fn frames_to_the_guest_arrive_as_they_are() {
    for without in [0, MRG_RXBUF] {
        let mut driver = Driver::without(without | EVENT_IDX);
        for (n, len) in (0u16..).zip(14..1515) {
            driver.network.send(Frame::new(content(len))).unwrap();
            driver.offer_buffer(n % 4, 1526);
            assert_ne!(driver.step(RECEIVE), Step::Idle);
            assert_eq!(driver.used(RECEIVE), n + 1);
            let bytes = driver.received(n);
            assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "{len} bytes");
            assert_eq!(bytes[12..], content(len), "{len} bytes");
        }
    }
}

#[test]
fn a_long_frame_fills_several_buffers_which_appear_at_once() {
    let mut driver = Driver::without(EVENT_IDX);
    let mut frame = Frame::new(content(3000));
    frame.checksum = Checksum::Partial { start: 34, offset: 16 };
    frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size: 1448, header_len: 54 });
    driver.network.send(frame).unwrap();
    for n in 0..3 {
        assert_eq!((driver.step(RECEIVE), driver.used(RECEIVE)), (Step::Idle, 0), "with {n} buffers");
        driver.offer_buffer(n, 1100);
    }
    assert_eq!((driver.step(RECEIVE), driver.used(RECEIVE)), (Step::Served { interrupt: true }, 3));
    let whole = [driver.received(0), driver.received(1), driver.received(2)].concat();
    assert_eq!(whole[..12], [1, 1, 54, 0, 168, 5, 34, 0, 16, 0, 3, 0]);
    assert_eq!(whole[12..], content(3000));
}

#[test]
fn a_frame_that_the_driver_has_no_place_for_is_lost_alone() {
    let mut driver = Driver::without(MRG_RXBUF | GUEST_TSO4);
    let mut cut = Frame::new(content(3000));
    cut.checksum = Checksum::Partial { start: 34, offset: 16 };
    cut.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size: 1448, header_len: 54 });
    let mut unsound = Frame::new(content(60));
    unsound.checksum = Checksum::Partial { start: 59, offset: 0 };
    // Not taken, longer than the MTU, longer than the buffer, lying, and a good one.
    for frame in [cut, Frame::new(content(1519)), Frame::new(content(1400)), unsound, Frame::new(content(60))]
    {
        driver.network.send(frame).unwrap();
    }
    driver.offer_buffer(0, 200);
    driver.step(RECEIVE);
    assert_eq!((driver.used(RECEIVE), driver.needs_reset()), (1, false));
    assert_eq!(driver.received(0)[12..], content(60));
}

/// Which no rule forbids: the frame does not wait for what cannot come.
#[test]
fn a_frame_that_a_queue_full_of_buffers_has_no_room_for_is_lost_alone() {
    let mut driver = Driver::without(0);
    for frame in [content(1400), content(60)] {
        driver.network.send(Frame::new(frame)).unwrap();
    }
    (0..QUEUE_SIZE).for_each(|n| driver.offer(RECEIVE, n, &[(RECEIVED + 16 * u64::from(n), 16, WRITE)]));
    driver.step(RECEIVE);
    assert_eq!((driver.used(RECEIVE), driver.needs_reset()), (5, false), "72 bytes in buffers of 16");
    let mut whole = vec![0; 72];
    driver.memory.read_slice(&mut whole, GuestAddress(RECEIVED)).unwrap();
    assert_eq!(whole[12..], content(60));
}

/// As a guest may have it, whose machine is ended while frames come: what is read for them is not read for all at once.
#[test]
fn frames_take_turns_where_long_tables_have_no_room_for_them() {
    const INDIRECT: u16 = 4;
    const TABLE: u64 = SENT;
    const FRAMES: usize = 64;
    let mut driver = Driver::without(EVENT_IDX);
    // One for all chains: a buffer of 16 bytes, and then of none.
    for n in 0..256u16 {
        let descriptor = GuestAddress(TABLE + 16 * u64::from(n));
        let (len, next) = (if n == 0 { 16 } else { 0 }, if n < 255 { NEXT } else { 0 });
        driver.memory.write_obj(RECEIVED, descriptor).unwrap();
        let rest = u64::from(WRITE | next) << 32 | u64::from(n + 1) << 48 | len;
        driver.memory.write_obj(rest, GuestAddress(descriptor.0 + 8)).unwrap();
    }
    (0..QUEUE_SIZE).for_each(|n| driver.offer(RECEIVE, n, &[(TABLE, 16 * 256, INDIRECT)]));
    (0..FRAMES).for_each(|_| driver.network.send(Frame::new(content(1400))).unwrap());
    let steps = (0..).find(|_| driver.step(RECEIVE) == Step::Idle).unwrap();
    assert_eq!((driver.used(RECEIVE), driver.needs_reset()), (0, false));
    // Of 16384 descriptors no more than 1024 are read for each, and 4096 before others have their turn.
    assert!((FRAMES / 5..=FRAMES / 3).contains(&steps), "{FRAMES} frames in {steps} steps");
}

//! Cables.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::*;

fn counter(port: &NetPort) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    port.set_waker(Some(Arc::new(move || {
        counted.fetch_add(1, SeqCst);
    })));
    count.store(0, SeqCst);
    count
}

#[test]
fn frames_come_in_order_and_wake_once() {
    let (a, b) = link();
    let woken = counter(&b);
    for n in 0..10 {
        a.send(Frame::new(vec![n])).expect("there is room");
    }
    assert_eq!((b.waiting(), woken.load(SeqCst)), (10, 1));
    let got: Vec<u8> = std::iter::from_fn(|| b.recv()).map(|frame| frame.data[0]).collect();
    assert_eq!(got, (0..10).collect::<Vec<u8>>());
    a.send(Frame::new(vec![])).expect("there is room");
    assert_eq!(woken.load(SeqCst), 2);
}

#[test]
fn a_full_cable_gives_the_frame_back_and_says_when_there_is_room() {
    // Each length fills the cable to the last frame or byte.
    for (len, most) in [(1, FRAMES_KEPT), (64 << 10, BYTES_KEPT / (64 << 10)), (BYTES_KEPT + 1, 1)] {
        let (a, b) = link();
        let woken = counter(&a);
        let sent = (0..).take_while(|_| a.send(Frame::new(vec![7; len])).is_ok()).count();
        assert_eq!(sent, most, "frames of {len} bytes");
        assert!(
            matches!(a.send(Frame::new(vec![7; 5])), Err(SendError::Full(frame)) if frame.data.len() == 5)
        );
        assert_eq!(woken.load(SeqCst), 0);
        while b.recv().is_some() {}
        assert_eq!(woken.load(SeqCst), 1, "frames of {len} bytes");
        a.send(Frame::new(vec![7; len])).expect("there is room again");
    }
}

#[test]
fn many_frames_wake_once_and_what_finds_no_room_stays() {
    let (a, b) = link();
    let (woken, has_room) = (counter(&b), counter(&a));
    let mut frames: VecDeque<_> = (0..FRAMES_KEPT + 3).map(|n| Frame::new(vec![n as u8])).collect();
    assert!(!a.send_all(&mut frames));
    assert_eq!((frames.len(), woken.load(SeqCst), has_room.load(SeqCst)), (3, 1, 0));
    assert!(!a.send_all(&mut frames), "there is no room yet");
    while b.recv().is_some() {}
    assert_eq!(has_room.load(SeqCst), 1);
    assert!(a.send_all(&mut frames) && a.send_all(&mut frames));
    assert_eq!((b.recv(), woken.load(SeqCst)), (Some(Frame::new(vec![FRAMES_KEPT as u8])), 2));
    drop(b);
    assert!(a.send_all(&mut [Frame::default()].into()), "it is lost");
}

#[test]
fn an_end_that_goes_is_noticed() {
    let (a, b) = link();
    let woken = counter(&a);
    let other = b.clone();
    drop(b);
    assert!(a.is_connected());
    drop(other);
    assert_eq!((a.is_connected(), woken.load(SeqCst)), (false, 1));
    assert_eq!(a.send(Frame::new(vec![])), Err(SendError::Disconnected));
}

#[test]
fn a_waker_may_use_its_port_and_hold_it() {
    let (a, b) = link();
    let echo = b.clone();
    b.set_waker(Some(Arc::new(move || {
        while let Some(frame) = echo.recv() {
            let _ = echo.send(frame);
        }
    })));
    a.send(Frame::new(vec![1, 2, 3])).expect("there is room");
    assert_eq!(a.recv().map(|frame| frame.data), Some(vec![1, 2, 3]));
    b.set_waker(None); // what held the last clone but one goes with it
    drop(b);
    assert!(!a.is_connected());
}

#[test]
fn what_was_sent_before_a_waker_was_set_is_not_missed() {
    let (a, b) = link();
    a.send(Frame::new(vec![])).expect("there is room");
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    b.set_waker(Some(Arc::new(move || {
        counted.fetch_add(1, SeqCst);
    })));
    assert_eq!(count.load(SeqCst), 1);
}

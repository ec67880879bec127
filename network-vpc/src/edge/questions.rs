//! The metadata service over a guest's connection.

use smoltcp::socket::tcp;

use crate::metadata::Session;
use crate::port::Port;

/// Answers the guest's questions. False when the conversation is over.
pub(super) fn serve(session: &mut Session, guest: &mut tcp::Socket<'_>, port: &Port) -> bool {
    loop {
        let mut heard = 0;
        let hear = |bytes: &mut [u8]| {
            heard = session.hear(bytes, || port.told());
            (heard, ())
        };
        // What was heard before may be answered now that there is room for it.
        if guest.can_recv() && guest.recv(hear).is_err() {
            return false;
        }
        if heard == 0 {
            session.hear(&[], || port.told());
        }
        guest.set_hop_limit(session.hops());
        let mut said = 0;
        while guest.can_send() && !session.answer().is_empty() {
            match guest.send_slice(session.answer()) {
                Ok(sent) => session.said(sent),
                Err(_) => return false,
            }
            said += 1;
        }
        if heard == 0 && said == 0 {
            break;
        }
    }
    let has_ended = !guest.may_recv() && guest.state() != tcp::State::SynReceived;
    if session.answer().is_empty() && (session.is_over() || has_ended) {
        guest.close();
    }
    true
}

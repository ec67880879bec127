//! The streams of a fake guest: a program of the test's has them.

use std::fmt;
use std::sync::Arc;

use crate::vsock::{Op, Packet, VsockPort, VsockSpec};

/// What a fake guest does with its streams.
#[derive(Clone)]
pub(super) struct Program(Arc<dyn Fn(&VsockPort) + Send + Sync>);

impl Program {
    pub(super) fn new(program: impl Fn(&VsockPort) + Send + Sync + 'static) -> Self {
        Self(Arc::new(program))
    }
}

impl Default for Program {
    fn default() -> Self {
        Self::new(|port| {
            while let Some(Packet { host_port, guest_port, op, .. }) = port.next(usize::MAX) {
                // Nobody listens.
                if op != Op::Reset && port.has_room() {
                    port.deliver(Packet { host_port, guest_port, op: Op::Reset, buf_alloc: 0, fwd_cnt: 0 });
                }
            }
        })
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").finish_non_exhaustive()
    }
}

/// A place for streams in use.
#[derive(Debug)]
pub(super) struct FakeStreams {
    pub(super) port: VsockPort,
    program: Program,
}

impl FakeStreams {
    pub(super) fn new(spec: VsockSpec, program: &Program) -> Self {
        Self { port: spec.port, program: program.clone() }
    }

    /// Does what there is to do; says whether there was something.
    pub(super) fn serve(&self) -> bool {
        let due = self.port.has_next();
        if due {
            (self.program.0)(&self.port);
        }
        due
    }
}

impl Drop for FakeStreams {
    fn drop(&mut self) {
        self.port.set_waker(None);
    }
}

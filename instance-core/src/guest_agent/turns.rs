//! Whose turn it is with a guest's agent, and what it has still to be told.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::{AGAIN, PAUSE, thaw_anew};
use crate::vsock::Vsock;

/// What all who ask the agent of an instance share. It has one client at a time.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    taken: Mutex<()>,
    /// The guest whose file systems may stand still, by its streams, and its agent's port: it was asked to freeze, and has not
    /// said since that they go on.
    owed: Mutex<Option<(Vsock, u32)>>,
}

/// Somebody's turn, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'t> {
    turns: &'t Arc<Turns>,
    _taken: MutexGuard<'t, ()>,
}

impl<'t> Turn<'t> {
    /// Waits for it.
    pub(crate) fn take(turns: &'t Arc<Turns>) -> Self {
        Self { turns, _taken: turns.taken.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    pub(super) fn turns(&self) -> &'t Arc<Turns> {
        self.turns
    }

    /// At which port a guest has an agent that is still to have file systems go on. Nobody asks it anything meanwhile.
    pub(crate) fn owes(&self, vsock: &Vsock) -> Option<u32> {
        self.turns.owes(vsock)
    }
}

impl Turns {
    // Nothing that is done under the lock panics half way.
    fn owed(&self) -> MutexGuard<'_, Option<(Vsock, u32)>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn owes(&self, vsock: &Vsock) -> Option<u32> {
        self.owed().as_ref().filter(|(owed, _)| owed.is_same(vsock)).map(|(_, port)| *port)
    }

    /// Notes that file systems of a guest may stand still. That of an earlier machine is gone.
    pub(crate) fn owe(&self, vsock: &Vsock, port: u32) {
        *self.owed() = Some((vsock.clone(), port));
    }

    /// Notes that they go on, or are gone with their machine.
    pub(super) fn pay(&self, vsock: &Vsock) {
        self.owed().take_if(|(owed, _)| owed.is_same(vsock));
    }

    /// Has them go on in a guest where they may stand still, in a thread of its own.
    pub(crate) fn thaw_owed(self: &Arc<Self>, vsock: &Vsock) -> io::Result<()> {
        let Some(port) = self.owes(vsock) else { return Ok(()) };
        let (turns, vsock) = (self.clone(), vsock.clone());
        let thaw = move || turns.keep_thawing(&vsock, port);
        thread::Builder::new().name("guest-agent".to_owned()).spawn(thaw).map(drop)
    }

    /// Tells a guest again that its file systems are to go on, until it says that they do, its machine ends, or it takes too
    /// long: an agent that was killed in between is back soon, or never. Others may have their turns between.
    pub(super) fn keep_thawing(self: &Arc<Self>, vsock: &Vsock, port: u32) {
        let until = Instant::now() + AGAIN;
        loop {
            if vsock.ends_by(Instant::now() + PAUSE) {
                return self.pay(vsock);
            }
            let _turn = Turn::take(self);
            if self.owes(vsock).is_none() {
                return;
            }
            match thaw_anew(vsock, port) {
                Ok(count) => {
                    tracing::info!(count, "the file systems of a guest go on after all");
                    return self.pay(vsock);
                }
                Err(e) if until <= Instant::now() => {
                    return tracing::warn!(error = %e, "the file systems of a guest may stand still");
                }
                Err(_) => {}
            }
        }
    }
}

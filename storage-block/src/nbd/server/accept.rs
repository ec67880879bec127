//! The thread that accepts connections and waits for those of theirs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::Shutdown;

use super::connection::Connection;
use super::{Listener, Shared};
use crate::store::lock;

pub(super) fn accept(shared: &Arc<Shared>, listener: &Listener) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    for number in 0.. {
        let accepted = listener.accept();
        if shared.stopping.is_set() {
            break;
        }
        threads.retain(|thread| !thread.is_finished());
        let socket = match accepted {
            Ok(socket) => Arc::new(socket),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
            // Descriptors or memory are short on the host, and may be there again in a moment; the
            // connections that there are go on.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection over NBD");
                std::thread::park_timeout(Duration::from_millis(200));
                continue;
            }
        };
        if threads.len() >= shared.max_connections {
            tracing::warn!("a connection over NBD is one too many");
            continue;
        }
        lock(&shared.sockets).insert(number, Arc::clone(&socket));
        let serve = {
            let shared = Arc::clone(shared);
            move || {
                let _leave = Leave { shared: &shared, number };
                serve(&shared, socket);
            }
        };
        match std::thread::Builder::new().name("nbd-connection".to_owned()).spawn(serve) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                tracing::warn!(%error, "cannot serve a connection over NBD");
                lock(&shared.sockets).remove(&number);
            }
        }
    }
    for socket in lock(&shared.sockets).values() {
        let _ = rustix::net::shutdown(&**socket, Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn serve(shared: &Shared, socket: Arc<OwnedFd>) {
    let mut connection = Connection::new(&shared.exports, socket, &shared.stopping);
    connection.handshake_timeout = shared.handshake;
    #[cfg(feature = "tls")]
    {
        connection.tls = shared.tls.as_ref();
    }
    if let Err(error) = connection.serve() {
        tracing::debug!(%error, "a connection over NBD has ended early");
    }
}

/// Takes a connection off the list, however its thread ends.
struct Leave<'s> {
    shared: &'s Shared,
    number: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if let Some(socket) = lock(&self.shared.sockets).remove(&self.number) {
            let _ = rustix::net::shutdown(&*socket, Shutdown::Both);
        }
    }
}

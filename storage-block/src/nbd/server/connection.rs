//! One client: the handshake, and then requests served by a few threads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::answer::answer;
use super::exports::Exports;
use super::input::{Input, SMALL};
use super::negotiation::{Agreed, Negotiation, Then, Tls};
use super::replies::Replies;
use super::{HANDSHAKE, SENDING};
use crate::limit::Stop;
use crate::nbd::channel::Channel;
use crate::nbd::proto::{self, Command, Request, ask};
use crate::store::lock;

/// Requests of one connection that are served at the same time.
const WORKERS: usize = 4;
/// Replies are sent when they are so many, or so many bytes: who waits for them has something to do meanwhile.
const ENOUGH: (usize, usize) = (8, 64 << 10);
/// A disk that answers small requests in less is as quick as waking a thread to ask it.
const QUICK: Duration = Duration::from_micros(50);

/// A client's connection, and what serves it.
#[derive(Debug)]
pub(in crate::nbd) struct Connection<'s> {
    exports: &'s Exports,
    channel: Channel,
    stopping: &'s Arc<Stop>,
    pub(in crate::nbd) handshake_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    send_timeout: Duration,
    #[cfg(feature = "tls")]
    pub(in crate::nbd) tls: Option<&'s crate::nbd::TlsServer>,
}

impl<'s> Connection<'s> {
    pub(in crate::nbd) fn new(exports: &'s Exports, socket: Arc<OwnedFd>, stopping: &'s Arc<Stop>) -> Self {
        Self {
            exports,
            channel: Channel::new(socket),
            stopping,
            handshake_timeout: HANDSHAKE,
            send_timeout: SENDING,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// Serves the client until it goes, or does what no client may.
    pub(in crate::nbd) fn serve(mut self) -> io::Result<()> {
        self.channel.limit(Instant::now() + self.handshake_timeout);
        let mut agreed = self.handshake();
        if let Ok(Some(agreed)) = &mut agreed {
            agreed.disk = agreed.disk.clone().until(self.stopping);
            self.channel.unlimit(None, Some(self.send_timeout))?;
            let service = Service {
                connection: &self,
                agreed,
                input: Mutex::new(Input::new()),
                sending: Mutex::new(()),
                pace: AtomicU64::new(0),
            };
            service.run();
        }
        self.channel.shut_down();
        agreed.map(drop)
    }

    /// Haggles over options; what the client wants in the end.
    fn handshake(&mut self) -> io::Result<Option<Agreed>> {
        self.channel.send(&proto::greeting(), &[])?;
        let client_flags = u32::from_be_bytes(self.channel.receive_array()?);
        if client_flags & !u32::from(proto::HANDSHAKE_FLAGS) != 0 {
            return Ok(None);
        }
        let zeroes = client_flags & u32::from(proto::NO_ZEROES) == 0;
        let mut negotiation = Negotiation::new(self.exports, self.encryption());
        loop {
            if u64::from_be_bytes(self.channel.receive_array()?) != proto::OPTION_MAGIC {
                return Ok(None);
            }
            let option = u32::from_be_bytes(self.channel.receive_array()?);
            let len = u32::from_be_bytes(self.channel.receive_array()?);
            if len > proto::OPTION_MAX {
                return Ok(None);
            }
            let mut data = vec![0; len as usize];
            self.channel.receive_exact(&mut data)?;
            let answer = negotiation.option(option, &data, zeroes);
            self.channel.send(&answer.bytes, &[])?;
            match answer.then {
                Then::More => {}
                Then::StartTls => {
                    self.start_tls()?;
                    negotiation.encrypted();
                }
                Then::Serve(agreed) => return Ok(Some(agreed)),
                Then::HangUp => return Ok(None),
            }
        }
    }

    #[cfg(feature = "tls")]
    fn encryption(&self) -> Tls {
        if self.tls.is_some() { Tls::Required } else { Tls::Off }
    }

    #[cfg(not(feature = "tls"))]
    fn encryption(&self) -> Tls {
        Tls::Off
    }

    /// What has been received up to here is no more than the client's wish for it, so nothing that was sent
    /// unencrypted is taken for what comes encrypted.
    #[cfg(feature = "tls")]
    fn start_tls(&mut self) -> io::Result<()> {
        let Some(tls) = self.tls else { return Err(io::ErrorKind::Unsupported.into()) };
        self.channel.start_tls(tls.accept()?)
    }

    #[cfg(not(feature = "tls"))]
    fn start_tls(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A connection after the handshake. One thread at a time holds the input. While the disk is quick it keeps it,
/// and answers what has come together with one message; what takes longer it does with the input let go, so that
/// others go on meanwhile.
struct Service<'c> {
    connection: &'c Connection<'c>,
    agreed: &'c Agreed,
    input: Mutex<Input>,
    sending: Mutex<()>,
    /// How many nanoseconds a small request has taken of late.
    pace: AtomicU64,
}

impl Service<'_> {
    fn run(&self) {
        std::thread::scope(|scope| {
            for _ in 1..WORKERS {
                // With fewer threads it is slower and no less right.
                let worker = std::thread::Builder::new().name("nbd-worker".to_owned());
                let _ = worker.spawn_scoped(scope, || self.work());
            }
            self.work();
        });
    }

    fn work(&self) {
        if self.requests().is_err() {
            // Wakes the thread that waits for the next request.
            self.connection.channel.shut_down();
        }
    }

    fn requests(&self) -> io::Result<()> {
        let channel = &self.connection.channel;
        let (mut data, mut replies) = (Replies::default(), Replies::default());
        let mut input = lock(&self.input);
        let mut waiting = 0;
        loop {
            if waiting >= ENOUGH.0 || replies.len() >= ENOUGH.1 || !input.ready() {
                self.send(&mut replies)?;
                waiting = 0;
            }
            let Some(request) = input.next(channel) else { return self.send(&mut replies) };
            if self.at_once(&request) {
                let Some(data) = input.payload(&request, channel) else { return self.send(&mut replies) };
                self.answer(&request, data, &mut replies);
                waiting += 1;
                continue;
            }
            // Nobody waits for this one but who has asked for it.
            self.send(&mut replies)?;
            let came = input.receive_payload(&request, channel, &mut data);
            drop(input);
            if came.is_none() {
                return Ok(());
            }
            self.answer(&request, data.as_slice(), &mut replies);
            data.clear();
            self.send(&mut replies)?;
            input = lock(&self.input);
        }
    }

    /// Whether a request is over before another thread could take the next one.
    fn at_once(&self, request: &Request) -> bool {
        let small = matches!(request.command, Command::Read | Command::Write) && request.len <= SMALL;
        small
            && (request.command == Command::Read || request.flags & ask::FUA == 0)
            && Duration::from_nanos(self.pace.load(Ordering::Relaxed)) < QUICK
    }

    fn answer(&self, request: &Request, data: &[u8], replies: &mut Replies) {
        let begun = Instant::now();
        answer(self.agreed, request, data, self.connection.stopping, replies);
        if matches!(request.command, Command::Read | Command::Write) && request.len <= SMALL {
            // The new one counts for an eighth.
            let (took, pace) = (begun.elapsed().as_nanos() as u64, self.pace.load(Ordering::Relaxed));
            self.pace.store(pace - pace / 8 + took / 8, Ordering::Relaxed);
        }
    }

    fn send(&self, replies: &mut Replies) -> io::Result<()> {
        if replies.len() > 0 {
            let _sending = lock(&self.sending);
            self.connection.channel.send(replies.as_slice(), &[])?;
        }
        replies.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use super::*;
    use crate::MemoryDisk;

    /// A client that asks and asks, and takes no answer.
    #[test]
    fn who_takes_nothing_loses_its_place() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let exports = Exports::default();
            exports.add("", MemoryDisk::new(1 << 20).unwrap().into_disk()).unwrap();
            let stopping = Arc::default();
            let mut connection = Connection::new(&exports, Arc::new(server.into()), &stopping);
            connection.send_timeout = Duration::from_millis(50);
            tell.send(connection.serve()).unwrap();
        });
        client.write_all(&u32::from(proto::HANDSHAKE_FLAGS).to_be_bytes()).unwrap();
        client.write_all(&proto::option(proto::OPT_EXPORT_NAME, &[])).unwrap();
        for handle in 0..16 {
            let request = Request { flags: 0, command: Command::Read, handle, offset: 0, len: 1 << 20 };
            client.write_all(&request.encode()).unwrap();
        }
        let ended = told.recv_timeout(Duration::from_secs(20)).expect("it keeps its place");
        ended.unwrap();
    }
}

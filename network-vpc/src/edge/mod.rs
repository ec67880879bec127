//! Where a network ends: conversations with the world outside, over sockets of the host, and the services that
//! the network has itself.
//!
//! One thread an interface. TCP is spoken with the guest by a stack in user space and with the host's sockets by
//! them; datagrams are passed on as they are.

mod asked;
pub(crate) mod budget;
mod conversation;
mod datagram;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gather;
mod names;
mod pace;
mod pipe;
mod questions;
mod stack;
mod stream;
mod visitors;
mod wire;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use instance_core::net::{ServedStream, StreamServer};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use self::budget::Share;
use self::datagram::Datagrams;
use self::gather::Gather;
use self::stream::Streams;
use self::visitors::Visitors;
use crate::packet::{ETHERNET_LEN, Flow, Transport};
use crate::port::Port;
use crate::routing::Hop;
use crate::switch::{LOCAL_CLIENT, View, is_outside};

/// The token of the waker. Sockets have others.
pub(crate) const WAKE: Token = Token(0);

/// That of the machine's stream, if it is plugged in by one.
const MACHINE: Token = Token(1);

/// How long the thread sleeps at most, so that what is over is noticed.
const SLEEP: Duration = Duration::from_secs(5);

/// Of what a port offers to the world, what the edge has to know.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) listener: Listener,
    pub(crate) entrance: Entrance,
}

/// Where clients come in, and whereto.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entrance {
    /// Where it is listened.
    pub(crate) at: SocketAddr,
    /// The port in the instance.
    pub(crate) port: u16,
    /// The instance's address, where that is not its primary one.
    pub(crate) to: Option<Ipv4Addr>,
}

/// The protocols by which clients come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Carrier {
    Tcp,
    Udp,
}

/// A socket that clients come to.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Listener {
    pub(crate) fn bind(carrier: Carrier, at: SocketAddr) -> io::Result<Self> {
        Ok(match carrier {
            Carrier::Tcp => Self::Tcp(TcpListener::bind(at)?),
            Carrier::Udp => Self::Udp(UdpSocket::bind(at)?),
        })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

/// What the edge may reach.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reach {
    /// Addresses of the host itself, as well.
    pub(crate) host: bool,
    /// The resolver that questions are passed on to.
    pub(crate) resolver: Option<std::net::SocketAddr>,
}

/// The thread of an interface. Dropping it ends it, and with it all conversations.
#[derive(Debug)]
pub(crate) struct Edge {
    port: Arc<Port>,
    over: Arc<AtomicBool>,
    orders: Orders,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told to do.
#[derive(Debug)]
enum Order {
    Listen(Forward),
    /// By where it is listened, and who waits for it to be done.
    Unlisten(Carrier, SocketAddr, SyncSender<()>),
    /// The machine is behind this.
    Serve(ServedStream),
}

/// What waits for the thread to be done, until it has ended.
#[derive(Debug, Clone)]
struct Orders(Arc<Mutex<Option<Vec<Order>>>>);

impl Orders {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Some(Vec::new()))))
    }

    /// With a thread that has ended there is nothing to be done: who waits for it is told so, and what it was to serve is
    /// closed.
    fn give(&self, order: Order) {
        if let Some(orders) = self.lock().as_mut() {
            orders.push(order);
        }
    }

    fn take(&self) -> Vec<Order> {
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn end(&self) {
        let left = self.lock().take();
        drop(left);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Order>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Edge {
    /// Starts the thread of a port whose waker belongs to `poll`.
    pub(crate) fn start(poll: Poll, port: Arc<Port>, reach: Reach, share: Share) -> io::Result<Self> {
        let (over, orders) = (Arc::new(AtomicBool::new(false)), Orders::new());
        let name: String = format!("vpc-{}", port.view().address).chars().take(15).collect();
        let mut worker = Worker {
            streams: Streams::new(&port.view(), reach.clone()),
            datagrams: Datagrams::new(reach, share),
            visitors: Visitors::new(),
            machine: None,
            port: port.clone(),
            over: over.clone(),
            orders: orders.clone(),
            poll,
        };
        let thread = thread::Builder::new().name(name).spawn(move || {
            worker.port.is_served_here();
            if let Err(error) = worker.work() {
                tracing::warn!(%error, "the edge of an interface has ended");
            }
            let orders = worker.orders.clone();
            // Its sockets are closed before anybody is told.
            drop(worker);
            orders.end();
        })?;
        Ok(Self { port, over, orders, thread: Some(thread) })
    }

    pub(crate) fn listen(&self, forward: Forward) {
        // Where the thread has ended nobody listens, and the socket is closed.
        self.order(Order::Listen(forward));
    }

    /// Nobody listens there any more when this returns, but where the thread stands still for longer than one may wait who has the
    /// network's lock.
    pub(crate) fn unlisten(&self, places: impl IntoIterator<Item = (Carrier, SocketAddr)>) {
        let order = |(carrier, at)| {
            let (done, is_done) = sync_channel(1);
            self.order(Order::Unlisten(carrier, at, done));
            is_done
        };
        let all: Vec<_> = places.into_iter().map(order).collect();
        let until = Instant::now() + Duration::from_secs(10);
        for is_done in all {
            // It fails at once where the thread has ended, which listens to nothing.
            let _ = is_done.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
    }

    /// Has the thread serve the stream by which a machine is plugged in.
    pub(crate) fn stream_server(&self) -> StreamServer {
        // Not the port itself, which has the cable's end, which has this.
        let (orders, weak) = (self.orders.clone(), Arc::downgrade(&self.port));
        Arc::new(move |stream| {
            let Some(port) = weak.upgrade() else { return };
            orders.give(Order::Serve(stream));
            port.wake_edge();
        })
    }

    fn order(&self, order: Order) {
        self.orders.give(order);
        self.port.wake_edge();
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.port.wake_edge();
        let thread = self.thread.take().filter(|t| t.thread().id() != thread::current().id());
        let _ = thread.map(JoinHandle::join);
    }
}

struct Worker {
    port: Arc<Port>,
    over: Arc<AtomicBool>,
    orders: Orders,
    poll: Poll,
    machine: Option<ServedStream>,
    streams: Streams,
    datagrams: Datagrams,
    visitors: Visitors,
}

impl Worker {
    fn work(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        let mut gather = Gather::new(Instant::now());
        while !self.over.load(Ordering::Acquire) && self.port.is_plugged() {
            self.take_orders();
            let received = self.serve(ServedStream::receive);
            // What this thread brings about from here on is looked at in the next turn.
            self.port.has_woken_itself();
            self.port.catch_up();
            let registry = self.poll.registry();
            let view = self.port.view();
            let mut came = 0;
            for frame in self.port.take_inbox() {
                let Some(packet) = frame.get(ETHERNET_LEN..) else { continue };
                came += frame.len();
                let Some(flow) = Flow::parse(packet) else { continue };
                match flow.transport {
                    Transport::Tcp { .. } => {
                        self.streams.take(registry, &mut self.datagrams, &view, &flow, frame);
                    }
                    _ if self.visitors.take(&flow, packet) => {}
                    _ => self.datagrams.take(registry, &self.port, &flow, packet),
                }
            }
            let clients = self.streams.work(registry, &mut self.datagrams, &self.port);
            let more = clients | self.datagrams.work(&self.port) | self.visitors.work(&self.port);
            let sent = self.serve(ServedStream::send);
            let sleep = match more | self.port.has_woken_itself() {
                true => Duration::ZERO,
                false => {
                    [self.streams.patience(), received, sent].into_iter().flatten().fold(SLEEP, Duration::min)
                }
            };
            // One that is not behind a stream wakes this thread by a call.
            let pause = self.machine.as_ref().and_then(|_| gather.pause(came, Instant::now()));
            if let Some(pause) = pause.filter(|_| !sleep.is_zero()) {
                thread::sleep(pause);
            }
            match self.poll.poll(&mut events, Some(sleep)) {
                Ok(()) => events.iter().for_each(|event| self.streams.notice(event)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Serves the machine, where it is behind a stream.
    fn serve(&mut self, work: fn(&ServedStream) -> io::Result<Option<Duration>>) -> Option<Duration> {
        work(self.machine.as_ref()?).unwrap_or_else(|error| {
            tracing::debug!(%error, "a machine's stream is over");
            self.machine = None;
            Some(Duration::ZERO)
        })
    }

    /// Begins to serve a machine that is behind a stream.
    fn begin(&mut self, stream: ServedStream) {
        let (port, registry) = (Arc::downgrade(&self.port), self.poll.registry());
        // What this thread sends the machine it writes to the socket before it sleeps.
        let wake = move || {
            let port = port.upgrade().filter(|port| !port.is_edge_thread());
            port.into_iter().for_each(|port| port.wake_edge());
        };
        let both = Interest::READABLE | Interest::WRITABLE;
        let begun = stream.begin(Arc::new(wake), |socket| {
            registry.register(&mut SourceFd(&socket.as_raw_fd()), MACHINE, both)
        });
        match begun {
            Ok(()) => self.machine = Some(stream),
            Err(error) => tracing::warn!(%error, "a machine's stream is not served"),
        }
    }

    fn take_orders(&mut self) {
        for order in self.orders.take() {
            match order {
                Order::Listen(Forward { listener, entrance }) => {
                    let (registry, at) = (self.poll.registry(), entrance.at);
                    let listens = match listener {
                        Listener::Tcp(socket) => self.streams.listen(registry, socket, entrance),
                        Listener::Udp(socket) => self.visitors.listen(registry, socket, entrance),
                    };
                    if let Err(error) = listens {
                        tracing::warn!(%error, %at, "a port that is forwarded is not listened at");
                    }
                }
                Order::Serve(stream) => self.begin(stream),
                Order::Unlisten(carrier, at, done) => {
                    match carrier {
                        Carrier::Tcp => self.streams.unlisten(at),
                        Carrier::Udp => self.visitors.unlisten(at),
                    }
                    // Whoever asked may have lost patience.
                    let _ = done.try_send(());
                }
            }
        }
    }
}

/// Whether an address is one of this host's.
fn is_own(address: Ipv4Addr) -> bool {
    // Only those can be bound to. Of what fails for another reason nobody knows that it is not one of them.
    let bound = UdpSocket::bind((address, 0));
    !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

/// As whom a guest sees a client: as itself, where what the guest answers to that address comes back here.
fn shown_as(view: &View, client: Ipv4Addr, entrance: &Entrance) -> Ipv4Addr {
    let means_another = view.vpc_cidr.contains(&client) || !is_outside(client);
    // At a public address whoever no way leads to has no answer, as in EC2.
    let is_out_of_reach = entrance.to.is_none() && view.routes.hop(client) != Some(Hop::Out);
    if means_another || is_out_of_reach { LOCAL_CLIENT } else { client }
}

impl Reach {
    /// Whether a guest may reach an address outside.
    fn allows(&self, address: Ipv4Addr) -> bool {
        address != LOCAL_CLIENT && (self.host || !is_own(address))
    }
}

/// A token for each socket, none of them twice.
#[derive(Debug)]
struct Tokens(usize);

impl Tokens {
    fn next(&mut self) -> Token {
        self.0 += 3;
        Token(self.0)
    }
}

//! Where a network ends: conversations with the world outside, over sockets of the host, and the services that
//! the network has itself.
//!
//! One thread an interface. TCP is spoken with the guest by a stack in user space and with the host's sockets by
//! them; datagrams are passed on as they are.

mod datagram;
mod names;
mod pipe;
mod stack;
mod stream;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mio::{Events, Poll, Token};

use self::datagram::Datagrams;
use self::stream::Streams;
use crate::packet::{ETHERNET_LEN, Flow, Transport};
use crate::port::Port;
use crate::switch::LOCAL_CLIENT;

/// The token of the waker. Sockets have others.
pub(crate) const WAKE: Token = Token(0);

/// How long the thread sleeps at most, so that what is over is noticed.
const SLEEP: Duration = Duration::from_secs(5);

/// Of what a port offers to the world, what the edge has to know.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) listener: std::net::TcpListener,
    /// Where that listens.
    pub(crate) at: SocketAddr,
    /// The port in the instance.
    pub(crate) port: u16,
    /// The instance's address, where that is not its primary one.
    pub(crate) to: Option<Ipv4Addr>,
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
    orders: Arc<std::sync::Mutex<Vec<Order>>>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told to do.
#[derive(Debug)]
enum Order {
    Listen(Forward),
    /// By where it is listened, and who waits for it to be done.
    Unlisten(SocketAddr, SyncSender<()>),
}

impl Edge {
    /// Starts the thread of a port whose waker belongs to `poll`.
    pub(crate) fn start(poll: Poll, port: Arc<Port>, reach: Reach) -> io::Result<Self> {
        let (over, orders) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let name: String = format!("vpc-{}", port.view().address).chars().take(15).collect();
        let mut worker = Worker {
            streams: Streams::new(&port.view(), reach.clone()),
            datagrams: Datagrams::new(reach),
            port: port.clone(),
            over: over.clone(),
            orders: Arc::clone(&orders),
            poll,
        };
        let thread = thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = worker.work() {
                tracing::warn!(%error, "the edge of an interface has ended");
            }
        })?;
        Ok(Self { port, over, orders, thread: Some(thread) })
    }

    pub(crate) fn listen(&self, forward: Forward) {
        self.order(Order::Listen(forward));
    }

    /// Nobody listens there any more when this returns.
    pub(crate) fn unlisten(&self, at: SocketAddr) {
        let (done, is_done) = sync_channel(1);
        self.order(Order::Unlisten(at, done));
        // A thread that has ended listens to nothing, and does not say so.
        let _ = is_done.recv_timeout(Duration::from_secs(1));
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(order);
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
    orders: Arc<std::sync::Mutex<Vec<Order>>>,
    poll: Poll,
    streams: Streams,
    datagrams: Datagrams,
}

impl Worker {
    fn work(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        while !self.over.load(Ordering::Acquire) && self.port.is_plugged() {
            self.take_orders();
            let registry = self.poll.registry();
            let view = self.port.view();
            for frame in self.port.take_inbox() {
                let Some(packet) = frame.get(ETHERNET_LEN..) else { continue };
                let Some(flow) = Flow::parse(packet) else { continue };
                match flow.transport {
                    Transport::Tcp { .. } => self.streams.take(registry, &view, &flow, frame),
                    _ => self.datagrams.take(registry, &self.port, &flow, packet),
                }
            }
            self.streams.work(registry, &self.port);
            self.datagrams.work(&self.port);
            let sleep = self.streams.patience().map_or(SLEEP, |until| until.min(SLEEP));
            match self.poll.poll(&mut events, Some(sleep)) {
                Ok(()) => events.iter().for_each(|event| self.streams.notice(event)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn take_orders(&mut self) {
        let orders =
            std::mem::take(&mut *self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for order in orders {
            match order {
                Order::Listen(forward) => {
                    let at = forward.at;
                    if let Err(error) = self.streams.listen(self.poll.registry(), forward) {
                        tracing::warn!(%error, %at, "a port that is forwarded is not listened at");
                    }
                }
                Order::Unlisten(at, done) => {
                    self.streams.unlisten(at);
                    // Whoever asked may have lost patience.
                    let _ = done.try_send(());
                }
            }
        }
    }
}

/// Whether an address is one of this host's.
fn is_own(address: Ipv4Addr) -> bool {
    // Only those can be bound to.
    UdpSocket::bind((address, 0)).is_ok()
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
        self.0 += 2;
        Token(self.0)
    }
}

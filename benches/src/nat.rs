//! What a network's way out costs, beside `passt`, which does the same for guests of QEMU's.
//!
//! Both have the same guest: a TCP/IP stack behind a socket on which frames pass as QEMU's `-netdev stream` has them, in
//! packets of 1,500 bytes. It is plugged into ours as `hypervisor-qemu` plugs QEMU in. What the guest speaks with is a
//! server of this process.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use instance_core::net::FrameStream;
use network_vpc::{Network, NetworkOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use crate::samples::{Measurement, Rounds, median_speed};

const PATIENCE: Duration = Duration::from_secs(20);
/// What passes in a turn. Turns are short, as what else the host does changes from one second to the next, and many.
const BULK: usize = 16 << 20;
const ROUNDS: Rounds = Rounds { rounds: 121, batch: 1 };
const CHUNK: usize = 256 << 10;
const MTU: usize = 1500;

/// Which way the bytes go, seen from the guest.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

/// Bytes a second that a guest sends to a server of the host's, as a multiple of what they are through `passt`.
///
/// # Errors
///
/// Where there is no `passt`, or the host has no address but the loopback one.
pub fn nat_out_over_passt() -> anyhow::Result<Measurement> {
    over_passt(Way::Out)
}

/// The same for what the server sends to the guest.
///
/// # Errors
///
/// As [`nat_out_over_passt`].
pub fn nat_in_over_passt() -> anyhow::Result<Measurement> {
    over_passt(Way::In)
}

fn over_passt(way: Way) -> anyhow::Result<Measurement> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::Builder::new().name("server".to_owned()).spawn(move || serve(&listener, way))?;
    let mut ours = Ours::new()?;
    let [mut theirs, mut again] = [Passt::new()?, Passt::new()?];
    let (at_ours, at_theirs) = ((own_address()?, port), (Passt::ROUTER, port));
    median_speed(
        ROUNDS,
        ("network-vpc", &mut || ours.guest.transfer(at_ours, way).context("behind network-vpc")),
        ("passt", &mut || theirs.guest.transfer(at_theirs, way).context("behind passt")),
        ("another passt", &mut || again.guest.transfer(at_theirs, way).context("behind another passt")),
    )
}

/// An address of this host's that is not a loopback one.
fn own_address() -> anyhow::Result<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect("203.0.113.1:9")?;
    match socket.local_addr()? {
        SocketAddr::V4(own) => Ok(*own.ip()),
        SocketAddr::V6(own) => bail!("this host has only {own}"),
    }
}

/// Takes what clients send, or sends them as much, one after the other.
fn serve(listener: &TcpListener, way: Way) -> std::io::Result<()> {
    let mut bytes = vec![b'x'; CHUNK];
    loop {
        let (mut client, _) = listener.accept()?;
        match way {
            Way::Out => {
                let mut left = BULK;
                while left > 0 {
                    match client.read(&mut bytes)? {
                        0 => break,
                        read => left = left.saturating_sub(read),
                    }
                }
                client.write_all(b".")?;
            }
            Way::In => (0..BULK / CHUNK).try_for_each(|_| client.write_all(&bytes))?,
        }
    }
}

/// A guest behind a network of ours.
struct Ours {
    guest: Guest,
    _stream: FrameStream,
    _network: Network,
}

impl Ours {
    fn new() -> anyhow::Result<Self> {
        let network = NetworkOptions::new().reach_host(true).in_memory(&"us-east-1".parse()?)?;
        let interface = network.create_interface(network.interface_spec()?)?;
        let spec = network.plug(interface.id)?;
        let (near, far) = UnixStream::pair()?;
        let stream = FrameStream::plug(far, &spec, "machine")?;
        let address = Ipv4Cidr::new(interface.private_ip, 20);
        let guest = Guest::new(near, interface.mac.0, address, Ipv4Addr::new(172, 31, 0, 1))?;
        Ok(Self { guest, _stream: stream, _network: network })
    }
}

/// A guest behind `passt`.
struct Passt {
    guest: Guest,
    _process: Ended,
    _dir: tempfile::TempDir,
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Passt {
    /// The router, as which it shows a guest the host itself.
    const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        // It may drop to another user before it makes the socket.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let path = dir.path().join("socket");
        let mut passt = Command::new("passt");
        passt.args(["--foreground", "--quiet", "--one-off", "--ipv4-only", "--mtu", &MTU.to_string()]);
        passt.args(["--address", &Self::ADDRESS.to_string(), "--netmask", "24"]);
        passt.args(["--gateway", &Self::ROUTER.to_string(), "--socket"]).arg(&path);
        let process = passt.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = Ended(process.context("cannot run passt; apt-get install passt")?);
        let deadline = Instant::now() + PATIENCE;
        let socket = loop {
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("passt does not listen");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let guest = Guest::new(socket, [6, 0, 0, 0, 0, 9], Ipv4Cidr::new(Self::ADDRESS, 24), Self::ROUTER)?;
        Ok(Self { guest, _process: process, _dir: dir })
    }
}

/// A TCP/IP stack behind a socket.
struct Guest {
    interface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    began: Instant,
    next_port: u16,
}

impl Guest {
    fn new(socket: UnixStream, mac: [u8; 6], address: Ipv4Cidr, router: Ipv4Addr) -> anyhow::Result<Self> {
        socket.set_nonblocking(true)?;
        let chunk = vec![0; CHUNK];
        let mut wire =
            Wire { socket, chunk, received: Vec::new(), inbox: VecDeque::new(), unsent: Vec::new() };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        let mut interface = Interface::new(config, &mut wire, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| _ = addresses.push(IpCidr::Ipv4(address)));
        interface.routes_mut().add_default_ipv4_route(router)?;
        let sockets = SocketSet::new(Vec::new());
        Ok(Self { interface, sockets, wire, began: Instant::now(), next_port: 40_000 })
    }

    /// How long it takes until all has passed, from when the connection is there.
    fn transfer(&mut self, to: (Ipv4Addr, u16), way: Way) -> anyhow::Result<Duration> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 20]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.next_port += 1;
        socket.connect(self.interface.context(), to, self.next_port)?;
        let handle = self.sockets.add(socket);
        self.until(handle, |socket| Ok(socket.may_send()))?;
        let begun = Instant::now();
        let (mut sent, mut heard, bytes) = (0, 0, vec![b'x'; CHUNK]);
        self.until(handle, |socket| {
            let total = match way {
                Way::Out => 1,
                Way::In => BULK,
            };
            if let Way::Out = way {
                while socket.can_send() && sent < BULK {
                    sent += socket.send_slice(&bytes[..CHUNK.min(BULK - sent)])?;
                }
            }
            while socket.can_recv() {
                heard += socket.recv(|bytes| (bytes.len(), bytes.len()))?;
            }
            ensure!(heard >= total || socket.may_recv(), "the connection has ended after {heard} bytes");
            Ok(heard >= total)
        })?;
        let took = begun.elapsed();
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).abort();
        self.work()?;
        self.sockets.remove(handle);
        Ok(took)
    }

    fn until(
        &mut self,
        handle: SocketHandle,
        mut done: impl FnMut(&mut tcp::Socket<'static>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let idle = !self.work()?;
            if done(self.sockets.get_mut(handle))? {
                return Ok(());
            }
            // What was just given to the stack goes out before there is anything to wait for.
            if idle && !self.work()? {
                let mut wanted = PollFlags::IN;
                wanted.set(PollFlags::OUT, !self.wire.unsent.is_empty());
                wait(&mut [PollFd::new(&self.wire.socket, wanted)], Some(5))?;
            }
        }
        bail!("nothing comes any more")
    }

    /// Says whether anything was done.
    fn work(&mut self) -> anyhow::Result<bool> {
        let now = StackInstant::from_micros(i64::try_from(self.began.elapsed().as_micros())?);
        let came = self.wire.receive()?;
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        Ok(self.wire.send()? || came)
    }
}

/// Frames with their lengths before them.
struct Wire {
    socket: UnixStream,
    chunk: Vec<u8>,
    received: Vec<u8>,
    inbox: VecDeque<Vec<u8>>,
    unsent: Vec<u8>,
}

impl Wire {
    fn receive(&mut self) -> anyhow::Result<bool> {
        match self.socket.read(&mut self.chunk) {
            Ok(0) => bail!("the network has gone"),
            Ok(len) => self.received.extend(&self.chunk[..len]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let taken = for_each_frame(&self.received, |frame| self.inbox.push_back(frame.to_vec()));
        self.received.drain(..taken);
        Ok(true)
    }

    fn send(&mut self) -> anyhow::Result<bool> {
        send(&mut self.socket, &mut self.unsent)
    }
}

/// Calls `take` for each frame that is whole. Says how many bytes they are.
fn for_each_frame(bytes: &[u8], mut take: impl FnMut(&[u8])) -> usize {
    let mut rest = bytes;
    while let Some((len, behind)) = rest.split_first_chunk::<4>() {
        let Some((frame, behind)) = behind.split_at_checked(u32::from_be_bytes(*len) as usize) else { break };
        take(frame);
        rest = behind;
    }
    bytes.len() - rest.len()
}

fn send(socket: &mut UnixStream, unsent: &mut Vec<u8>) -> anyhow::Result<bool> {
    let mut any = false;
    while !unsent.is_empty() {
        match socket.write(unsent) {
            Ok(len) => drop(unsent.drain(..len)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e.into()),
        }
        any = true;
    }
    Ok(any)
}

fn wait(fds: &mut [PollFd<'_>], millis: Option<i64>) -> anyhow::Result<()> {
    let time = millis.map(|millis| Timespec { tv_sec: 0, tv_nsec: millis * 1_000_000 });
    match poll(fds, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sender<'_>)> {
        Some((Received(self.inbox.pop_front()?), Sender(&mut self.unsent)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sender<'_>> {
        (self.unsent.len() < CHUNK).then_some(Sender(&mut self.unsent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU + 14;
        capabilities
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sender<'a>(&'a mut Vec<u8>);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.extend((len as u32).to_be_bytes());
        let begin = self.0.len();
        self.0.resize(begin + len, 0);
        f(&mut self.0[begin..])
    }
}

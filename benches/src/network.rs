//! What a network costs: its firewall's rules, its memory of conversations, and the way of a frame through it.
//! Frames go through the switch as a machine's do, from one end of a cable to the end of another; no guest runs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use instance_core::net::{Checksum, Frame, MacAddress, NetPort, Protocol, Segmentation};
use network_vpc::{Direction, Network, NetworkInterface, NetworkOptions, Rule};

use crate::samples::{Measurement, ProcessorTime, Rounds, median_ratio};

/// What is in the table of an interface that has room for a million and as many as begin.
const TRACKED: usize = 1_000_000;
const ROOM: usize = TRACKED / 13 * 16 + 4096;

const RULES: u16 = 100;

const SYN: u8 = 2;
const ACK: u8 = 16;

/// Two interfaces of a subnet, each with the machine's end of its cable.
struct Pair {
    network: Network,
    a: Plugged,
    b: Plugged,
}

struct Plugged {
    interface: NetworkInterface,
    port: NetPort,
}

impl Pair {
    /// Two of which the second lets in what these rules allow.
    fn new(rules: impl IntoIterator<Item = Rule>, tracked: Option<usize>) -> anyhow::Result<Self> {
        let options = NetworkOptions::new();
        let options = match tracked {
            Some(most) => options.tracked_conversations(most),
            None => options,
        };
        let network = options.in_memory(&"us-east-1".parse()?)?;
        let vpc = network.default_vpc()?;
        // A group has 60 rules at most.
        let mut groups = vec![network.create_security_group(vpc, "first", "")?.id];
        for (n, rule) in rules.into_iter().enumerate() {
            if n % 50 == 49 {
                groups.push(network.create_security_group(vpc, &format!("after {n}"), "")?.id);
            }
            network.authorize(*groups.last().context("no group")?, Direction::Ingress, rule)?;
        }
        let plug = |groups: &[_]| {
            let interface =
                network.create_interface(network.interface_spec()?.groups(groups.iter().copied()))?;
            let port = network.plug(interface.id)?.port;
            port.set_takes(instance_core::net::Offloads::ALL);
            anyhow::Ok(Plugged { interface, port })
        };
        let (a, b) = (plug(&groups[..1])?, plug(&groups)?);
        Ok(Self { network, a, b })
    }
}

/// What a segment of TCP says.
#[derive(Clone, Copy)]
struct Segment {
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    flags: u8,
    sequence: u32,
    acknowledged: u32,
}

impl Segment {
    /// A frame with so many bytes, from one machine to another. Its checksums are right.
    fn frame(&self, from: MacAddress, to: MacAddress, payload: usize) -> Frame {
        let length = 40 + payload;
        let mut data = Vec::with_capacity(14 + length);
        data.extend([to.0, from.0].concat());
        data.extend([8, 0, 0x45, 0]);
        data.extend((length as u16).to_be_bytes());
        data.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        data.extend(self.source.0.octets());
        data.extend(self.destination.0.octets());
        let sum = checksum(&data[14..34], 0);
        data[24..26].copy_from_slice(&sum.to_be_bytes());
        data.extend(self.source.1.to_be_bytes());
        data.extend(self.destination.1.to_be_bytes());
        data.extend(self.sequence.to_be_bytes());
        data.extend(self.acknowledged.to_be_bytes());
        data.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        data.resize(14 + length, 0);
        let pseudo = 6 + (20 + payload) as u32;
        let sum = checksum(&data[26..], pseudo);
        data[50..52].copy_from_slice(&sum.to_be_bytes());
        let mut frame = Frame::new(data);
        // What is longer than a packet may be is several, cut by whom it comes to.
        if payload > usize::from(SEGMENT) {
            frame.checksum = Checksum::Partial { start: 34, offset: 16 };
            frame.segmentation =
                Some(Segmentation { protocol: Protocol::Tcp4, size: SEGMENT, header_len: 54 });
        }
        frame
    }
}

/// The most bytes of a segment in a packet of a VPC's.
const SEGMENT: u16 = 1460;

/// The Internet's (RFC 1071).
fn checksum(bytes: &[u8], begin: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.fold(begin, |sum, word| sum + word);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// Sends a frame and says whether it arrived.
fn passes(from: &NetPort, to: &NetPort, frame: Frame) -> anyhow::Result<bool> {
    from.send(frame)?;
    Ok(to.recv().is_some())
}

/// Begins a conversation between a port of `a` and one of `b`, all three steps of it.
fn begin(pair: &Pair, source: u16, destination: u16, arrive: bool) -> anyhow::Result<()> {
    let (a, b) = (&pair.a, &pair.b);
    let (from, to) = ((a.interface.private_ip, source), (b.interface.private_ip, destination));
    let step = |back: bool, flags, sequence, acknowledged| {
        let (source, destination) = if back { (to, from) } else { (from, to) };
        let segment = Segment { source, destination, flags, sequence, acknowledged };
        let (sender, receiver) = if back { (b, a) } else { (a, b) };
        let frame = segment.frame(sender.interface.mac, receiver.interface.mac, 0);
        ensure!(passes(&sender.port, &receiver.port, frame)? == arrive, "a frame took another way");
        anyhow::Ok(())
    };
    step(false, SYN, 100, 0)?;
    if arrive {
        step(true, SYN | ACK, 900, 101)?;
        step(false, ACK, 101, 901)?;
    }
    Ok(())
}

/// The processor's time for frames of a conversation, one after the other, from `a` to `b`.
fn pump(pair: &Pair, destination: u16, payload: usize, frames: usize) -> anyhow::Result<Duration> {
    let segment = Segment {
        source: (pair.a.interface.private_ip, 5000),
        destination: (pair.b.interface.private_ip, destination),
        flags: ACK,
        sequence: 101,
        acknowledged: 901,
    };
    let frame = segment.frame(pair.a.interface.mac, pair.b.interface.mac, payload);
    let time = ProcessorTime::of_thread();
    for _ in 0..frames {
        ensure!(passes(&pair.a.port, &pair.b.port, frame.clone())?, "a frame was lost");
    }
    Ok(time.elapsed())
}

/// Frames a second of a conversation that goes on where the last of 100 rules allows them, as a share of those with no rule for
/// what comes in.
///
/// # Errors
///
/// Where a network cannot be made.
pub fn firewall_100_rules_over_0() -> anyhow::Result<Measurement> {
    let open = Pair::new([Rule::tcp(80, "172.31.0.0/16".parse()?)], None)?;
    let rules = (0..RULES - 1).map(|n| Rule::tcp(1000 + n, Ipv4Addr::new(198, 51, 100, n as u8).into()));
    let ruled = Pair::new(rules.chain([Rule::tcp(80, "172.31.0.0/16".parse()?)]), None)?;
    for pair in [&open, &ruled] {
        begin(pair, 5000, 80, true)?;
    }
    // What has begun by it goes on without it.
    for group in &open.b.interface.groups {
        for rule in open.network.security_group(*group)?.ingress.keys() {
            open.network.revoke(*group, *rule)?;
        }
    }
    median_ratio(
        Rounds { rounds: 101, batch: 1 },
        ("no rule", &mut || pump(&open, 80, 1000, 10_000)),
        ("100 rules", &mut || pump(&ruled, 80, 1000, 10_000)),
    )
}

/// The same where each frame begins a conversation, so that all rules are asked for it. Without any rule none would pass: what it
/// is compared with is one.
///
/// # Errors
///
/// As [`firewall_100_rules_over_0`].
pub fn firewall_100_rules_over_0_beginning() -> anyhow::Result<Measurement> {
    let open = Pair::new([Rule::tcp(80, "172.31.0.0/16".parse()?)], None)?;
    let rules = (0..RULES - 1).map(|n| Rule::tcp(1000 + n, Ipv4Addr::new(198, 51, 100, n as u8).into()));
    let ruled = Pair::new(rules.chain([Rule::tcp(80, "172.31.0.0/16".parse()?)]), None)?;
    let beginnings = |pair: &Pair| {
        let time = ProcessorTime::of_thread();
        let (source, to) = (pair.a.interface.private_ip, pair.b.interface.private_ip);
        for n in 0..10_000u16 {
            let (source, destination) = ((source, 6000 + n), (to, 80));
            let segment = Segment { source, destination, flags: SYN, sequence: 1, acknowledged: 0 };
            let frame = segment.frame(pair.a.interface.mac, pair.b.interface.mac, 0);
            ensure!(passes(&pair.a.port, &pair.b.port, frame)?, "a frame was lost");
        }
        Ok(time.elapsed())
    };
    median_ratio(
        Rounds { rounds: 101, batch: 1 },
        ("one rule", &mut || beginnings(&open)),
        ("100 rules", &mut || beginnings(&ruled)),
    )
}

/// MiB that this process grows by where an interface, and the one it speaks with, remember a million conversations
/// each: half of the growth.
///
/// # Errors
///
/// Where a network cannot be made, or does not remember them.
pub fn tracked_1000000() -> anyhow::Result<Measurement> {
    let (pair, grown) = tracked_million()?;
    let tracked = pair.network.tracked_conversations(pair.b.interface.id);
    ensure!(tracked >= TRACKED, "{tracked} are remembered");
    Ok(Measurement { value: grown, noise: None, samples: BTreeMap::from([("MiB".to_owned(), vec![grown])]) })
}

/// How many of a million established conversations are gone after a flood of a million SYNs, each of which the
/// instance answered.
///
/// # Errors
///
/// As [`tracked_1000000`].
pub fn established_lost_to_flood() -> anyhow::Result<Measurement> {
    let (pair, _) = tracked_million()?;
    let (a, b) = (pair.a.interface.private_ip, pair.b.interface.private_ip);
    let mut lost = 0.0;
    for n in 0..TRACKED {
        // Ports that the established ones do not have.
        let (from, to) = ((a, (n % 64_000) as u16), (b, 1000 + (n / 64_000) as u16));
        let syn = Segment { source: from, destination: to, flags: SYN, sequence: 7, acknowledged: 0 };
        let answer =
            Segment { source: to, destination: from, flags: SYN | ACK, sequence: 8, acknowledged: 8 };
        let syn = syn.frame(pair.a.interface.mac, pair.b.interface.mac, 0);
        ensure!(passes(&pair.a.port, &pair.b.port, syn)?, "a SYN was lost");
        let answer = answer.frame(pair.b.interface.mac, pair.a.interface.mac, 0);
        ensure!(passes(&pair.b.port, &pair.a.port, answer)?, "an answer was lost");
    }
    // What is left goes on without a rule.
    let group = pair.network.security_group(pair.b.interface.groups[0])?;
    for rule in group.ingress.keys().chain(group.egress.keys()) {
        pair.network.revoke(group.id, *rule)?;
    }
    for n in 0..TRACKED {
        let (source, destination) = established(n);
        let (from, to) = ((a, source), (b, destination));
        let data = Segment { source: to, destination: from, flags: ACK, sequence: 901, acknowledged: 101 };
        let data = data.frame(pair.b.interface.mac, pair.a.interface.mac, 0);
        lost += f64::from(u8::from(!passes(&pair.b.port, &pair.a.port, data)?));
    }
    Ok(Measurement { value: lost, noise: None, samples: BTreeMap::new() })
}

/// The ports of one of the million.
fn established(n: usize) -> (u16, u16) {
    ((n % 50_000) as u16, 100 + (n / 50_000) as u16)
}

/// Two interfaces that have a million conversations, and the MiB that each takes.
fn tracked_million() -> anyhow::Result<(Pair, f64)> {
    let pair = Pair::new([Rule::tcp(0, "172.31.0.0/16".parse()?)].map(every_port), Some(ROOM))?;
    let before = resident()?;
    for n in 0..TRACKED {
        let (source, destination) = established(n);
        begin(&pair, source, destination, true)?;
    }
    let grown = resident()?.saturating_sub(before);
    Ok((pair, grown as f64 / 2.0 / f64::from(1 << 20)))
}

fn every_port(mut rule: Rule) -> Rule {
    rule.ports = network_vpc::Ports::All;
    rule
}

/// Bytes of this process that are in memory (proc_pid_statm(5)).
fn resident() -> anyhow::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).context("statm has one word")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// Bytes a second from one cable to another in frames of 64 KiB, as machines that leave segmentation to others send
/// them, as a multiple of TCP's over the host's loopback; time is the processor's of all threads.
///
/// # Errors
///
/// As [`firewall_100_rules_over_0`].
pub fn switch_over_loopback() -> anyhow::Result<Measurement> {
    const PAYLOAD: usize = 60_000;
    const FRAMES: usize = 2_000;
    let pair = Pair::new([Rule::tcp(80, "172.31.0.0/16".parse()?)], None)?;
    begin(&pair, 5000, 80, true)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    let mut loopback = || {
        let time = ProcessorTime::of_process();
        std::thread::scope(|scope| {
            let sent = scope.spawn(|| {
                let bytes = vec![0; PAYLOAD];
                (0..FRAMES).try_for_each(|_| sender.write_all(&bytes))
            });
            let mut bytes = vec![0; PAYLOAD];
            for _ in 0..FRAMES {
                receiver.read_exact(&mut bytes)?;
            }
            sent.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            Ok(time.elapsed())
        })
    };
    median_ratio(
        Rounds { rounds: 21, batch: 1 },
        ("loopback", &mut loopback),
        ("switch", &mut || pump(&pair, 80, PAYLOAD, FRAMES)),
    )
}

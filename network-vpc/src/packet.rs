//! What a frame says, as far as a network has to know it. Nothing is trusted: what is not sound is none.

use std::net::Ipv4Addr;

use instance_core::net::{Checksum, Frame, MacAddress, Protocol};
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket,
};

/// The bytes of an Ethernet header.
pub(crate) const ETHERNET_LEN: usize = 14;

/// A frame's addresses and what it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ethernet {
    pub(crate) source: MacAddress,
    pub(crate) destination: MacAddress,
    pub(crate) carries: Carries,
}

/// The protocols that the network knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carries {
    Arp,
    Ipv4,
    Other,
}

impl Ethernet {
    pub(crate) fn parse(frame: &[u8]) -> Option<Self> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        let carries = match frame.ethertype() {
            EthernetProtocol::Arp => Carries::Arp,
            EthernetProtocol::Ipv4 => Carries::Ipv4,
            _ => Carries::Other,
        };
        let (source, destination) = (MacAddress(frame.src_addr().0), MacAddress(frame.dst_addr().0));
        Some(Self { source, destination, carries })
    }
}

/// What an IPv4 packet is, for whoever lets it pass or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) transport: Transport,
}

/// The transport protocol, with what tells its conversations apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp {
        source: u16,
        destination: u16,
        flags: TcpFlags,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    Icmp {
        kind: u8,
        code: u8,
        id: u16,
    },
    /// Another, by its number.
    Other(u8),
}

/// What of a segment begins and ends a conversation, and the numbers that show who may say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct TcpFlags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    /// Of the first byte sent, and of the next one that is waited for.
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
}

impl TcpFlags {
    /// Whether a conversation begins with it.
    pub(crate) fn begins(&self) -> bool {
        self.syn && !self.ack && !self.rst
    }
}

/// A packet of IPv4 whose lengths are true, that of its header too, which `smoltcp` takes at its word.
pub(crate) fn sound_ipv4(packet: &[u8]) -> Option<Ipv4Packet<&[u8]>> {
    const SHORTEST: u8 = 20;
    Ipv4Packet::new_checked(packet).ok().filter(|ip| ip.version() == 4 && ip.header_len() >= SHORTEST)
}

/// ICMP's echo request and reply.
pub(crate) const ECHO: u8 = 8;
pub(crate) const ECHO_REPLY: u8 = 0;

impl Flow {
    /// Of an IPv4 packet. None of one that is not sound or is a fragment: those have no ports to tell by.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let ip = sound_ipv4(packet).filter(|ip| !ip.more_frags() && ip.frag_offset() == 0)?;
        let transport = Transport::parse(ip.next_header(), ip.payload())?;
        Some(Self { source: ip.src_addr(), destination: ip.dst_addr(), transport })
    }

    /// What an ICMP error says of the packet that it is about: one that the error's receiver has sent.
    pub(crate) fn parse_error(packet: &[u8]) -> Option<Self> {
        const UNREACHABLE: u8 = 3;
        const TIME_EXCEEDED: u8 = 11;
        const PARAMETER_PROBLEM: u8 = 12;
        const HEADER_LEN: usize = 8;
        let ip = sound_ipv4(packet)?;
        if ip.next_header() != IpProtocol::Icmp {
            return None;
        }
        let (&kind, quoted) = (ip.payload().first()?, ip.payload().get(HEADER_LEN..)?);
        if ![UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM].contains(&kind) {
            return None;
        }
        // Of the packet that it quotes there may be no more than the ports.
        let receiver = ip.dst_addr();
        let quoted = Ipv4Packet::new_unchecked(quoted);
        let bytes = quoted.as_ref();
        let header_len = usize::from(bytes.first()? & 0xf) * 4;
        let ports = bytes.get(header_len.max(20)..)?.first_chunk::<8>()?;
        if quoted.version() != 4 || quoted.frag_offset() != 0 || quoted.src_addr() != receiver {
            return None;
        }
        let [s0, s1, d0, d1, i0, i1, ..] = *ports;
        let (source, destination) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
        let transport = match quoted.next_header() {
            IpProtocol::Tcp => Transport::Tcp { source, destination, flags: TcpFlags::default() },
            IpProtocol::Udp => Transport::Udp { source, destination },
            IpProtocol::Icmp => Transport::Icmp { kind: s0, code: s1, id: u16::from_be_bytes([i0, i1]) },
            _ => return None,
        };
        Some(Self { source: quoted.src_addr(), destination: quoted.dst_addr(), transport })
    }
}

/// Whether what the sender of a frame of IPv4 has left to be done to it is what its own headers call for. Anything else
/// would be written where the firewall has looked already, such as over the port that it has let pass.
pub(crate) fn leaves_its_own(frame: &Frame) -> bool {
    const OF_UDP: u16 = 6;
    const OF_TCP: u16 = 16;
    let Checksum::Partial { start, offset } = frame.checksum else { return frame.segmentation.is_none() };
    let Some(ip) = frame.data.get(ETHERNET_LEN..).and_then(sound_ipv4) else { return false };
    let transport = ETHERNET_LEN + usize::from(ip.header_len());
    let (field, header_len) = match ip.next_header() {
        IpProtocol::Udp => (OF_UDP, None),
        IpProtocol::Tcp => {
            let header_len =
                TcpPacket::new_checked(ip.payload()).ok().map(|tcp| usize::from(tcp.header_len()));
            (OF_TCP, header_len)
        }
        _ => return false,
    };
    let cut_is_its_own = frame.segmentation.is_none_or(|cut| {
        cut.protocol == Protocol::Tcp4
            && header_len.is_some_and(|len| usize::from(cut.header_len) == transport + len)
    });
    usize::from(start) == transport && offset == field && cut_is_its_own
}

impl Transport {
    fn parse(protocol: IpProtocol, payload: &[u8]) -> Option<Self> {
        Some(match protocol {
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(payload).ok()?;
                let flags = TcpFlags {
                    syn: tcp.syn(),
                    ack: tcp.ack(),
                    fin: tcp.fin(),
                    rst: tcp.rst(),
                    // The bits of a number that may have every value.
                    sequence: tcp.seq_number().0 as u32,
                    acknowledged: tcp.ack_number().0 as u32,
                };
                Self::Tcp { source: tcp.src_port(), destination: tcp.dst_port(), flags }
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(payload).ok()?;
                Self::Udp { source: udp.src_port(), destination: udp.dst_port() }
            }
            IpProtocol::Icmp => {
                Icmpv4Packet::new_checked(payload).ok()?;
                let [kind, code, _, _, i0, i1] = *payload.first_chunk()?;
                let id = if [ECHO, ECHO_REPLY].contains(&kind) { u16::from_be_bytes([i0, i1]) } else { 0 };
                Self::Icmp { kind, code, id }
            }
            other => Self::Other(other.into()),
        })
    }

    /// The protocol's number (IANA, "Assigned Internet Protocol Numbers").
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Icmp { .. } => 1,
            Self::Tcp { .. } => 6,
            Self::Udp { .. } => 17,
            Self::Other(number) => number,
        }
    }
}

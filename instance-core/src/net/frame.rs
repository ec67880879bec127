//! What passes through a cable.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet frame without its check sequence, and what its sender has left to be done to it.
///
/// ```
/// use instance_core::net::{Checksum, Frame};
///
/// // A UDP datagram over IPv4 whose checksum is still to be computed from byte 34 on.
/// let mut frame = Frame::new(vec![0; 60]);
/// frame.checksum = Checksum::Partial { start: 34, offset: 6 };
/// assert!(frame.is_sound());
/// frame.checksum = Checksum::Partial { start: 58, offset: 6 };
/// assert!(!frame.is_sound());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Frame {
    /// The bytes, from the destination's address on.
    pub data: Vec<u8>,
    /// How it is with the checksum of its transport protocol.
    pub checksum: Checksum,
    /// How it is to be cut where it is longer than a packet may be.
    pub segmentation: Option<Segmentation>,
}

impl Frame {
    /// The most bytes of a frame: an IP packet of the longest kind, with a VLAN tag.
    pub const MAX_LEN: usize = 65_535 + 18;

    /// A frame that is complete.
    pub fn new(data: Vec<u8>) -> Self {
        Self { data, ..Self::default() }
    }

    /// Whether the frame is no longer than [`MAX_LEN`](Self::MAX_LEN), and what is to be done lies inside it.
    pub fn is_sound(&self) -> bool {
        let checksum = match self.checksum {
            Checksum::Partial { start, offset } => {
                usize::from(start) + usize::from(offset) + 2 <= self.data.len()
            }
            Checksum::Complete | Checksum::Verified => true,
        };
        let segments = match self.segmentation {
            Some(cut) => cut.size > 0 && usize::from(cut.header_len) < self.data.len(),
            None => true,
        };
        checksum && segments && self.data.len() <= Self::MAX_LEN
    }

    /// Whether an end that takes these offloads takes this frame.
    pub fn is_taken_by(&self, takes: Offloads) -> bool {
        let checksum = !matches!(self.checksum, Checksum::Partial { .. }) || takes.checksum;
        checksum
            && self.segmentation.is_none_or(|cut| match cut.protocol {
                Protocol::Tcp4 => takes.tcp4,
                Protocol::Tcp6 => takes.tcp6,
            })
    }
}

/// How it is with a frame's transport checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// It is in the frame, if the protocol has one, and nobody has looked whether it is right.
    #[default]
    Complete,
    /// It is in the frame or was, and is known to be right.
    Verified,
    /// The field holds the sum of the pseudo-header; the rest is to be added (virtio 1.2, 5.1.6.2).
    Partial {
        /// The byte of the frame from which on it is computed.
        start: u16,
        /// How far behind that byte the field is.
        offset: u16,
    },
}

/// How a frame that is longer than a packet may be is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segmentation {
    /// What it is made of.
    pub protocol: Protocol,
    /// How many bytes each packet carries behind its headers: the maximum segment size.
    pub size: u16,
    /// How long the headers are, from the frame's first byte on.
    pub header_len: u16,
}

impl Segmentation {
    /// That of a frame whose TCP header begins at `start`. How long its headers are is seen in them: who says so besides
    /// gives a hint, or lies. Where there is no header the frame is not [sound](Frame::is_sound).
    ///
    /// ```
    /// use instance_core::net::{Protocol, Segmentation};
    ///
    /// let mut frame = [0; 3000];
    /// frame[34 + 12] = 0x80; // eight words
    /// assert_eq!(Segmentation::of_tcp(&frame, 34, Protocol::Tcp4, 1448).header_len, 66);
    /// ```
    pub fn of_tcp(frame: &[u8], start: u16, protocol: Protocol, size: u16) -> Self {
        const DATA_OFFSET: usize = 12;
        let offset = frame.get(usize::from(start) + DATA_OFFSET).map_or(u8::MAX, |byte| byte >> 4);
        Self { protocol, size, header_len: start.saturating_add(u16::from(offset) * 4) }
    }
}

/// The protocols whose packets can be left to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// What an end takes that a complete frame is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Offloads {
    /// Frames with a [partial checksum](Checksum::Partial).
    pub checksum: bool,
    /// Long frames of TCP over IPv4.
    pub tcp4: bool,
    /// Long frames of TCP over IPv6.
    pub tcp6: bool,
}

impl Offloads {
    /// None.
    pub const NONE: Self = Self { checksum: false, tcp4: false, tcp6: false };
    /// All that there are.
    pub const ALL: Self = Self { checksum: true, tcp4: true, tcp6: true };
}

/// An Ethernet address.
///
/// ```
/// use instance_core::net::MacAddress;
///
/// let mac: MacAddress = "02:00:0a:00:00:0c".parse()?;
/// assert_eq!(mac.to_string(), "02:00:0a:00:00:0c");
/// assert!(mac.is_unicast() && mac.is_local());
/// assert!(!MacAddress::BROADCAST.is_unicast());
/// assert!("02:00:0a:00:00".parse::<MacAddress>().is_err());
/// # Ok::<(), instance_core::net::InvalidMacAddress>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations of a network.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it is one station's.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }

    /// Whether it is given by whoever runs the network, not by a maker of cards.
    pub fn is_local(self) -> bool {
        self.0[0] & 2 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = InvalidMacAddress;

    fn try_from(text: String) -> Result<Self, InvalidMacAddress> {
        text.parse()
    }
}

impl FromStr for MacAddress {
    type Err = InvalidMacAddress;

    fn from_str(text: &str) -> Result<Self, InvalidMacAddress> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or(InvalidMacAddress)?;
        }
        if parts.next().is_some() { Err(InvalidMacAddress) } else { Ok(Self(bytes)) }
    }
}

/// That a text is no Ethernet address: six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidMacAddress;

impl fmt::Display for InvalidMacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no Ethernet address, which is like 02:00:0a:00:00:0c")
    }
}

impl std::error::Error for InvalidMacAddress {}

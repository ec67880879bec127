//! As much of ARP (RFC 826) and ICMP (RFC 792) as it takes to ping.

use std::net::Ipv4Addr;

use crate::net::MacAddress;

/// The shortest frame, without its check sequence: what is shorter is filled up.
const SHORTEST: usize = 60;
const ETHERNET_LEN: usize = 14;
const IP_LEN: usize = 20;
const ICMP_LEN: usize = 8;

const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ICMP: u8 = 1;

/// Who sends and receives on a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Station {
    pub(crate) mac: MacAddress,
    pub(crate) address: Ipv4Addr,
}

impl Station {
    /// A question for the hardware address of `address`.
    pub(crate) fn who_has(self, address: Ipv4Addr) -> Vec<u8> {
        self.arp(ARP_REQUEST, MacAddress::BROADCAST, MacAddress([0; 6]), address)
    }

    fn arp(self, what: [u8; 8], to: MacAddress, target: MacAddress, address: Ipv4Addr) -> Vec<u8> {
        let mut frame = [&to.0[..], &self.mac.0, &ARP, &what, &self.mac.0, &self.address.octets()].concat();
        frame.extend([&target.0[..], &address.octets()].concat());
        frame.resize(SHORTEST, 0);
        frame
    }

    /// A ping to `to` with these bytes.
    pub(crate) fn ping(self, to: Self, bytes: &[u8]) -> Vec<u8> {
        let len = (IP_LEN + ICMP_LEN + bytes.len()) as u16;
        let mut ip = [&[0x45, 0][..], &len.to_be_bytes(), &[0, 0, 0x40, 0, 64, ICMP, 0, 0]].concat();
        ip.extend([self.address.octets(), to.address.octets()].concat());
        let checksum = checksum(&ip);
        ip[10..12].copy_from_slice(&checksum);
        let mut icmp = [&[ECHO, 0, 0, 0, 0x12, 0x34, 0, 1][..], bytes].concat();
        let checksum = self::checksum(&icmp);
        icmp[2..4].copy_from_slice(&checksum);
        let mut frame = [&to.mac.0[..], &self.mac.0, &IPV4, &ip, &icmp].concat();
        frame.resize(frame.len().max(SHORTEST), 0);
        frame
    }

    /// What this station says to a frame: the answer to a question for its address or to a ping.
    pub(crate) fn answer(self, frame: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = frame.split_first_chunk::<ETHERNET_LEN>()?;
        let (from, kind) = (MacAddress(*header[6..].first_chunk()?), *header[12..].first_chunk::<2>()?);
        if kind == ARP {
            let asked = rest.starts_with(&ARP_REQUEST) && rest.get(24..28)? == self.address.octets();
            let sender = *rest.get(14..18)?.first_chunk::<4>()?;
            return asked.then(|| self.arp(ARP_REPLY, from, from, sender.into()));
        }
        let bytes = echoed(frame, self, ECHO)?;
        let sender = *rest.get(12..16)?.first_chunk::<4>()?;
        let mut reply = self.ping(Self { mac: from, address: sender.into() }, bytes);
        // Request and reply differ in their type alone.
        let icmp = ETHERNET_LEN + IP_LEN;
        let end = icmp + ICMP_LEN + bytes.len();
        reply[icmp] = ECHO_REPLY;
        reply[icmp + 2..icmp + 4].fill(0);
        reply[icmp + 4..icmp + 8].copy_from_slice(&frame[icmp + 4..icmp + 8]);
        let checksum = checksum(&reply[icmp..end]);
        reply[icmp + 2..icmp + 4].copy_from_slice(&checksum);
        Some(reply)
    }

    /// The bytes of the reply to a ping, if a frame is one to this station.
    pub(crate) fn reply(self, frame: &[u8]) -> Option<&[u8]> {
        echoed(frame, self, ECHO_REPLY)
    }
}

/// The bytes of a ping or its reply to `to`, whose checksums are right.
fn echoed(frame: &[u8], to: Station, kind: u8) -> Option<&[u8]> {
    let (header, ip) = frame.split_first_chunk::<ETHERNET_LEN>()?;
    let len = usize::from(u16::from_be_bytes(*ip.get(2..4)?.first_chunk()?));
    let (ip_header, icmp) = ip.get(..len)?.split_at_checked(IP_LEN)?;
    let is_it = header[..6] == to.mac.0
        && header[12..] == IPV4
        && (ip_header[0], ip_header[9]) == (0x45, ICMP)
        && ip_header[16..] == to.address.octets()
        && icmp.first() == Some(&kind)
        && checksum(ip_header) == [0, 0]
        && checksum(icmp) == [0, 0];
    icmp.get(ICMP_LEN..).filter(|_| is_it)
}

/// The Internet checksum (RFC 1071); zero of what contains its own.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let sum: u32 = bytes.chunks(2).map(word).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_understand_each_other() {
        let one = Station { mac: MacAddress([2, 0, 0, 0, 0, 1]), address: Ipv4Addr::new(10, 0, 0, 1) };
        let other = Station { mac: MacAddress([2, 0, 0, 0, 0, 2]), address: Ipv4Addr::new(10, 0, 0, 2) };
        let told = other.answer(&one.who_has(other.address)).unwrap();
        assert_eq!(
            (&told[..6], &told[22..28], &told[28..32]),
            (&one.mac.0[..], &other.mac.0[..], &[10, 0, 0, 2][..])
        );
        assert_eq!(other.answer(&one.who_has(one.address)), None);
        for len in [0, 1, 18, 19, 1472] {
            let bytes = vec![7; len];
            let reply = other.answer(&one.ping(other, &bytes)).unwrap();
            assert_eq!(one.reply(&reply), Some(&bytes[..]));
            let mut broken = reply.clone();
            broken[38] ^= 1;
            assert_eq!(one.reply(&broken), None);
        }
    }
}

//! The names that a VPC has itself: of its instances, by their addresses (VPC User Guide, "DNS attributes").

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::switch::View;

/// For how long an answer may be kept, in seconds: as long as EC2 says.
const TTL: u32 = 60;

/// The name of the instance with an address, without its domain: `ip-10-0-0-12`.
pub(crate) fn host_name(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("ip-{a}-{b}-{c}-{d}")
}

/// The answer to a question about the VPC itself. None of one about others, which is to be passed on.
pub(crate) fn answer(view: &View, question: &[u8]) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    if question.message_type() != MessageType::Query || question.op_code() != OpCode::Query {
        return None;
    }
    let [query] = question.queries() else { return None };
    if query.query_class() != DNSClass::IN {
        return None;
    }
    let domain = Name::from_ascii(&view.domain).ok()?;
    let name = query.name();
    let (known, records) = if domain.zone_of(name) {
        let address = address_of(name, &domain).filter(|address| view.vpc_cidr.contains(address));
        let asked = [RecordType::A, RecordType::ANY].contains(&query.query_type());
        (address.is_some(), address.filter(|_| asked).map(|address| RData::A(A(address))))
    } else {
        let address = name.parse_arpa_name().ok()?;
        let std::net::IpAddr::V4(address) = address.addr() else { return None };
        if !view.vpc_cidr.contains(&address) {
            return None;
        }
        let target =
            Name::from_ascii(host_name(address)).and_then(|host| host.append_domain(&domain)).ok()?;
        let asked = [RecordType::PTR, RecordType::ANY].contains(&query.query_type());
        (true, asked.then_some(RData::PTR(PTR(target))))
    };
    let mut reply = Message::new();
    reply
        .set_id(question.id())
        .set_message_type(MessageType::Response)
        .set_op_code(OpCode::Query)
        .set_recursion_desired(question.recursion_desired())
        .set_recursion_available(true)
        .set_authoritative(true)
        .set_response_code(if known { ResponseCode::NoError } else { ResponseCode::NXDomain })
        .add_query(query.clone());
    if let Some(data) = records {
        reply.add_answer(Record::from_rdata(name.clone(), TTL, data));
    }
    reply.to_vec().ok()
}

/// The address in a name such as `ip-10-0-0-12` of the domain.
fn address_of(name: &Name, domain: &Name) -> Option<Ipv4Addr> {
    if name.num_labels() != domain.num_labels() + 1 {
        return None;
    }
    let label = std::str::from_utf8(name.iter().next()?).ok()?.to_ascii_lowercase();
    let address: Ipv4Addr = label.strip_prefix("ip-")?.replace('-', ".").parse().ok()?;
    // Each address has one name.
    (host_name(address) == label).then_some(address)
}

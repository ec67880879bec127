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
        // The domain itself is there, and has nothing.
        let is_domain = name.iter().count() == domain.iter().count();
        (address.is_some() || is_domain, address.filter(|_| asked).map(|address| RData::A(A(address))))
    } else {
        // A name of a part of an address is that of a zone.
        let address = name.parse_arpa_name().ok().filter(|address| address.prefix_len() == 32)?;
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

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;

    use super::*;

    #[test]
    fn zones_are_not_taken_for_instances() {
        let view = crate::fuzzing::view().unwrap();
        let check = |name: &str, kind, expect: Option<(ResponseCode, usize)>| {
            let mut question = Message::new();
            question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
            let answer = answer(&view, &question.to_vec().unwrap());
            let answer = answer.map(|answer| Message::from_vec(&answer).unwrap());
            let said = answer.map(|answer| (answer.response_code(), answer.answers().len()));
            assert_eq!(said, expect, "{name} {kind}");
        };
        let (there, none, unknown) = (
            Some((ResponseCode::NoError, 1)),
            Some((ResponseCode::NoError, 0)),
            Some((ResponseCode::NXDomain, 0)),
        );
        check("12.0.0.10.in-addr.arpa.", RecordType::PTR, there);
        check("12.0.0.10.in-addr.arpa.", RecordType::A, none);
        check("0.0.10.in-addr.arpa.", RecordType::PTR, None);
        check("0.10.in-addr.arpa.", RecordType::SOA, None);
        check("12.0.1.11.in-addr.arpa.", RecordType::PTR, None);
        check("ip-10-0-0-12.ec2.internal.", RecordType::A, there);
        check("ec2.internal.", RecordType::A, none);
        check("EC2.internal.", RecordType::ANY, none);
        check("other.ec2.internal.", RecordType::A, unknown);
    }
}

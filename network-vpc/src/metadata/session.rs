//! A connection to the metadata service: HTTP/1.1 requests in, answers out, as a function of bytes.

use std::sync::Arc;

use instance_core::HttpTokens;
use percent_encoding::percent_decode_str;

use super::tree::{self, Found};
use super::{Metadata, Secret};
use crate::switch::View;

/// The most bytes of a request, and of its headers the most lines.
const LONGEST: usize = 16 << 10;
const HEADERS: usize = 64;

const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

/// What an answer is made of.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) view: Arc<View>,
    /// None of an interface of which nothing is told.
    pub(crate) metadata: Option<Arc<Metadata>>,
    pub(crate) secret: Secret,
    /// When it is told, as [`now`](super::now) says it.
    pub(crate) now: u64,
}

/// A connection.
#[derive(Debug, Default)]
pub(crate) struct Session {
    heard: Vec<u8>,
    answer: Vec<u8>,
    /// Over how many hops answers go at most, once there was one that may be a token.
    hops: Option<u8>,
    over: bool,
}

/// A request, as far as it matters.
#[derive(Debug, Default)]
struct Request {
    method: String,
    path: String,
    token: Option<Vec<u8>>,
    ttl: Option<Vec<u8>>,
    forwarded: bool,
    close: bool,
}

/// An answer before it is written.
struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: Vec<u8>,
    ttl: Option<u64>,
}

impl Answer {
    fn new(status: &'static str, content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, content_type, body: body.into(), ttl: None }
    }

    fn refusal(status: &'static str) -> Self {
        Self::new(status, "text/plain", format!("{status}\n"))
    }
}

impl Session {
    /// Takes what the guest says, as far as there is room for it, and says how much that was. Who does not take its
    /// answers is not listened to.
    pub(crate) fn hear(&mut self, bytes: &[u8], told: impl Fn() -> Told) -> usize {
        if self.over {
            return bytes.len();
        }
        let taken = bytes.len().min(LONGEST + 1 - self.heard.len());
        self.heard.extend(&bytes[..taken]);
        self.answer_requests(told);
        taken
    }

    /// Answers what was asked, until there is enough to say.
    fn answer_requests(&mut self, told: impl Fn() -> Told) {
        while !self.over && self.answer.len() < LONGEST {
            match parse(&self.heard) {
                Ok(Some((request, len))) => {
                    self.heard.drain(..len);
                    self.over = request.close;
                    let told = told();
                    if let ("PUT", Some(metadata)) = (&*request.method, &told.metadata) {
                        self.limit(metadata.options.http_put_response_hop_limit);
                    }
                    self.write(respond(&request, &told), request.close);
                }
                Ok(None) if self.heard.len() <= LONGEST => return,
                Ok(None) => self.refuse("431 Request Header Fields Too Large"),
                Err(()) => self.refuse("400 Bad Request"),
            }
        }
    }

    /// From here on nothing goes further. Never again more than once: what was not acknowledged is sent again by what holds
    /// then, and who is out of a token's reach gets nothing of what follows it in the stream either.
    fn limit(&mut self, hops: u8) {
        // A packet for nobody would be of no use.
        let hops = hops.max(1);
        self.hops = Some(self.hops.map_or(hops, |before| before.min(hops)));
    }

    fn refuse(&mut self, status: &'static str) {
        self.over = true;
        self.write(Answer::refusal(status), true);
    }

    fn write(&mut self, answer: Answer, close: bool) {
        let Answer { status, content_type, body, ttl } = answer;
        let mut head = format!(
            "HTTP/1.1 {status}\r\nServer: EC2ws\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n",
            body.len()
        );
        if let Some(ttl) = ttl {
            head += &format!("X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {ttl}\r\n");
        }
        head += if close { "Connection: close\r\n\r\n" } else { "\r\n" };
        self.answer.extend(head.as_bytes());
        self.answer.extend(body);
    }

    /// What has not been said yet.
    pub(crate) fn answer(&self) -> &[u8] {
        &self.answer
    }

    /// So many bytes of the answer have been said.
    pub(crate) fn said(&mut self, len: usize) {
        self.answer.drain(..len.min(self.answer.len()));
    }

    /// Over how many hops the answers go at most; over as many as packets do, unless it says otherwise.
    pub(crate) fn hops(&self) -> Option<u8> {
        self.hops
    }

    /// Whether nothing follows the answer.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }
}

/// The first request of these bytes and its length, if it is complete.
fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, ()> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(()),
    };
    let mut request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: parsed.path.unwrap_or_default().to_owned(),
        close: parsed.version == Some(0),
        ..Request::default()
    };
    let mut body = 0;
    for header in parsed.headers.iter() {
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let text = std::str::from_utf8(header.value).map_err(|_| ())?;
                body = text.trim().parse().map_err(|_| ())?;
            }
            "transfer-encoding" => return Err(()),
            "x-forwarded-for" => request.forwarded = true,
            "connection" => request.close |= header.value.eq_ignore_ascii_case(b"close"),
            TOKEN_HEADER => request.token = Some(header.value.to_vec()),
            TTL_HEADER => request.ttl = Some(header.value.to_vec()),
            _ => {}
        }
    }
    let len = head.checked_add(body).filter(|len| *len <= LONGEST).ok_or(())?;
    Ok((bytes.len() >= len).then_some((request, len)))
}

fn respond(request: &Request, told: &Told) -> Answer {
    let Some(metadata) = told.metadata.as_deref() else { return Answer::refusal("404 Not Found") };
    if !metadata.options.http_endpoint {
        return Answer::refusal("403 Forbidden");
    }
    let path = request.path.split('?').next().unwrap_or_default();
    match request.method.as_str() {
        "PUT" if path.trim_end_matches('/') == "/latest/api/token" => issue(request, told),
        "GET" => {
            let mut ttl = None;
            match &request.token {
                Some(token) => match told.secret.check(token, told.now) {
                    Some(left) => ttl = Some(left),
                    None => return Answer::refusal("401 Unauthorized"),
                },
                None if metadata.options.http_tokens == HttpTokens::Required => {
                    return Answer::refusal("401 Unauthorized");
                }
                None => {}
            }
            // Clients write what has a meaning in paths as its number, and some of what has none.
            let found = percent_decode_str(path).decode_utf8().ok();
            let mut answer = match found.and_then(|path| tree::find(&path, metadata, &told.view)) {
                Some(Found::Text(text)) => Answer::new("200 OK", "text/plain", text),
                Some(Found::Bytes(bytes)) => Answer::new("200 OK", "application/octet-stream", bytes),
                None => Answer::refusal("404 Not Found"),
            };
            answer.ttl = ttl;
            answer
        }
        "PUT" => Answer::refusal("404 Not Found"),
        _ => Answer::refusal("405 Method Not Allowed"),
    }
}

/// A token, unless the request came over a proxy, which is how it could be for somebody else.
fn issue(request: &Request, told: &Told) -> Answer {
    if request.forwarded {
        return Answer::refusal("403 Forbidden");
    }
    let ttl = request.ttl.as_deref().and_then(|text| std::str::from_utf8(text).ok()?.trim().parse().ok());
    match ttl.and_then(|ttl| Some((ttl, told.secret.issue(ttl, told.now)?))) {
        Some((ttl, token)) => {
            let mut answer = Answer::new("200 OK", "text/plain", token);
            answer.ttl = Some(ttl);
            answer
        }
        None => Answer::refusal("400 Bad Request"),
    }
}

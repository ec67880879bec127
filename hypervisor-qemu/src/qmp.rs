//! QMP, QEMU's control protocol: bytes in, messages out; no socket in here.
//!
//! One JSON object a line. The program is held to be odd rather than honest: a line has a bound, and
//! what is not a message of the protocol is an error that ends the machine.
//!
//! Written here rather than taken from the `qapi` crate, because that reads lines without a bound,
//! sees events only while it waits for an answer, and generates types for the whole of QEMU's schema
//! where a dozen commands and four events are used.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

/// The longest line that is taken. The answers asked for have a few hundred bytes.
const MAX_LINE: usize = 64 * 1024;

/// What QEMU is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Leaves capabilities negotiation; no other command works before.
    Capabilities,
    /// Runs the guest.
    Continue,
    /// Stops the processors, then drains and flushes the disks, then answers.
    Stop,
    /// Presses the power button.
    Powerdown,
    /// Asks for the run state.
    Status,
    /// Hands over the descriptor that comes with the line.
    GetFd,
    /// Makes a block node.
    BlockdevAdd,
    /// Removes one that nobody uses.
    BlockdevDel,
    /// Puts one onto another.
    BlockdevReopen,
    /// Tells a node's users of its size.
    BlockResize,
    /// Plugs a device in.
    DeviceAdd,
    /// Asks the guest to let go of a device.
    DeviceDel,
}

impl Command {
    /// Its name on the wire.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "qmp_capabilities",
            Self::Continue => "cont",
            Self::Stop => "stop",
            Self::Powerdown => "system_powerdown",
            Self::Status => "query-status",
            Self::GetFd => "getfd",
            Self::BlockdevAdd => "blockdev-add",
            Self::BlockdevDel => "blockdev-del",
            Self::BlockdevReopen => "blockdev-reopen",
            Self::BlockResize => "block_resize",
            Self::DeviceAdd => "device_add",
            Self::DeviceDel => "device_del",
        }
    }

    /// The line that gives it, to be answered under `id`.
    pub(crate) fn line(self, id: u64, arguments: Option<&Value>) -> String {
        let mut line = json!({ "execute": self.name(), "id": id });
        if let Some(arguments) = arguments {
            line["arguments"] = arguments.clone();
        }
        let mut line = line.to_string();
        line.push('\n');
        line
    }
}

/// What QEMU says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    /// The first line.
    Greeting,
    /// A command's answer: what it returned, or why it was refused.
    Answer { id: u64, result: Result<Value, String> },
    /// The guest's processors run.
    Resumed,
    /// The guest's processors stand still; its disks may still be at work.
    Stopped,
    /// The guest has let go of this device, which is gone.
    DeviceDeleted { device: String },
    /// QEMU is about to exit, for this reason.
    Shutdown { reason: String },
    /// Anything else, of no interest here.
    Other,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("QEMU sent a control message of more than {MAX_LINE} bytes")]
    TooLong,
    #[error("QEMU sent what is not QMP: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Every kind of line in one; which kind it is shows in the member that is there.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<ErrorBody>,
    event: Option<String>,
    data: Option<Value>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct ErrorBody {
    desc: String,
}

/// Puts lines together from what the socket gives.
#[derive(Default)]
pub(crate) struct Decoder {
    /// What came after the last newline.
    partial: Vec<u8>,
}

impl Decoder {
    /// Takes `bytes` and hands every message that they complete to `each`.
    pub(crate) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(Message)) -> Result<(), ProtocolError> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            if self.partial.len() + piece.len() > MAX_LINE {
                return Err(ProtocolError::TooLong);
            }
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                if !line.trim_ascii().is_empty() {
                    each(parse(&line)?);
                }
            }
        }
        Ok(())
    }
}

fn parse(line: &[u8]) -> Result<Message, ProtocolError> {
    let line: Line = serde_json::from_slice(line)?;
    Ok(match line {
        Line { greeting: Some(_), .. } => Message::Greeting,
        Line { id: Some(id), error: Some(error), .. } => Message::Answer { id, result: Err(error.desc) },
        Line { id: Some(id), returned: Some(value), .. } => Message::Answer { id, result: Ok(value) },
        Line { event: Some(name), data, .. } => match name.as_str() {
            "RESUME" => Message::Resumed,
            "STOP" => Message::Stopped,
            // Parts of devices, which have no name, are told of as well.
            "DEVICE_DELETED" => match data.as_ref().and_then(|d| d["device"].as_str()) {
                Some(device) => Message::DeviceDeleted { device: device.to_owned() },
                None => Message::Other,
            },
            "SHUTDOWN" => {
                let reason = data.as_ref().and_then(|d| d["reason"].as_str()).unwrap_or("unknown");
                Message::Shutdown { reason: reason.to_owned() }
            }
            _ => Message::Other,
        },
        _ => Message::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<Vec<Message>, ProtocolError> {
        let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
        decoder.push(bytes, |m| messages.push(m))?;
        Ok(messages)
    }

    #[test]
    fn a_command_is_one_line() {
        assert_eq!(Command::Powerdown.line(7, None), "{\"execute\":\"system_powerdown\",\"id\":7}\n");
        assert_eq!(
            Command::DeviceDel.line(8, Some(&json!({ "id": "disk1" }))),
            "{\"arguments\":{\"id\":\"disk1\"},\"execute\":\"device_del\",\"id\":8}\n"
        );
    }

    #[test]
    fn lines_become_messages() {
        let check = |line: &str, expect: Message| {
            assert_eq!(decode(format!("{line}\r\n").as_bytes()).unwrap(), [expect], "{line}");
        };
        check(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#, Message::Greeting);
        check(r#"{"return": {}, "id": 3}"#, Message::Answer { id: 3, result: Ok(json!({})) });
        check(
            r#"{"id": 4, "error": {"class": "GenericError", "desc": "no"}}"#,
            Message::Answer { id: 4, result: Err("no".to_owned()) },
        );
        check(r#"{"timestamp": {"seconds": 1}, "event": "RESUME"}"#, Message::Resumed);
        check(r#"{"event": "STOP"}"#, Message::Stopped);
        check(
            r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
            Message::Shutdown { reason: "guest-reset".to_owned() },
        );
        check(r#"{"event": "SHUTDOWN", "data": 5}"#, Message::Shutdown { reason: "unknown".to_owned() });
        check(
            r#"{"event": "DEVICE_DELETED", "data": {"device": "disk1", "path": "/machine/peripheral/disk1"}}"#,
            Message::DeviceDeleted { device: "disk1".to_owned() },
        );
        check(r#"{"event": "DEVICE_DELETED", "data": {"path": "/machine/x"}}"#, Message::Other);
        check(r#"{"event": "NEVER_HEARD_OF", "data": {"x": [1]}}"#, Message::Other);
        check(r#"{"return": {}}"#, Message::Other);
        check("{}", Message::Other);
    }

    #[test]
    fn a_line_may_come_in_any_pieces() {
        let stream = b"{\"event\":\"STOP\"}\n\n{\"event\":\"RESUME\"}\n{\"ev";
        for cut in 0..stream.len() {
            let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
            for piece in [&stream[..cut], &stream[cut..]] {
                decoder.push(piece, |m| messages.push(m)).unwrap();
            }
            assert_eq!(messages, [Message::Stopped, Message::Resumed], "cut at {cut}");
        }
    }

    #[test]
    fn what_is_not_qmp_is_refused() {
        let deep = "[".repeat(10_000) + "\n";
        for bytes in ["hello\n", "[]\n", "\u{0}\n", "{\"event\": 5}\n", "{\"id\": -1}\n", &deep] {
            assert!(matches!(decode(bytes.as_bytes()), Err(ProtocolError::Malformed(_))), "{bytes:.20}");
        }
        assert!(decode(&vec![b' '; MAX_LINE]).unwrap().is_empty());
        assert!(matches!(decode(&vec![b' '; MAX_LINE + 1]), Err(ProtocolError::TooLong)));
    }
}

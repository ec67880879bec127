//! What an agent in a guest answers: lines of JSON, from whoever wants to keep the host busy.

use std::io;

use serde::Deserialize;

/// The longest answer that is taken: a number, or why something failed, with a path in it.
const LINE: usize = 16 << 10;
/// The most that is passed over of what was for whoever asked before, and of what is nothing.
const STALE: usize = 256 << 10;
/// What the answer comes after that a conversation begins with. It is in no text (QEMU, `guest-sync-delimited`).
pub(crate) const SENTINEL: u8 = 0xff;

/// An answer to a command whose result is a number or a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Number(u64),
    Text(String),
    /// The agent could not, and says why.
    Refused(String),
}

/// What an agent says (QEMU, "QMP specification", 2.4).
#[derive(Deserialize)]
struct Said {
    #[serde(rename = "return")]
    result: Option<Outcome>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Outcome {
    Number(u64),
    Text(String),
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

impl Answer {
    fn of(line: &[u8]) -> io::Result<Self> {
        match serde_json::from_slice(line) {
            Ok(Said { result: Some(Outcome::Number(number)), error: None }) => Ok(Self::Number(number)),
            Ok(Said { result: Some(Outcome::Text(text)), error: None }) => Ok(Self::Text(text)),
            Ok(Said { result: None, error: Some(refusal) }) => Ok(Self::Refused(refusal.desc)),
            Ok(_) => Err(nonsense("the agent's answer is neither a result nor an error")),
            Err(_) => Err(nonsense("the agent's answer is none")),
        }
    }
}

/// Finds the answers in what an agent says.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// What has come and was not looked at: no more than [`LINE`] and what was told last, where whoever tells asks for an
    /// answer before telling more.
    said: Vec<u8>,
    /// How much was passed over.
    stale: usize,
    /// The answer to come is that which a conversation begins with.
    begun: bool,
}

impl Answers {
    /// Takes what has come.
    pub(crate) fn hear(&mut self, bytes: &[u8]) {
        self.said.extend_from_slice(bytes);
    }

    /// The next answer, if all of it has come.
    pub(crate) fn next(&mut self) -> io::Result<Option<Answer>> {
        loop {
            match self.line()? {
                Some(line) if line.iter().all(u8::is_ascii_whitespace) => self.pass_over(line.len() + 1)?,
                line => return line.map(|line| Answer::of(&line)).transpose(),
            }
        }
    }

    /// Passes over all that comes before the answer that a conversation begins with, and says whether that has come.
    pub(crate) fn has_begun(&mut self, id: u32) -> io::Result<bool> {
        loop {
            while !self.begun {
                let at = self.said.iter().position(|byte| *byte == SENTINEL);
                let passed = at.map_or(self.said.len(), |at| at + 1);
                self.said.drain(..passed);
                self.pass_over(passed)?;
                self.begun = at.is_some();
                if at.is_none() {
                    return Ok(false);
                }
            }
            // Another's line is none to complain of.
            let Some(line) = self.line()? else { return Ok(false) };
            if Answer::of(&line).is_ok_and(|answer| answer == Answer::Number(id.into())) {
                return Ok(true);
            }
            // A sentinel may be in it, where the one before was followed by nothing.
            let within = line.iter().position(|byte| *byte == SENTINEL);
            let rest = within.map(|at| [&line[at..], b"\n"].concat());
            self.said.splice(..0, rest.into_iter().flatten());
            self.pass_over(within.unwrap_or(line.len()))?;
            self.begun = false;
        }
    }

    fn pass_over(&mut self, bytes: usize) -> io::Result<()> {
        self.stale += bytes;
        match self.stale > STALE {
            true => Err(nonsense("the agent says much and does not answer")),
            false => Ok(()),
        }
    }

    /// Takes a line, without its end, if all of it has come.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let end = self.said.iter().position(|byte| *byte == b'\n');
        if end.unwrap_or(self.said.len()) > LINE {
            return Err(nonsense("the agent's answer is too long"));
        }
        let Some(end) = end else { return Ok(None) };
        let mut line: Vec<u8> = self.said.drain(..=end).collect();
        line.pop();
        Ok(Some(line))
    }

    /// How much is kept.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn kept(&self) -> usize {
        self.said.len()
    }
}

pub(super) fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(line: &str) -> Result<Answer, io::ErrorKind> {
        let mut answers = Answers::default();
        answers.hear(line.as_bytes());
        answers.hear(b"\n");
        answers.next().map(|answer| answer.unwrap()).map_err(|e| e.kind())
    }

    #[test]
    fn an_answer_is_a_number_or_why_there_is_none() {
        let refused = |why: &str| Ok(Answer::Refused(why.to_owned()));
        let nonsense = || Err(io::ErrorKind::InvalidData);
        for (line, expect) in [
            (r#"{"return": 2}"#, Ok(Answer::Number(2))),
            ("\r\n{\"return\": 0, \"id\": 7}\r", Ok(Answer::Number(0))),
            (r#"{"return": 18446744073709551615}"#, Ok(Answer::Number(u64::MAX))),
            (r#"{"error": {"class": "GenericError", "desc": "no"}}"#, refused("no")),
            (r#"{"error": {}}"#, refused("")),
            (r#"{"return": 18446744073709551616}"#, nonsense()),
            (r#"{"return": 1e999}"#, nonsense()),
            (r#"{"return": -1}"#, nonsense()),
            (r#"{"return": "frozen"}"#, Ok(Answer::Text("frozen".to_owned()))),
            (r#"{"return": {}}"#, nonsense()),
            (r#"{"return": 1, "error": {"desc": "both"}}"#, nonsense()),
            (r#"{"event": "of whatever"}"#, nonsense()),
            (r#"{"return": 1"#, nonsense()),
            ("what?", nonsense()),
            (&"[".repeat(10_000), nonsense()),
            (&format!(r#"{{"error": {{"desc": "{}"}}}}"#, "x".repeat(LINE)), nonsense()),
        ] {
            assert_eq!(answer(line), expect, "{line:.100}");
        }
    }

    #[test]
    fn a_conversation_begins_after_what_was_for_another() {
        for (said, begins, then) in [
            (&b"\xff{\"return\": 7}\n"[..], true, None),
            (b"\xff{\"return\": 7}\n{\"return\": 3}\n", true, Some(Answer::Number(3))),
            (b"{\"return\": 7}\n{\"error\": {}}\n\xff{\"return\": 7}\n", true, None),
            (b"\xff{\"return\": 6}\n\xff{\"return\": 7}\n", true, None),
            (b"\xffhalf an answer\xff{\"return\": 7}\n", true, None),
            (b"\xff\xff\xff{\"return\": 7}\n", true, None),
            (b"{\"return\": 7}\n", false, None),
            (b"\xff{\"return\": 6}\n{\"return\": 7}\n", false, None),
            (b"\xff{\"return\": 7}", false, None),
        ] {
            let mut answers = Answers::default();
            answers.hear(said);
            let told = String::from_utf8_lossy(said);
            assert_eq!(answers.has_begun(7).unwrap(), begins, "{told}");
            if begins {
                assert_eq!(answers.next().unwrap(), then, "{told}");
            }
        }
    }

    #[test]
    fn who_says_without_end_is_not_listened_to_without_end() {
        for said in [&[b'x'; 4096][..], &[SENTINEL; 4096], &[b'\n'; 4096], b"\xff\n\xff{}\n"] {
            let mut answers = Answers::default();
            let mut heard = 0;
            let ended = loop {
                answers.hear(said);
                heard += said.len();
                match answers.has_begun(7) {
                    Ok(begun) => assert!(!begun),
                    Err(e) => break e,
                }
                assert!(answers.kept() <= LINE && heard <= 2 * STALE, "{heard} bytes");
            };
            assert_eq!(ended.kind(), io::ErrorKind::InvalidData);
        }
        for said in [&[b'\n'; 4096][..], b" \n", b"\r\n"] {
            let (mut answers, mut heard) = (Answers::default(), 0);
            let ended = loop {
                answers.hear(said);
                heard += said.len();
                match answers.next() {
                    Ok(answer) => assert_eq!(answer, None),
                    Err(e) => break e,
                }
                assert!(answers.kept() == 0 && heard <= 2 * STALE, "{heard} bytes");
            };
            assert_eq!(ended.kind(), io::ErrorKind::InvalidData);
        }
        let mut answers = Answers::default();
        answers.hear(&[b'x'; LINE]);
        assert!(answers.next().unwrap().is_none());
        answers.hear(b"x");
        assert!(answers.next().is_err());
    }
}

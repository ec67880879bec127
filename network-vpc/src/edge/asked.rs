//! What has been asked for names in a conversation of datagrams, and not been answered.

use hickory_proto::op::{Header, MessageType};
use hickory_proto::serialize::binary::BinDecodable;

/// The most questions that wait for an answer. Who asks more is no resolver of a guest's.
const MOST: usize = 256;

/// The numbers of the questions without an answer, each as often as it was asked.
#[derive(Debug, Default)]
pub(super) struct Asked(Vec<u16>);

impl Asked {
    /// What is said to the other side. Says whether it is a question for a name like those before, of which few enough wait.
    pub(super) fn ask(&mut self, bytes: &[u8]) -> bool {
        let question = header(bytes, MessageType::Query).filter(|header| header.query_count() == 1);
        let question = question.filter(|_| self.0.len() < MOST);
        self.0.extend(question.map(|header| header.id()));
        question.is_some()
    }

    /// What the other side says.
    pub(super) fn answer(&mut self, bytes: &[u8]) {
        let Some(answer) = header(bytes, MessageType::Response) else { return };
        if let Some(at) = self.0.iter().position(|id| *id == answer.id()) {
            self.0.swap_remove(at);
        }
    }

    /// Whether nothing is left to be answered.
    pub(super) fn is_answered(&self) -> bool {
        self.0.is_empty()
    }
}

fn header(bytes: &[u8], kind: MessageType) -> Option<Header> {
    Header::from_bytes(bytes).ok().filter(|header| header.message_type() == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: [u8; 12] = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    const ANSWER: [u8; 12] = [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];

    #[test]
    fn only_what_looks_like_a_question_is_one() {
        let mut two = QUESTION;
        two[5] = 2;
        for (bytes, expect) in [
            (&QUESTION[..], true),
            (&QUESTION[..11], false),
            (&ANSWER, false),
            (&two, false),
            (b"hello", false),
        ] {
            let mut asked = Asked::default();
            assert_eq!((asked.ask(bytes), asked.is_answered()), (expect, !expect), "{bytes:?}");
        }
    }

    #[test]
    fn a_question_waits_for_an_answer_with_its_number() {
        let other = |bytes: [u8; 12]| [&[1], &bytes[1..]].concat();
        let mut asked = Asked::default();
        assert!(asked.ask(&QUESTION) && asked.ask(&QUESTION) && asked.ask(&other(QUESTION)));
        for (bytes, is_over) in [
            (&QUESTION[..], false),
            (&ANSWER, false),
            (&other(ANSWER), false),
            (&other(ANSWER), false),
            (b"hello", false),
            (&ANSWER[..11], false),
            (&ANSWER, true),
        ] {
            asked.answer(bytes);
            assert_eq!(asked.is_answered(), is_over, "{bytes:?}");
        }
    }

    #[test]
    fn few_are_remembered() {
        let mut asked = Asked::default();
        assert!((0..MOST).all(|_| asked.ask(&QUESTION)) && !asked.ask(&QUESTION));
        assert_eq!(asked.0.len(), MOST);
    }
}

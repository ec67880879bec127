//! How long a conversation of datagrams is kept in which nobody says anything.

use std::time::{Duration, Instant};

/// As long as EC2 does by default (EC2 User Guide, "Security group connection tracking"), where both sides have spoken twice in
/// turn; and where nobody knows whether more than an answer comes.
const STREAM: Duration = Duration::from_secs(180);
const SILENCE: Duration = Duration::from_secs(60);

/// The turns after which it is a stream: for as many a security group remembers it for so long.
const TURNS: u8 = 4;

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Guest,
    Other,
}

/// When something was last said in a conversation, and how often the sides took turns.
#[derive(Debug)]
pub(super) struct Pace {
    pub(super) last: Instant,
    by: Side,
    turns: u8,
}

impl Pace {
    /// Of a conversation that this side begins.
    pub(super) fn begun(by: Side) -> Self {
        Self { last: Instant::now(), by, turns: 1 }
    }

    pub(super) fn said(&mut self, by: Side) {
        self.last = Instant::now();
        self.turns = self.turns.saturating_add(u8::from(self.by != by));
        self.by = by;
    }

    /// How long it may be silent.
    pub(super) fn patience(&self) -> Duration {
        if self.turns < TURNS { SILENCE } else { STREAM }
    }

    pub(super) fn is_over(&self) -> bool {
        self.last.elapsed() >= self.patience()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_kept_for_longer_where_both_have_spoken_twice() {
        use Side::{Guest, Other};
        for (sides, expect) in [
            (&[][..], 60),
            (&[Guest, Guest, Guest, Guest], 60),
            (&[Other, Other, Other, Guest], 60),
            (&[Other, Guest, Other], 180),
            (&[Guest, Other, Other, Guest, Other, Guest], 180),
        ] {
            let mut pace = Pace::begun(Guest);
            sides.iter().for_each(|side| pace.said(*side));
            assert_eq!(pace.patience(), Duration::from_secs(expect), "{sides:?}");
        }
        let mut pace = Pace::begun(Other);
        (0..500).for_each(|n| pace.said(if n % 2 == 0 { Guest } else { Other }));
        assert_eq!(pace.patience(), Duration::from_secs(180));
    }
}

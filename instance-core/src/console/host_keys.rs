//! The keys of its SSH server that a guest shows on its console, as cloud-init has it do at its first boot.

use ssh_key::PublicKey;

use super::reader::find;

/// What cloud-init writes around them.
const BEGIN: &[u8] = b"-----BEGIN SSH HOST KEY KEYS-----";
const END: &[u8] = b"-----END SSH HOST KEY KEYS-----";

/// The most keys of a machine, whose console may say anything.
const MOST: usize = 16;

/// The longest line that is looked at: more than the longest RSA key that OpenSSH takes.
const LONGEST_LINE: usize = 8 << 10;

/// Listens to a console.
#[derive(Debug, Default)]
pub(super) struct HostKeys {
    /// The line that has not ended, as far as it is looked at.
    line: Vec<u8>,
    /// What was listed since the beginning of a list, if that has not ended.
    listed: Option<Vec<String>>,
    shown: Vec<String>,
}

impl HostKeys {
    /// The list that ended last, of those with keys.
    pub(super) fn shown(&self) -> &[String] {
        &self.shown
    }

    /// Takes what the guest writes. Says whether it has shown other keys than before.
    pub(super) fn hear(&mut self, bytes: &[u8]) -> bool {
        let mut changed = false;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (room, before) = (LONGEST_LINE - self.line.len(), self.line.len());
            self.line.extend(&piece[..piece.len().min(room)]);
            // Who waits for the end of the list finds it, whether or not its line has ended. What was there is not searched
            // again for each character of a long line.
            let new = &self.line[before.saturating_sub(END.len())..];
            changed |= self.listed.is_some() && find(new, END).is_some() && self.end_list();
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
        changed
    }

    fn end_line(&mut self) {
        if find(&self.line, BEGIN).is_some() {
            self.listed = Some(Vec::new());
        } else if let Some(listed) = self.listed.as_mut().filter(|listed| listed.len() < MOST) {
            // One that is cut off would be another key.
            let whole = (self.line.len() < LONGEST_LINE).then_some(&self.line);
            listed.extend(whole.and_then(|line| key(line)));
        }
        self.line.clear();
    }

    fn end_list(&mut self) -> bool {
        let listed = self.listed.take().unwrap_or_default();
        let changed = !listed.is_empty() && listed != self.shown;
        if changed {
            self.shown = listed;
        }
        changed
    }
}

/// The key that a line is, without its comment.
fn key(line: &[u8]) -> Option<String> {
    let mut key = PublicKey::from_openssh(std::str::from_utf8(line).ok()?.trim()).ok()?;
    key.set_comment("");
    key.to_openssh().ok().map(|text| text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";
    const OTHER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJm";

    fn list(keys: &str) -> String {
        let [begin, end] = [BEGIN, END].map(|text| String::from_utf8_lossy(text));
        format!("booting\r\n<14>Nov 29 cloud-init: {begin}\r\n{keys}\r\n{end}")
    }

    #[test]
    fn keys_are_those_of_the_last_list_that_has_any() {
        let long = "x".repeat(LONGEST_LINE);
        let many = (KEY.to_owned() + "\n").repeat(MOST + 1);
        let cut = KEY.to_owned() + &" ".repeat(LONGEST_LINE) + "x";
        for (written, expect) in [
            (String::new(), vec![]),
            (list(KEY), vec![KEY]),
            (list(&format!("{KEY} root@web")) + "\r\nlogin: ", vec![KEY]),
            (list(&format!("no key\n{OTHER}\n[   12.3] {KEY}\n{long}{KEY}\n{cut}")), vec![OTHER]),
            (list(OTHER) + "\n" + &list(KEY), vec![KEY]),
            (list(KEY) + "\n" + &list("none"), vec![KEY]),
            (list(KEY) + &"\nmuch more".repeat(10_000), vec![KEY]),
            (list(&list(KEY)), vec![KEY]),
            (list(&format!("{KEY}\n{}", list(OTHER))), vec![OTHER]),
            (list(&many), vec![KEY; MOST]),
            (list(KEY).replace("END", "FIN"), vec![]),
            (list(KEY).replace("BEGIN", "START"), vec![]),
            (list("ssh-ed25519 AAAA"), vec![]),
        ] {
            for size in [1, 7, written.len().max(1)] {
                let mut keys = HostKeys::default();
                written.as_bytes().chunks(size).for_each(|piece| _ = keys.hear(piece));
                assert_eq!(keys.shown(), expect, "{written:?} by {size}");
            }
        }
    }

    #[test]
    fn it_is_told_once_that_there_are_others() {
        let mut keys = HostKeys::default();
        for (written, expect) in [(KEY, true), (KEY, false), ("none", false), (OTHER, true), (KEY, true)] {
            assert_eq!(keys.hear(format!("{}\n", list(written)).as_bytes()), expect, "{written}");
        }
    }
}

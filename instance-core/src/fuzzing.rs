//! What the fuzz targets run, and the tests over the seeds. No part of the interface.

use std::io::{self, Read, Write};

use crate::guest_agent::{Agent, Answers};

/// An agent that has these bytes to say, so many at a time, and takes whatever it is told.
struct Says<'a> {
    bytes: &'a [u8],
    at_once: usize,
}

impl Read for Says<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let at_once = self.at_once.min(buf.len());
        self.bytes.read(&mut buf[..at_once])
    }
}

impl Write for Says<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an agent in a guest says: it comes to the same in whatever pieces it comes, and little of it is kept.
pub fn guest_agent(bytes: &[u8]) {
    let talk = |at_once: usize| -> Result<[u64; 2], String> {
        let mut agent = Agent::new(Says { bytes, at_once });
        let told = |e: io::Error| e.to_string();
        agent.synchronise(7).map_err(told)?;
        let frozen = agent.freeze().map_err(told)?;
        assert!(frozen > 0, "nothing stands still");
        Ok([frozen, agent.thaw().map_err(told)?])
    };
    let whole = talk(4096);
    for at_once in [1, 7] {
        assert_eq!(talk(at_once), whole, "in pieces of {at_once} bytes");
    }
    let mut answers = Answers::default();
    for piece in bytes.chunks(4096) {
        answers.hear(piece);
        while let Ok(Some(_)) = answers.next() {}
        if answers.kept() > 5 * 4096 {
            assert!(answers.next().is_err(), "{} bytes are kept", answers.kept());
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_bodies_hold_on_the_seeds() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        let mut run = 0;
        for dir in ["guest_agent", "manifest"] {
            for file in std::fs::read_dir(format!("{seeds}/{dir}")).unwrap() {
                super::guest_agent(&std::fs::read(file.unwrap().path()).unwrap());
                run += 1;
            }
        }
        assert!(run > 5, "the seeds are not there");
    }
}

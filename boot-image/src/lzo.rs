//! LZO, as a kernel's build packs with it: blocks of LZO1X in the container of `lzop`.
//!
//! Our own, since the decoders that there are either trust their input or are not free to be used here. The
//! format is that of Linux's `Documentation/staging/lzo.rst`, the container that of its
//! `lib/decompress_unlzo.c`. Checksums are not looked at: what is unpacked has to be a kernel of the size that
//! the file says.

use std::io::{self, Read};

/// What an `lzop` file begins with.
pub(crate) const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";
/// The largest block that `lzop` makes, unpacked.
const BLOCK_MAX: usize = 64 << 20;

/// Flags of the container: which checksums there are, and fields that are rare.
mod flag {
    pub(super) const ADLER32_UNPACKED: u32 = 0x1;
    pub(super) const ADLER32_PACKED: u32 = 0x2;
    pub(super) const EXTRA_FIELD: u32 = 0x40;
    pub(super) const CRC32_UNPACKED: u32 = 0x100;
    pub(super) const CRC32_PACKED: u32 = 0x200;
    pub(super) const FILTER: u32 = 0x800;
}

/// Unpacks an `lzop` file block by block.
pub(crate) struct LzopReader<'a> {
    rest: &'a [u8],
    /// How many bytes of checksums stand before a block's data: of any block, and of one that is packed.
    checksums: usize,
    checksums_packed: usize,
    block: Vec<u8>,
    given: usize,
    ended: bool,
}

impl<'a> LzopReader<'a> {
    /// Reads the container's header.
    pub(crate) fn new(file: &'a [u8]) -> io::Result<Self> {
        let mut at = Bytes(file.strip_prefix(MAGIC).ok_or_else(corrupt)?);
        /// From this version on there are more fields.
        const LEVEL_SINCE: u16 = 0x940;
        let version = at.u16()?;
        at.take(2)?; // of the library
        let newer = version >= LEVEL_SINCE;
        if newer {
            at.take(2)?; // the version that is needed
        }
        at.take(if newer { 2 } else { 1 })?; // method, level
        let flags = at.u32()?;
        if flags & flag::FILTER != 0 {
            return Err(corrupt());
        }
        at.take(if newer { 12 } else { 8 })?; // mode, time
        let name = at.take(1)?[0];
        at.take(usize::from(name) + 4)?; // and the header's checksum
        if flags & flag::EXTRA_FIELD != 0 {
            let len = at.u32()? as usize;
            at.take(len)?;
            at.take(4)?;
        }
        let count = |of: [u32; 2]| 4 * of.iter().filter(|bit| flags & **bit != 0).count();
        Ok(Self {
            rest: at.0,
            checksums: count([flag::ADLER32_UNPACKED, flag::CRC32_UNPACKED]),
            checksums_packed: count([flag::ADLER32_PACKED, flag::CRC32_PACKED]),
            block: Vec::new(),
            given: 0,
            ended: false,
        })
    }

    /// Unpacks the next block. False at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut at = Bytes(self.rest);
        let len = at.u32()? as usize;
        if len == 0 {
            return Ok(false);
        }
        let packed_len = at.u32()? as usize;
        if len > BLOCK_MAX || packed_len > len {
            return Err(corrupt());
        }
        at.take(self.checksums)?;
        (self.block, self.given) = if packed_len == len {
            (at.take(len)?.to_vec(), 0)
        } else {
            at.take(self.checksums_packed)?;
            (unpack(at.take(packed_len)?, len)?, 0)
        };
        self.rest = at.0;
        Ok(true)
    }
}

impl Read for LzopReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.given == self.block.len() && !self.ended {
            self.ended = !self.next_block()?;
        }
        let read = (&self.block[self.given..]).read(buf)?;
        self.given += read;
        Ok(read)
    }
}

/// Unpacks one LZO1X stream, which must be `len` bytes.
fn unpack(packed: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut at = Bytes(packed);
    let mut out = Output { bytes: Vec::new(), most: len };
    // How many literals followed the last copy; 4 stands for a run of them.
    let mut literals = match at.0.first() {
        Some(&first @ 18..) => {
            at.take(1)?;
            let run = usize::from(first) - 17;
            out.append(at.take(run)?)?;
            run.min(4)
        }
        _ => 0,
    };
    loop {
        let code = usize::from(at.take(1)?[0]);
        // Length and distance of a copy, and how many literals follow it.
        let (length, distance, follow) = match code {
            0..16 if literals == 0 => {
                let run = 3 + at.length(code, 15)?;
                out.append(at.take(run)?)?;
                literals = 4;
                continue;
            }
            0..16 => {
                let distance = (usize::from(at.take(1)?[0]) << 2) + (code >> 2) + 1;
                if literals == 4 { (3, distance + 2048, code & 3) } else { (2, distance, code & 3) }
            }
            16..32 => {
                let length = 2 + at.length(code & 7, 7)?;
                let word = at.u16_le()?;
                let distance = ((code & 8) << 11) + (word >> 2);
                if distance == 0 {
                    return if length == 3 && out.bytes.len() == len {
                        Ok(out.bytes)
                    } else {
                        Err(corrupt())
                    };
                }
                (length, distance + 16384, word & 3)
            }
            32..64 => {
                let length = 2 + at.length(code & 31, 31)?;
                let word = at.u16_le()?;
                (length, (word >> 2) + 1, word & 3)
            }
            _ => {
                let distance = (usize::from(at.take(1)?[0]) << 3) + (code >> 2 & 7) + 1;
                ((code >> 5) + 1, distance, code & 3)
            }
        };
        out.repeat(length, distance)?;
        out.append(at.take(follow)?)?;
        literals = follow;
    }
}

/// What is still to be read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(corrupt)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.take(2).map(|bytes| u16::from(bytes[0]) << 8 | u16::from(bytes[1]))
    }

    fn u16_le(&mut self) -> io::Result<usize> {
        self.take(2).map(|bytes| usize::from(bytes[1]) << 8 | usize::from(bytes[0]))
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take(4).map(|bytes| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
    }

    /// A length whose first bits are `bits`: if none is set, it is what they can say and 255 for each zero
    /// that follows and the byte after those.
    fn length(&mut self, bits: usize, most: usize) -> io::Result<usize> {
        if bits != 0 {
            return Ok(bits);
        }
        let zeroes = self.0.iter().take_while(|byte| **byte == 0).count();
        self.take(zeroes)?;
        Ok(most + 255 * zeroes + usize::from(self.take(1)?[0]))
    }
}

/// What has been unpacked of a block.
struct Output {
    bytes: Vec<u8>,
    most: usize,
}

impl Output {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.room(bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Copies what is `distance` back, which may reach into what it makes.
    fn repeat(&mut self, length: usize, distance: usize) -> io::Result<()> {
        self.room(length)?;
        let start = self.bytes.len().checked_sub(distance).ok_or_else(corrupt)?;
        let end = start + length;
        let mut from = start;
        while from < end {
            // All that is there of it: each time more, where it repeats itself.
            let part = from..end.min(self.bytes.len());
            let len = part.len();
            self.bytes.extend_from_within(part);
            from += len;
        }
        Ok(())
    }

    fn room(&self, len: usize) -> io::Result<()> {
        if len <= self.most - self.bytes.len() { Ok(()) } else { Err(corrupt()) }
    }
}

fn corrupt() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is not what lzop writes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_instruction_does_what_is_documented() {
        let end = [0x11, 0, 0];
        let letters: Vec<u8> = (b'a'..=b'z').collect();
        // Eight letters as the first instruction, and then some.
        let after = |code: &[u8]| [&[17 + 8], &letters[..8], code, &end].concat();
        let long = [&[0u8, 0, 1][..], &vec![b'x'; 3 + 15 + 255 + 1]].concat();
        // A page of literals, so that there is something far back.
        let far = |literals: usize, code: &[u8]| {
            let zeroes = (literals - 18) / 255;
            let run = [&[0][..], &vec![0; zeroes], &[((literals - 18) % 255) as u8]].concat();
            [&run[..], &letters.iter().copied().cycle().take(literals).collect::<Vec<_>>(), code, &end]
                .concat()
        };
        let letter = |n: usize| letters[n % 26];
        let far_is = |literals: usize, start: usize, len: usize, tail: &[u8]| {
            let mut out: Vec<u8> = (0..literals).map(letter).collect();
            out.extend((0..len).map(|n| letter(start + n)));
            [&out[..], tail].concat()
        };
        let text = |text: &str| text.as_bytes().to_vec();
        for (what, packed, expect) in [
            ("literals first", after(&[]), text("abcdefgh")),
            ("few literals first", [&[18, b'a', 0x04, 0][..], &end].concat(), vec![]),
            ("a long run", [&long[..], &end].concat(), vec![b'x'; 274]),
            ("a short one", [&[1, b'a', b'b', b'c', b'd'][..], &end].concat(), text("abcd")),
            // M2: lengths 3 and 8, distances from 1 on, literals after.
            ("3 from 8 back", after(&[0x40 | 7 << 2, 0]), text("abcdefghabc")),
            ("8 from 1 back and a literal", after(&[0xe1, 0, b'!']), text("abcdefghhhhhhhhh!")),
            // M3, with a short and a long length.
            ("5 from 4 back", after(&[0x20 | 3, 3 << 2, 0]), text("abcdefghefghe")),
            ("33 and 2", after(&[0x20, 2, 2, 0, b'!', b'?']), text(&format!("abcdefgh{}!?", "h".repeat(35)))),
            // M1 after one to three literals: two bytes.
            ("2 after a literal", after(&[0xe1, 0, b'!', 1 << 2, 0]), text("abcdefghhhhhhhhh!h!")),
            // The same code after a run of literals: three, from beyond 2 KiB.
            ("3 from 2049 back", far(3000, &[0, 0]), far_is(3000, 3000 - 2049, 3, &[])),
            // M4.
            ("4 from 16385 back", far(20_000, &[0x12, 4, 0]), far_is(20_000, 20_000 - 16_385, 4, &[])),
            ("9 from 32769", far(40_000, &[0x1f, 5, 0, b'!']), far_is(40_000, 40_000 - 32_769, 9, b"!")),
        ] {
            let found = unpack(&packed, expect.len());
            if what == "few literals first" {
                // It copies from one before the first byte.
                assert_eq!(found.unwrap_err().kind(), io::ErrorKind::InvalidData);
                continue;
            }
            assert_eq!(found.map_err(|e| format!("{what}: {e}")), Ok(expect.clone()));
            for len in [expect.len() - 1, expect.len() + 1] {
                unpack(&packed, len).expect_err(what);
            }
            for cut in 0..packed.len() {
                unpack(&packed[..cut], expect.len()).expect_err(what);
            }
        }
    }
}

//! What stands behind the last batch of a log whose volume was closed: what was written since its last snapshot.

use ami_core::Digest;

use super::{CHUNK, LOG_ALIGN, put, u32_at, u64_at};

const MAGIC: u32 = 0x4453_4c43;
/// Bytes before the records.
const HEADER: usize = 64;
const RECORD: usize = 8;
/// Records, at most. Who has changed more has the next snapshot compare all of it.
pub(crate) const CLOSING_MAX: usize = 65536;
/// Bytes that it may have.
pub(crate) const CLOSING_BYTES: usize = (HEADER + CLOSING_MAX * RECORD).next_multiple_of(LOG_ALIGN);

const _: () = assert!(HEADER == 64 && RECORD == 8 && CLOSING_MAX == 65536);

/// What a volume was when it was closed, with all that was written to it durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Closing {
    /// The last snapshot that was made of it.
    pub(crate) last: Digest,
    /// The chunks that have changed since, in order, with a bit for each block of theirs that has.
    pub(crate) changed: Vec<(u64, u16)>,
}

/// Behind so many batches of this log; `None` if there is too much to say.
pub(crate) fn encode_closing(log: u64, batches: u64, closing: &Closing) -> Option<Vec<u8>> {
    let Closing { last, changed } = closing;
    if changed.len() > CLOSING_MAX {
        return None;
    }
    let mut bytes = vec![0; len(changed.len())];
    put(&mut bytes, 0, &MAGIC.to_le_bytes());
    put(&mut bytes, 4, &(changed.len() as u32).to_le_bytes());
    put(&mut bytes, 8, &batches.to_le_bytes());
    put(&mut bytes, 16, &log.to_le_bytes());
    put(&mut bytes, 32, last.as_bytes());
    for ((chunk, blocks), at) in changed.iter().zip((HEADER..).step_by(RECORD)) {
        put(&mut bytes, at, &(chunk << 16 | u64::from(*blocks)).to_le_bytes());
    }
    let crc = crc(&bytes);
    put(&mut bytes, 24, &crc.to_le_bytes());
    Some(bytes)
}

/// What `bytes` begin with, if it was written behind so many batches of this log of a volume of this size.
pub(crate) fn parse_closing(log: u64, batches: u64, size: u64, bytes: &[u8]) -> Option<Closing> {
    if bytes.len() < LOG_ALIGN || u32_at(bytes, 0) != MAGIC {
        return None;
    }
    let count = u32_at(bytes, 4) as usize;
    if count > CLOSING_MAX || len(count) > bytes.len() {
        return None;
    }
    let bytes = &bytes[..len(count)];
    if (u64_at(bytes, 8), u64_at(bytes, 16), u32_at(bytes, 24)) != (batches, log, crc(bytes)) {
        return None;
    }
    let mut last = [0; Digest::LEN];
    last.copy_from_slice(&bytes[32..HEADER]);
    let records = bytes[HEADER..HEADER + count * RECORD].chunks_exact(RECORD).map(|record| u64_at(record, 0));
    let changed: Vec<(u64, u16)> = records.map(|record| (record >> 16, record as u16)).collect();
    let sound = changed.is_sorted_by(|before, after| before.0 < after.0)
        && changed.iter().all(|(chunk, blocks)| *blocks != 0 && *chunk < size.div_ceil(CHUNK));
    sound.then(|| Closing { last: Digest::from_bytes(last), changed })
}

fn len(count: usize) -> usize {
    (HEADER + count * RECORD).next_multiple_of(LOG_ALIGN)
}

/// Of all but itself.
fn crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..24]), &bytes[28..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_where_it_was() {
        let size = 100 * CHUNK - 4096;
        let closing =
            Closing { last: Digest::of(b"last"), changed: vec![(0, 1), (7, u16::MAX), (99, 0x7fff)] };
        let bytes = encode_closing(5, 3, &closing).unwrap();
        assert_eq!(bytes.len(), LOG_ALIGN);
        assert_eq!(parse_closing(5, 3, size, &bytes), Some(closing.clone()));
        assert_eq!(parse_closing(5, 3, size, &[&bytes[..], &[1; 512]].concat()), Some(closing.clone()));
        assert_eq!(parse_closing(6, 3, size, &bytes), None, "another log");
        assert_eq!(parse_closing(5, 4, size, &bytes), None, "a batch came behind it");
        assert_eq!(parse_closing(5, 3, size - CHUNK, &bytes), None, "beyond the end");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(parse_closing(5, 3, size, &changed), None, "byte {at}");
        }
        for changed in [vec![(1, 1), (1, 2)], vec![(2, 1), (1, 1)], vec![(1, 0)]] {
            let bytes = encode_closing(5, 3, &Closing { changed, ..closing.clone() }).unwrap();
            assert_eq!(parse_closing(5, 3, size, &bytes), None);
        }
        let most = Closing { changed: (0..CLOSING_MAX as u64).map(|chunk| (chunk, 1)).collect(), ..closing };
        let bytes = encode_closing(5, 3, &most).unwrap();
        assert_eq!(bytes.len(), CLOSING_BYTES);
        assert!(parse_closing(5, 3, 1 << 40, &bytes).is_some_and(|found| found == most));
        let more = Closing { changed: (0..CLOSING_MAX as u64 + 1).map(|chunk| (chunk, 1)).collect(), ..most };
        assert_eq!(encode_closing(5, 3, &more), None);
    }
}

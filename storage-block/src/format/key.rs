//! A wrapped data key, as it stands in the root of an encrypted snapshot and in the header of the log of an encrypted
//! volume.

use super::{Wrong, put, u16_at};

/// Bytes before the key's id.
const KEY_HEADER: usize = 12;
/// Bytes of the id of the key that wraps, at most.
pub(crate) const KEY_ID_MAX: usize = 256;
/// Bytes of a wrapped key, at most.
pub(crate) const WRAPPED_MAX: usize = 2048;
/// Bytes that tell a wrong data key from the right one.
pub(crate) const KEY_CHECK: usize = 8;
/// Bytes of the longest wrapped key with all that goes with it.
pub(crate) const KEY_MAX: usize = KEY_HEADER + KEY_ID_MAX + WRAPPED_MAX;

const _: () = assert!(KEY_HEADER == 12 && KEY_CHECK == 8 && KEY_ID_MAX == 256 && WRAPPED_MAX == 2048);

/// A data key that only the holder of another key can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WrappedKey {
    /// The key that wraps it.
    pub(crate) key_id: String,
    pub(crate) wrapped: Vec<u8>,
    /// What the data key says of itself.
    pub(crate) check: [u8; KEY_CHECK],
    /// It was wrapped for what it is stored with, and for nothing else: the version of the file says so.
    pub(crate) bound: bool,
}

/// The version of a file that has a key, or none.
pub(super) fn version_of(key: Option<&WrappedKey>) -> u32 {
    match key {
        None => 1,
        Some(key) if !key.bound => 2,
        Some(_) => 3,
    }
}

/// The lengths are those that [`parse_key`] takes.
pub(crate) fn encode_key(key: &WrappedKey) -> Vec<u8> {
    let mut bytes = vec![0; KEY_HEADER];
    put(&mut bytes, 0, &key.check);
    put(&mut bytes, 8, &(key.key_id.len() as u16).to_le_bytes());
    put(&mut bytes, 10, &(key.wrapped.len() as u16).to_le_bytes());
    bytes.extend_from_slice(key.key_id.as_bytes());
    bytes.extend_from_slice(&key.wrapped);
    bytes
}

/// The key that exactly `bytes` are.
pub(crate) fn parse_key(bytes: &[u8], bound: bool) -> Result<WrappedKey, Wrong> {
    let Some(check) = bytes.first_chunk::<KEY_CHECK>().filter(|_| bytes.len() >= KEY_HEADER) else {
        return Err(format!("its wrapped key has {} bytes", bytes.len()));
    };
    let (id, wrapped) = (usize::from(u16_at(bytes, 8)), usize::from(u16_at(bytes, 10)));
    if id > KEY_ID_MAX || wrapped > WRAPPED_MAX || KEY_HEADER + id + wrapped != bytes.len() {
        return Err(format!("its wrapped key says that it has {id} and {wrapped} bytes"));
    }
    let (id, wrapped) = bytes[KEY_HEADER..].split_at(id);
    let key_id = std::str::from_utf8(id).map_err(|_| "the id of its key is not UTF-8".to_owned())?;
    // The id goes into messages.
    if key_id.chars().any(char::is_control) {
        return Err("the id of its key has control characters".to_owned());
    }
    Ok(WrappedKey { key_id: key_id.to_owned(), wrapped: wrapped.to_vec(), check: *check, bound })
}

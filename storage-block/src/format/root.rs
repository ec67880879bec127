//! Snapshots' roots: version 1, and version 3 of snapshots that are encrypted, which carries the wrapped key; in version 2
//! that is not wrapped for its snapshot alone.

use ami_core::Digest;

use super::{
    CHUNK, Id, LEAF_IDS, MAX_SIZE, ROOT_HEADER, VERSION, WrappedKey, Wrong, check_magic, encode_key,
    leaf_count, parse_key, put, u32_at, u64_at,
};

const ROOT_MAGIC: &[u8; 8] = b"BLKSNAP\0";
/// How chunks are named.
const SHA_256: u32 = 1;
const HMAC_SHA_256: u32 = 2;

const _: () = assert!(SHA_256 == 1 && HMAC_SHA_256 == 2 && ROOT_HEADER == 64);

/// What a root says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootParts {
    pub(crate) size: u64,
    pub(crate) leaves: Vec<Id>,
    /// The key of an encrypted snapshot.
    pub(crate) key: Option<WrappedKey>,
}

pub(crate) fn encode_root(size: u64, leaves: &[Id], key: Option<&WrappedKey>) -> Vec<u8> {
    let mut bytes = vec![0; ROOT_HEADER];
    let version = super::key::version_of(key);
    let hash = if key.is_some() { HMAC_SHA_256 } else { SHA_256 };
    put(&mut bytes, 0, ROOT_MAGIC);
    put(&mut bytes, 8, &version.to_le_bytes());
    put(&mut bytes, 12, &hash.to_le_bytes());
    put(&mut bytes, 16, &(CHUNK as u32).to_le_bytes());
    put(&mut bytes, 20, &(LEAF_IDS as u32).to_le_bytes());
    put(&mut bytes, 24, &size.to_le_bytes());
    put(&mut bytes, 32, &(leaves.len() as u64).to_le_bytes());
    let key = key.map(encode_key).unwrap_or_default();
    put(&mut bytes, 40, &(key.len() as u32).to_le_bytes());
    bytes.extend_from_slice(leaves.as_flattened());
    bytes.extend_from_slice(&key);
    bytes
}

pub(crate) fn parse_root(bytes: &[u8]) -> Result<RootParts, Wrong> {
    let version = check_magic(bytes, ROOT_HEADER, ROOT_MAGIC, VERSION)?;
    let shape = (u32_at(bytes, 12), u32_at(bytes, 16), u32_at(bytes, 20));
    let hash = if version == 1 { SHA_256 } else { HMAC_SHA_256 };
    if shape != (hash, CHUNK as u32, LEAF_IDS as u32) {
        return Err(format!("its hash, chunk size and leaf size are {shape:?}"));
    }
    let (size, leaves) = (u64_at(bytes, 24), u64_at(bytes, 32));
    if size % crate::SECTOR != 0 || size > MAX_SIZE || leaves != leaf_count(size) {
        return Err(format!("it speaks of {size} bytes in {leaves} leaves"));
    }
    let rest = &bytes[ROOT_HEADER..];
    let ids = leaves as usize * Digest::LEN;
    // What version 1 has at the place of the key's length means nothing there.
    let key_len = if version == 1 { 0 } else { u32_at(bytes, 40) as usize };
    if rest.len().checked_sub(key_len) != Some(ids) {
        return Err(format!(
            "it has {} bytes for the ids of {leaves} leaves and {key_len} bytes of key",
            rest.len()
        ));
    }
    let (ids, key) = rest.split_at(ids);
    let key = if version == 1 { None } else { Some(parse_key(key, version >= 3)?) };
    Ok(RootParts { size, leaves: super::split_ids(ids), key })
}

//! SHA-256 of files and strings, in hexadecimal.

use std::fs::File;
use std::io;
use std::path::Path;

use ami_core::DigestWriter;
use anyhow::Context as _;

/// The digest of a file's content.
pub(crate) fn of_file(path: &Path) -> anyhow::Result<String> {
    let context = || format!("cannot read {}", path.display());
    let mut hasher = DigestWriter::new();
    io::copy(&mut File::open(path).with_context(context)?, &mut hasher).with_context(context)?;
    Ok(hasher.finish().to_hex())
}

/// The digest of several texts, each told apart from the next.
pub(crate) fn of_texts(texts: &[&str]) -> String {
    let mut hasher = DigestWriter::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finish().to_hex()
}

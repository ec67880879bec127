//! Real data to measure with: what the files of this machine hold, one after the other, each from a multiple
//! of 4096 on as a file system would lay it out. Neither zeroes nor noise: some of it repeats itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::BLOCK;

/// Makes an image of so many bytes in `dir`, unless it is there.
///
/// # Errors
///
/// When this machine's files do not suffice, and what the file system says.
pub fn prepare(dir: &Path, bytes: u64) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("corpus-{bytes}.raw"));
    if path.exists() {
        return Ok(path);
    }
    let unfinished = path.with_extension("tmp");
    let file =
        File::create(&unfinished).with_context(|| format!("cannot create {}", unfinished.display()))?;
    let mut corpus = Corpus { out: io::BufWriter::with_capacity(1 << 20, file), left: bytes };
    for source in sources() {
        corpus.add(&source)?;
    }
    ensure!(corpus.left == 0, "the files of this machine hold {} bytes too few to measure with", corpus.left);
    corpus.out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&unfinished, &path)?;
    Ok(path)
}

/// The first `bytes` of an image in a file of its own, written in pieces of a MiB.
///
/// # Errors
///
/// What the file system says.
pub fn copy(image: &Path, to: &Path, bytes: u64) -> anyhow::Result<File> {
    let from = File::open(image)?;
    let to = File::options().read(true).write(true).create_new(true).open(to)?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(buf.len() as u64) as usize;
        from.read_exact_at(&mut buf[..len], at)?;
        to.write_all_at(&buf[..len], at)?;
        at += len as u64;
    }
    Ok(to)
}

/// Where files are looked for: the system, what cargo has fetched, what it has built.
fn sources() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release");
    [Some(PathBuf::from("/usr")), home.map(|home| home.join("registry")), Some(built)]
        .into_iter()
        .flatten()
        .collect()
}

struct Corpus {
    out: io::BufWriter<File>,
    left: u64,
}

impl Corpus {
    /// Adds a file, or all files below a directory, in the order of their names. What cannot be read, or
    /// is neither, is left out.
    fn add(&mut self, path: &Path) -> io::Result<()> {
        let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
        if self.left == 0 {
            return Ok(());
        }
        if metadata.is_dir() {
            let Ok(entries) = path.read_dir() else { return Ok(()) };
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort_unstable();
            return paths.iter().try_for_each(|path| self.add(path));
        }
        match File::open(path) {
            Ok(file) if metadata.is_file() => self.append(&file),
            _ => Ok(()),
        }
    }

    fn append(&mut self, file: &File) -> io::Result<()> {
        let added = io::copy(&mut file.take(self.left), &mut self.out)?;
        let padding = added.next_multiple_of(BLOCK).min(self.left) - added;
        self.out.write_all(&[0; BLOCK as usize][..padding as usize])?;
        self.left -= added + padding;
        Ok(())
    }
}

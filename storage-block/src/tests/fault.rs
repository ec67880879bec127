//! Files that cannot be read in places, as on a disk with bad sectors, or of which somebody wants to know when they are.

use std::fs::File;
use std::io::{self, Seek as _};
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::store::lock;

/// What comes of reads of a part of a file, whatever its name is, as long as this lives.
pub(crate) struct Bad {
    file: (u64, u64),
    at: u64,
}

type Act = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

struct Place {
    file: (u64, u64),
    range: Range<u64>,
    act: Act,
}

/// Those of all tests, which run side by side.
static PLACES: Mutex<Vec<Place>> = Mutex::new(Vec::new());

impl Bad {
    /// They fail.
    pub(crate) fn new(path: &Path, range: Range<u64>, error: Errno) -> Self {
        Self::act(path, range, move || Err(error.into()))
    }

    /// This is done before each, which fails if it does.
    pub(crate) fn act(
        path: &Path,
        range: Range<u64>,
        act: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let (file, at) = (id_of(&File::open(path).unwrap()).unwrap(), range.start);
        lock(&PLACES).push(Place { file, range, act: Arc::new(act) });
        Self { file, at }
    }
}

impl Drop for Bad {
    fn drop(&mut self) {
        lock(&PLACES).retain(|place| (place.file, place.range.start) != (self.file, self.at));
    }
}

fn id_of(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// What comes of a read there, before it is done.
pub(crate) fn check(file: &File, offset: u64, len: usize) -> io::Result<()> {
    let act = {
        let places = lock(&PLACES);
        if places.is_empty() {
            return Ok(());
        }
        let (file, end) = (id_of(file)?, offset + len as u64);
        let meets =
            |place: &&Place| place.file == file && place.range.start < end && offset < place.range.end;
        places.iter().find(meets).map(|place| Arc::clone(&place.act))
    };
    act.map_or(Ok(()), |act| act())
}

/// The same of a read from where the last one has ended.
pub(crate) fn check_next(mut file: &File, len: usize) -> io::Result<()> {
    check(file, file.stream_position()?, len)
}

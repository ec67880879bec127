//! Disks served over NBD, by this library and by `qemu-nbd`, and worked on by fio.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use storage_block::{RawFile, nbd};

use super::{Bench, GIB, corpus, evict};
use crate::samples::{Measurement, median_speed};

/// What fio is told to do.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// fio's name of it.
    pub rw: &'static str,
    /// Bytes of a request.
    pub block: u64,
    /// Requests under way at once.
    pub depth: u32,
    /// Bytes of all requests.
    pub total: u64,
}

/// The jobs that have a bar.
pub const READ_4K: Job = Job { rw: "randread", block: 4096, depth: 32, total: 256 << 20 };
/// As the one before, but writing.
pub const WRITE_4K: Job = Job { rw: "randwrite", ..READ_4K };
/// Large requests.
pub const READ_1M: Job = Job { rw: "read", block: 1 << 20, depth: 4, total: GIB };
/// As the one before, but writing.
pub const WRITE_1M: Job = Job { rw: "write", ..READ_1M };

impl Job {
    /// Has fio do it with what is served on `socket`; how long that took without fio's own start.
    ///
    /// # Errors
    ///
    /// When there is no fio, and what it says.
    pub fn run(self, bench: &Bench, socket: &Path) -> anyhow::Result<Duration> {
        #[derive(Deserialize)]
        struct Said {
            jobs: Vec<Done>,
        }
        #[derive(Deserialize)]
        struct Done {
            error: i32,
            read: Direction,
            write: Direction,
        }
        #[derive(Deserialize)]
        struct Direction {
            bw_bytes: u64,
        }
        let total = bench.bytes(self.total);
        let mut fio = Command::new("fio");
        fio.args(["--name=job", "--ioengine=nbd", "--output-format=json", "--randrepeat=1", "--norandommap"]);
        fio.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
        fio.arg(format!("--rw={}", self.rw)).arg(format!("--bs={}", self.block));
        fio.arg(format!("--iodepth={}", self.depth)).arg(format!("--size={}", bench.bytes(GIB)));
        let output =
            fio.arg(format!("--io_size={total}")).stdin(Stdio::null()).output().context("cannot run fio")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        // It may say other things first.
        let json = text.find('{').map_or("", |at| &text[at..]);
        let said: Said = serde_json::from_str(json).context("fio said something odd")?;
        let done = said.jobs.first().context("fio did nothing")?;
        ensure!(done.error == 0, "fio met error {}", done.error);
        let speed = done.read.bw_bytes.max(done.write.bw_bytes);
        ensure!(speed > 0, "fio has moved nothing");
        Ok(Duration::from_secs_f64(total as f64 / speed as f64))
    }
}

/// A `qemu-nbd`, ended when dropped.
#[derive(Debug)]
pub struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    /// Serves an image on a new socket.
    ///
    /// # Errors
    ///
    /// When there is no `qemu-nbd`, or it does not begin to serve within ten seconds.
    pub fn serve(image: &Path, format: &str, socket: PathBuf) -> anyhow::Result<Self> {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--cache=writeback", "--aio=threads", "--discard=unmap"]);
        command.arg(format!("--format={format}")).arg("--socket").arg(&socket).arg(image);
        // It complains of clients that come only to see whether it is there.
        let complaints = socket.with_extension("log");
        command.stdin(Stdio::null()).stderr(File::create(&complaints)?);
        let child = command.spawn().context("cannot run qemu-nbd")?;
        let mut served = Self { child, socket };
        let begun = Instant::now();
        while UnixStream::connect(&served.socket).is_err() {
            if let Some(status) = served.child.try_wait()? {
                bail!("qemu-nbd ended with {status}: {}", std::fs::read_to_string(&complaints)?.trim());
            }
            ensure!(begun.elapsed() < Duration::from_secs(10), "qemu-nbd does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(served)
    }

    /// Where it serves.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All serve one and the same file, so that no file is in the better place.
fn beside_qemu(bench: &Bench, job: Job) -> anyhow::Result<Measurement> {
    let dir = bench.temp_dir()?;
    let image = dir.path().join("disk.raw");
    corpus::copy(&bench.image(GIB)?, &image, bench.bytes(GIB))?;
    evict(&image)?;
    std::io::copy(&mut File::open(&image)?, &mut std::io::sink())?;
    let socket = dir.path().join("own.sock");
    let _own = nbd::Server::bind(&socket, RawFile::open(&image, false)?.into_disk())?;
    let theirs = QemuNbd::serve(&image, "raw", dir.path().join("qemu.sock"))?;
    let again = QemuNbd::serve(&image, "raw", dir.path().join("again.sock"))?;
    let run = |socket: &Path| {
        let took = job.run(bench, socket)?;
        // No side has the other's writes in its time.
        File::open(&image)?.sync_all()?;
        Ok(took)
    };
    median_speed(
        bench.rounds(7),
        ("own server", &mut || run(&socket)),
        ("qemu-nbd", &mut || run(theirs.socket())),
        ("qemu-nbd again", &mut || run(again.socket())),
    )
}

pub(super) fn read_4k(bench: &Bench) -> anyhow::Result<Measurement> {
    beside_qemu(bench, READ_4K)
}

pub(super) fn write_4k(bench: &Bench) -> anyhow::Result<Measurement> {
    beside_qemu(bench, WRITE_4K)
}

pub(super) fn read_1m(bench: &Bench) -> anyhow::Result<Measurement> {
    beside_qemu(bench, READ_1M)
}

pub(super) fn write_1m(bench: &Bench) -> anyhow::Result<Measurement> {
    beside_qemu(bench, WRITE_1M)
}

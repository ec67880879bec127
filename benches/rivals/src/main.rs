//! `measure-rivals NAME [DIR [quick]]`: how fast volumes are in units of the speed of others who do the same
//! work. A crate of its own, so that nobody else compiles the others.
//!
//! Each has the same gigabyte of real data below it and begins as a copy-on-write clone of that: a volume of
//! a snapshot here, a qcow2 overlay of the raw file there, which `imago` opens in this process or `qemu-nbd`
//! serves beside it.

mod images;
mod imago_disk;
mod overlays;

use std::cell::Cell;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ami_benches::samples::{Measurement, median_ratio};
use ami_benches::storage::Bench;
use ami_benches::storage::blocks::{Side, read_blocks, sequentially, shuffled, write_blocks};
use ami_benches::storage::nbd::{self, Job, QemuNbd};
use anyhow::bail;
use overlays::Overlays;
use storage_block::nbd::Server;

const BLOCK: u64 = 4096;
const MIB: usize = 1 << 20;

fn main() -> ExitCode {
    ami_benches::run(measure)
}

fn measure(name: &str, bench: &Bench) -> anyhow::Result<Measurement> {
    match name {
        "clone_beside_qemu_img" => clone(bench),
        "random_read_beside_imago" => random_read(bench, 1),
        "random_read_depth_32_beside_imago" => random_read(bench, 32),
        "random_overwrite_beside_imago" => random_overwrite(bench),
        "random_overwrite_first_beside_imago" => random_overwrite_first(bench),
        "sequential_read_beside_imago" => sequential_read(bench),
        "sequential_write_beside_imago" => sequential_write(bench),
        "import_beside_qemu_img" => images::import_beside_qemu_img(bench),
        "snapshot_beside_qemu_img" => images::snapshot_beside_qemu_img(bench),
        "space_of_20_clones_beside_qcow2" => images::space_of_20_clones(bench),
        "nbd_read_4k_beside_qcow2" => over_nbd(bench, nbd::READ_4K),
        "nbd_write_4k_beside_qcow2" => over_nbd(bench, nbd::WRITE_4K),
        "nbd_read_1m_beside_qcow2" => over_nbd(bench, nbd::READ_1M),
        "nbd_write_1m_beside_qcow2" => over_nbd(bench, nbd::WRITE_1M),
        _ => bail!("there is no measurement {name:?}"),
    }
}

/// Most of what `qemu-img` takes is its start; whoever uses it waits for that as well.
fn clone(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let mut theirs = || {
        let begun = Instant::now();
        let overlay = overlays.qcow2()?;
        std::fs::File::open(&overlay)?.sync_all()?;
        Ok(begun.elapsed())
    };
    let mut ours = || {
        let begun = Instant::now();
        let volume = overlays.volume()?;
        let took = begun.elapsed();
        volume.delete()?;
        Ok(took)
    };
    median_ratio(bench.rounds(15), ("qemu-img", &mut theirs), ("volume", &mut ours))
}

/// What was done to all of a clone before it is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// A volume's chunks are verified when they are first read, which a figure of its own shows.
    Read,
    /// Nothing of it is the image's any more.
    Written,
}

/// Times `work`, which is told the round, on an overlay that imago has open and on a volume.
fn beside_imago(
    bench: &Bench,
    overlays: &Overlays<'_>,
    begun: Begun,
    mut work: impl FnMut(&Side, u64) -> anyhow::Result<Duration>,
) -> anyhow::Result<Measurement> {
    let volume = overlays.volume()?;
    let (theirs, ours) = (Side::Disk(imago_disk::open(&overlays.qcow2()?)?), Side::Disk(volume.disk()));
    overlays.warm()?;
    let mut buf = vec![0; MIB];
    for side in [&theirs, &ours] {
        for at in (0..side.size()).step_by(MIB) {
            side.read_at(&mut buf, at)?;
            if begun == Begun::Written {
                side.write_at(&buf, at)?;
            }
        }
        side.flush()?;
    }
    let work = std::cell::RefCell::new(&mut work);
    let numbered = |side: Side| {
        let (work, round) = (&work, Cell::new(0));
        move || {
            round.set(round.get() + 1);
            (*work.borrow_mut())(&side, round.get() - 1)
        }
    };
    let (mut theirs, mut ours) = (numbered(theirs), numbered(ours));
    median_ratio(bench.rounds(9), ("imago", &mut theirs), ("volume", &mut ours))
}

fn random_read(bench: &Bench, depth: u64) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    beside_imago(bench, &overlays, Begun::Read, |side, round| {
        read_blocks(side, bench.bytes(100_000), depth, round)
    })
}

fn sequential_read(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let mut buf = vec![0; MIB];
    beside_imago(bench, &overlays, Begun::Read, |side, round| {
        sequentially(side, round, |side, at| side.read_at(&mut buf, at))
    })
}

/// Where all has been written to before.
fn sequential_write(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let buf = vec![0x5a; MIB];
    beside_imago(bench, &overlays, Begun::Written, |side, round| {
        let took = sequentially(side, round, |side, at| side.write_at(&buf, at));
        side.flush()?;
        took
    })
}

/// Blocks that nothing was written to before.
fn random_overwrite_first(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let order = shuffled(overlays.size() / BLOCK);
    let writes = bench.bytes(8192) as usize;
    beside_imago(bench, &overlays, Begun::Read, |side, round| {
        let blocks = &order[round as usize * writes..][..writes];
        write_blocks(side, blocks.iter().copied())
    })
}

/// The same blocks in each round: the first, which does not count, has written to them.
fn random_overwrite(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let order = shuffled(overlays.size() / BLOCK);
    let blocks = &order[..bench.bytes(8192) as usize];
    beside_imago(bench, &overlays, Begun::Read, |side, _| write_blocks(side, blocks.iter().copied()))
}

/// What fio makes of a new clone each time.
fn over_nbd(bench: &Bench, job: Job) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let run = |socket: &Path| job.run(bench, socket);
    let mut theirs =
        || run(QemuNbd::serve(&overlays.qcow2()?, "qcow2", overlays.path("qemu.sock"))?.socket());
    let mut ours = || {
        let volume = overlays.volume()?;
        let socket = overlays.path("own.sock");
        let server = Server::bind(&socket, volume.disk())?;
        let took = run(&socket);
        drop(server);
        volume.delete()?;
        took
    };
    median_ratio(bench.rounds(5), ("qemu-nbd", &mut theirs), ("own server", &mut ours))
}

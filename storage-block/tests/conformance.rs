//! All disks of this crate behave alike.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use storage_block::keys::LocalKey;
use storage_block::{
    BlockBackend, Capabilities, Compression, Disk, IoLimits, Limiter, MemoryDisk, Rate, RawFile, Result,
    Store, StoreOptions, Volume, VolumeOptions, testing,
};

#[test]
fn memory() {
    testing::conformance(|size| MemoryDisk::new(size).unwrap().into_disk());
}

#[test]
fn raw_file() {
    let dir = tempfile::tempdir().unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        RawFile::create(dir.path().join(made.get().to_string()), size).unwrap().into_disk()
    });
}

/// A block device that is a file, for as long as it is held.
struct Loop(String);

impl Loop {
    fn new(file: &Path, sector: u32) -> Option<Self> {
        let sector = format!("--sector-size={sector}");
        let made = Command::new("losetup").args(["--find", "--show", &sector]).arg(file).output();
        let why = match made {
            Ok(made) if made.status.success() => {
                let path = String::from_utf8(made.stdout).unwrap();
                return Some(Self(path.trim().to_owned()));
            }
            Ok(made) => String::from_utf8_lossy(&made.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        assert!(std::env::var_os("CI").is_none(), "no loop device can be made, and CI needs one: {why}");
        eprintln!("SKIPPED: no loop device can be made; block devices are not tested: {why}");
        None
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// A device takes ranges of its own blocks alone to be zeroed; any byte may be a request's first and last all the same.
#[test]
fn block_device() {
    for sector in [512, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::File::create_new(&file).unwrap().set_len(3 << 20).unwrap();
        // Before anything else is made, so that there is a place to say that there is none.
        let Some(probe) = Loop::new(&file, sector) else { return };
        let found = RawFile::open(&probe.0, false).unwrap().into_disk().capabilities();
        assert!(
            found.discard_frees && found.cheap_zeroes && found.in_files && !found.knows_holes,
            "{found:?}"
        );
        assert_eq!((found.logical_block, found.physical_block), (512, 4096));
        let (made, devices) = (Cell::new(0), RefCell::new(vec![probe]));
        testing::conformance(|size| {
            made.set(made.get() + 1);
            let file = dir.path().join(made.get().to_string());
            std::fs::File::create_new(&file).unwrap().set_len(size).unwrap();
            let device = Loop::new(&file, sector).expect("one more loop device");
            let disk = RawFile::open(&device.0, false).unwrap().into_disk();
            devices.borrow_mut().push(device);
            disk
        });
    }
}

/// A file system that lives in memory, until it is dropped.
struct Mounted(tempfile::TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Some file systems give nothing back, and zeroes are then written like any other bytes.
#[test]
fn raw_file_where_no_holes_are_punched() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(dir.path()).status();
    if !mount.is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("CI").is_none(), "a ramfs cannot be mounted, and CI needs one");
        eprintln!("SKIPPED: a ramfs cannot be mounted; files without holes are not tested");
        return;
    }
    let mounted = Mounted(dir);
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        let disk = RawFile::create(mounted.0.path().join(made.get().to_string()), size).unwrap().into_disk();
        let Capabilities { cheap_zeroes, discard_frees, .. } = disk.capabilities();
        assert!(!cheap_zeroes && !discard_frees);
        disk
    });
}

#[test]
fn empty_volume() {
    let dir = tempfile::tempdir().unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        Volume::create(&dir.path().join(made.get().to_string()), None, size).unwrap().disk()
    });
}

/// A volume whose snapshot holds bytes everywhere, all of which have been zeroed.
#[test]
fn zeroed_clone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        let image = MemoryDisk::from_vec(vec![0xaa; size as usize - 512]).unwrap().into_disk();
        let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
        let volume = Volume::create(&dir.path().join(made.get().to_string()), Some(&snapshot), size).unwrap();
        volume.disk().discard(0, size).unwrap();
        volume.disk()
    });
}

/// A snapshot with holes, and a volume of it in all three states.
#[test]
fn snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes: Vec<u8> = (0..(1u32 << 20) + 512).map(|n| (n / 7) as u8).collect();
    bytes[200_000..500_000].fill(0);
    let (base, _) =
        store.import(&MemoryDisk::from_vec(bytes.clone()).unwrap().into_disk(), &mut |_| ()).unwrap();
    testing::read_only(&base.disk(), &bytes);

    let volume = Volume::create(&dir.path().join("volume"), Some(&base), 2 << 20).unwrap();
    bytes.resize(2 << 20, 0);
    for (offset, len) in [(5000, 3), (65_000, 9000), (300_000, 5000), (1_040_000, 20_000)] {
        volume.disk().write_at(&vec![9; len], offset as u64).unwrap();
        bytes[offset..offset + len].fill(9);
        volume.disk().discard(offset as u64 + 70_000, 8192).unwrap();
        bytes[offset + 70_000..offset + 78_192].fill(0);
    }
    let (next, _) = volume.snapshot(&store).unwrap();
    testing::read_only(&next.disk(), &bytes);
}

/// Compressed, and encrypted: neither lies in a file as it is.
#[test]
fn encoded() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new()
        .compression(Compression::WherePays { percent: 10 })
        .keys(Arc::new(LocalKey::generate().unwrap()));
    let store = Store::open_with(dir.path().join("store"), &options).unwrap();
    let mut bytes: Vec<u8> = (0..(1u32 << 20)).map(|n| (n / 7) as u8).collect();
    bytes[200_000..500_000].fill(0);
    let image = MemoryDisk::from_vec(bytes.clone()).unwrap().into_disk();
    let (base, _) = store.import(&image, &mut |_| ()).unwrap();
    testing::read_only(&base.disk(), &bytes);

    let key = store.new_key(None).unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        let path = dir.path().join(made.get().to_string());
        let volume =
            VolumeOptions::new().encrypt(&key).create(&path, Some(&base), size.max(1 << 20)).unwrap();
        assert!(volume.encrypted());
        volume.disk().discard(0, volume.size()).unwrap();
        volume.disk()
    });
    let path = dir.path().join("volume");
    let volume = VolumeOptions::new().encrypt(&key).create(&path, Some(&base), 1 << 20).unwrap();
    volume.disk().write_at(&[9; 30_000], 180_000).unwrap();
    bytes[180_000..210_000].fill(9);
    let (next, _) = volume.snapshot(&store).unwrap();
    testing::read_only(&next.disk(), &bytes);
}

#[test]
fn limited() {
    let all = Rate { per_second: 1 << 30, burst: 1 << 20 };
    let limiter = Limiter::new(IoLimits { ops: Some(all), bytes: Some(all) });
    let dir = tempfile::tempdir().unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        let disk = RawFile::create(dir.path().join(made.get().to_string()), size).unwrap().into_disk();
        disk.limited(&limiter).limited(&Limiter::new(IoLimits::NONE))
    });
}

/// A backend that has what it must have and nothing else, and takes no long requests.
#[derive(Debug)]
struct Least(Disk);

impl BlockBackend for Least {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.max_request = 5000;
        capabilities
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!((1..=5000).contains(&buf.len()), "a read of {} bytes", buf.len());
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        assert!((1..=5000).contains(&buf.len()), "a write of {} bytes", buf.len());
        self.0.write_at(buf, offset)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }
}

#[test]
fn what_a_backend_has_by_default() {
    testing::conformance(|size| Disk::new(Least(MemoryDisk::new(size).unwrap().into_disk())).unwrap());
}

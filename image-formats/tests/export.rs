//! Images that are exported are what QEMU thinks they should be.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;

use common::{KIB, MIB, Small, check, content, data, disk, go_on, have_qemu_img, qemu_img, raw_file};
use image_formats::{Compression, ErrorKind, ExportOptions, Format, export, open};
use storage_block::{Disk, MemoryDisk, RawFile, Store, Volume};

/// All there is to choose, with names for it.
fn kinds() -> Vec<(ExportOptions, Format)> {
    let qcow2 = |compression, size| {
        (ExportOptions::new(Format::Qcow2).compression(compression).cluster_size(size), Format::Qcow2)
    };
    let vmdk = |compression| (ExportOptions::new(Format::Vmdk).compression(compression), Format::Vmdk);
    let mut kinds = vec![(ExportOptions::new(Format::Raw), Format::Raw)];
    for compression in [Compression::None, Compression::Zlib, Compression::Zstd] {
        kinds.extend([512, 4 << 10, 64 << 10, 2 << 20].map(|size| qcow2(compression, size)));
    }
    kinds.extend([vmdk(Compression::None), vmdk(Compression::Zlib)]);
    kinds
}

#[test]
fn reads_back_equal_here_and_with_qemu() {
    let qemu = have_qemu_img();
    for size in [512, 3 * MIB + 3 * 512, 64 * KIB, 9 * MIB] {
        let dir = tempfile::tempdir().unwrap();
        let bytes = content(size);
        let raw = dir.path().join("disk.raw");
        raw_file(&raw, &bytes);
        for (options, format) in kinds() {
            let what = format!("{size} bytes, {options:?}");
            let path = dir.path().join("image");
            let stats = export(&disk(&bytes), &path, &options, &mut go_on).unwrap();
            assert_eq!(stats.size, size as u64);
            check(&open(&path, format).unwrap(), &bytes, &what);
            if qemu {
                let [raw, path] = [&raw, &path].map(|path| path.to_str().unwrap());
                let format = format.to_string();
                qemu_img(&["compare", "-f", "raw", "-F", &format, raw, path]);
                if format != "raw" {
                    let said = qemu_img(&["check", "-f", &format, path]);
                    assert!(said.contains("No errors were found"), "{what}: {said}");
                }
            }
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Wherever the room ends, in the data or in the tables behind it.
#[test]
fn an_image_that_does_not_fit_leaves_nothing() {
    let bytes = content(3 * MIB + 3 * 512);
    for (options, format) in kinds() {
        let Some(large) = Small::mount(16 << 20) else { return };
        let whole = large.0.path().join("image");
        let stats = export(&disk(&bytes), &whole, &options, &mut go_on).unwrap();
        let pages = stats.file_bytes.div_ceil(4096);
        for room in [1, pages / 2, pages - 2, pages - 1, pages + 16] {
            let what = format!("{options:?} with {room} of {pages} pages");
            let Some(small) = Small::mount(room * 4096) else { return };
            let path = small.0.path().join("image");
            let exported = export(&disk(&bytes), &path, &options, &mut go_on);
            assert_eq!(exported.is_ok(), room > pages, "{what}");
            if room > pages {
                exported.unwrap();
                check(&open(&path, format).unwrap(), &bytes, &what);
            } else {
                let error = exported.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
                assert_eq!(std::fs::read_dir(small.0.path()).unwrap().count(), 0, "{what}");
            }
        }
    }
}

/// A volume that grows while it is exported, and is written to there, is exported as large as it was.
#[test]
fn a_disk_that_grows_meanwhile_is_exported_as_it_began() {
    for (number, (options, format)) in kinds().into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::create(&dir.path().join("volume"), None, 2 * MIB as u64).unwrap();
        let disk = volume.disk();
        disk.write_at(&[7; 4 * KIB], 0).unwrap();
        let path = dir.path().join(number.to_string());
        let mut calls = 0;
        let stats = export(&disk, &path, &options, &mut |_| {
            calls += 1;
            assert!(calls < 100, "{options:?}: it does not end");
            volume.grow(4 * MIB as u64).unwrap();
            disk.write_at(&[9; 4 * KIB], 3 * MIB as u64).unwrap();
            ControlFlow::Continue(())
        });
        let mut expected = vec![0; 2 * MIB];
        expected[..4 * KIB].fill(7);
        assert_eq!(stats.unwrap().size, 2 * MIB as u64);
        check(&open(&path, format).unwrap(), &expected, &format!("{options:?}"));
    }
}

#[test]
fn packed_images_are_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(8 * MIB);
    let mut sizes = Vec::new();
    for (options, _) in kinds() {
        let path = dir.path().join("image");
        export(&disk(&bytes), &path, &options, &mut go_on).unwrap();
        sizes.push((std::fs::metadata(&path).unwrap().len(), options));
        std::fs::remove_file(path).unwrap();
    }
    // The default of 64 KiB.
    let [none, zlib, zstd] = [3, 7, 11].map(|kind| sizes[kind].0);
    assert!(zlib < none / 2 && zstd < none / 2 + none / 10, "{none} {zlib} {zstd}");
    let [sparse, stream] = [13, 14].map(|kind| sizes[kind].0);
    assert!(stream < sparse / 2, "{sparse} {stream}");
}

/// A snapshot of a large disk, with data at both ends.
fn large(dir: &std::path::Path, size: u64) -> Disk {
    let path = dir.join("large.raw");
    let raw = RawFile::create(path, size).unwrap().into_disk();
    raw.write_at(b"at the beginning", 512).unwrap();
    raw.write_at(b"at the end", size - 512).unwrap();
    let store = Store::open(dir.join("store")).unwrap();
    let (snapshot, _) = store.import(&raw, &mut |_| ()).unwrap();
    snapshot.disk()
}

#[test]
fn large_disks_are_cheap() {
    let dir = tempfile::tempdir().unwrap();
    let size = 1 << 40;
    let disk = large(dir.path(), size);
    for (options, format) in kinds() {
        let path = dir.path().join("image");
        let begun = std::time::Instant::now();
        match export(&disk, &path, &options, &mut go_on) {
            Ok(stats) => assert!(stats.file_bytes < 32 << 20, "{options:?}: {stats:?}"),
            // The L1 table would be too large for QEMU.
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::InvalidOption);
                assert!(format!("{options:?}").contains("Some(512)"), "{options:?}");
                continue;
            }
        }
        let image = open(&path, format).unwrap();
        assert_eq!(image.size(), size);
        let mut buf = [0; 10];
        image.read_at(&mut buf, size - 512).unwrap();
        assert_eq!(&buf, b"at the end", "{options:?}");
        assert!(data(&image) <= 4 << 20, "{options:?}");
        assert!(begun.elapsed().as_secs() < 20, "{options:?}: {:?}", begun.elapsed());
        if have_qemu_img() && format != Format::Raw {
            qemu_img(&["check", "-f", &format.to_string(), path.to_str().unwrap()]);
        }
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn raw_images_are_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let disk = MemoryDisk::new(64 << 20).unwrap().into_disk();
    disk.write_at(&[1], 32 << 20).unwrap();
    export(&disk, &path, &ExportOptions::new(Format::Raw), &mut go_on).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 64 << 20);
    assert!(metadata.blocks() * 512 <= 128 << 10);
}

#[test]
fn progress_comes_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(&content(9 * MIB + 512));
    for (number, (options, _)) in kinds().into_iter().enumerate() {
        let mut seen = Vec::new();
        let mut report = |p: image_formats::Progress| {
            assert_eq!(p.total, disk.size());
            seen.push(p.done);
            ControlFlow::Continue(())
        };
        export(&disk, dir.path().join(number.to_string()), &options, &mut report).unwrap();
        assert!(seen.is_sorted() && seen.last() == Some(&disk.size()) && seen.len() > 4, "{seen:?}");
    }
}

#[test]
fn nothing_is_left_of_what_fails() {
    let dir = tempfile::tempdir().unwrap();
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let path = dir.path().join("image");
    let disk = disk(&content(4 * MIB));
    for (options, _) in kinds() {
        let mut calls = 0;
        let mut stop = |_| {
            calls += 1;
            if calls < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let stopped = export(&disk, &path, &options, &mut stop);
        assert_eq!(stopped.err().map(|e| e.kind()), Some(ErrorKind::Cancelled), "{options:?}");
        assert_eq!(names(), 0, "{options:?}");
        // A disk that cannot be read to its end.
        let broken = export(&Broken::disk(), &path, &options, &mut go_on);
        assert_eq!(broken.err().map(|e| e.kind()), Some(ErrorKind::Io), "{options:?}");
        assert_eq!(names(), 0, "{options:?}");
    }
    let nowhere = export(&disk, dir.path().join("no/image"), &kinds()[0].0, &mut go_on);
    assert_eq!(nowhere.err().map(|e| e.kind()), Some(ErrorKind::NotFound));
}

#[test]
fn another_file_is_replaced_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, "mine").unwrap();
    let disk = disk(&content(MIB));
    for (options, format) in kinds() {
        let refused = export(&disk, &path, &options, &mut go_on).err().map(|e| e.kind());
        assert_eq!(refused, Some(ErrorKind::AlreadyExists));
        let stopped = export(&disk, &path, &options.clone().replace(true), &mut |_| ControlFlow::Break(()));
        assert_eq!(stopped.err().map(|e| e.kind()), Some(ErrorKind::Cancelled));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        export(&disk, &path, &options.replace(true), &mut go_on).unwrap();
        check(&open(&path, format).unwrap(), &content(MIB), "replaced");
        std::fs::write(&path, "mine").unwrap();
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(&content(MIB));
    let new = ExportOptions::new;
    for options in [
        new(Format::Raw).compression(Compression::Zlib),
        new(Format::Raw).cluster_size(65536),
        new(Format::Vmdk).compression(Compression::Zstd),
        new(Format::Vmdk).cluster_size(65536),
        new(Format::Qcow2).cluster_size(0),
        new(Format::Qcow2).cluster_size(256),
        new(Format::Qcow2).cluster_size(65537),
        new(Format::Qcow2).cluster_size(4 << 20),
    ] {
        let refused = export(&disk, dir.path().join("image"), &options, &mut go_on);
        assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::InvalidOption), "{options:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// A disk whose end cannot be read.
#[derive(Debug)]
struct Broken;

impl Broken {
    fn disk() -> Disk {
        Disk::new(Self).unwrap()
    }
}

impl storage_block::BlockBackend for Broken {
    fn size(&self) -> u64 {
        4 << 20
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
        buf.fill(1);
        match offset {
            ..2_000_000 => Ok(()),
            _ => Err(storage_block::Error::new(storage_block::ErrorKind::Io, "a bad sector")),
        }
    }

    fn write_at(&self, _: &[u8], _: u64) -> storage_block::Result<()> {
        unreachable!("it is read-only")
    }

    fn write_zeroes(&self, _: u64, _: u64) -> storage_block::Result<()> {
        unreachable!("it is read-only")
    }

    fn flush(&self) -> storage_block::Result<()> {
        Ok(())
    }
}

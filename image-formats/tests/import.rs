//! Images that QEMU makes are read as it reads them.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;

use common::{KIB, MIB, check, content, data, disk, go_on, have_qemu_img, qemu_img, raw_file};
use image_formats::{ErrorKind, ExportOptions, Format, OpenOptions, export, open};
use storage_block::Store;

/// Has `qemu-img` make an image of a disk of 9 MiB and some sectors, and opens that.
fn check_converted(format: Format, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(9 * MIB + 3 * 512);
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image"));
    raw_file(&raw, &bytes);
    let [raw, path] = [&raw, &image].map(|path| path.to_str().unwrap());
    let name = format.to_string();
    qemu_img(&[&["convert", "-f", "raw", "-O", &name], options, &[raw, path]].concat());

    let what = format!("{format} {options:?}");
    let probed = Format::probe(&image).unwrap();
    assert_eq!(probed, format, "{what}");
    let disk = OpenOptions::new().extents_beside(true).open(&image, format).unwrap();
    check(&disk, &bytes, &what);
    assert!(data(&disk) < 9 * MIB as u64, "{what}: no hole is known");
    assert!(disk.capabilities().knows_holes, "{what}: it does not say that it knows its holes");

    let store = Store::open(dir.path().join("store")).unwrap();
    let (snapshot, _) = store.import(&disk, &mut |_| ()).unwrap();
    let raw = open(Path::new(raw), Format::Raw).unwrap();
    let (same, stats) = store.import(&raw, &mut |_| ()).unwrap();
    assert_eq!(snapshot.digest(), same.digest(), "{what}: imported, it is another disk");
    assert_eq!(stats.stored_bytes, 0);
}

#[test]
fn raw_images() {
    if have_qemu_img() {
        check_converted(Format::Raw, &[]);
    }
}

#[test]
fn qcow2_images() {
    if !have_qemu_img() {
        return;
    }
    for options in [
        &["-o", "compat=0.10"][..],
        &["-o", "compat=1.1"],
        &["-o", "compat=1.1,lazy_refcounts=on"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k,refcount_bits=1"],
        &["-o", "cluster_size=2M,refcount_bits=64"],
        &["-c"],
        &["-c", "-o", "compat=0.10"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=4k"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "compression_type=zstd,cluster_size=512"],
        &["-c", "-o", "compression_type=zstd,cluster_size=2M"],
    ] {
        check_converted(Format::Qcow2, options);
    }
}

#[test]
fn vmdk_images() {
    if !have_qemu_img() {
        return;
    }
    for kind in [
        "monolithicSparse",
        "streamOptimized",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
    ] {
        for version in ["", ",compat6=on", ",adapter_type=lsilogic", ",zeroed_grain=on"] {
            let flat = kind.ends_with("Flat");
            if !(flat && version.contains("grain")) {
                check_converted(Format::Vmdk, &["-o", &format!("subformat={kind}{version}")]);
            }
        }
    }
}

#[test]
fn what_is_written_as_zeroes_is_a_hole() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let path = image.to_str().unwrap();
    for (format, options) in [
        (Format::Qcow2, "preallocation=metadata"),
        (Format::Vmdk, "subformat=monolithicSparse,zeroed_grain=on"),
    ] {
        qemu_img(&["create", "-f", &format.to_string(), "-o", options, path, "4M"]);
        let commands = ["write -P 7 1M 1M", "write -z 1M 64k", "write -z 2M 1M"];
        let mut io = std::process::Command::new("qemu-io");
        io.args(["-f", &format.to_string()]).args(commands.iter().flat_map(|c| ["-c", c])).arg(path);
        assert!(io.output().unwrap().status.success());
        let mut expected = vec![0; 4 * MIB];
        expected[MIB + 64 * KIB..2 * MIB].fill(7);
        check(&open(&image, format).unwrap(), &expected, options);
        std::fs::remove_file(&image).unwrap();
    }
}

/// A large disk with little on it takes little time, however it is cut.
#[test]
fn large_disks_are_cheap() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let path = image.to_str().unwrap();
    for (format, options, size) in [
        (Format::Qcow2, "cluster_size=64k", 64u64 << 40),
        (Format::Qcow2, "cluster_size=512", 128 << 30),
        (Format::Vmdk, "subformat=monolithicSparse", 1 << 40),
        (Format::Vmdk, "subformat=streamOptimized", 1 << 40),
    ] {
        qemu_img(&["create", "-f", &format.to_string(), "-o", options, path, &size.to_string()]);
        let disk = open(&image, format).unwrap();
        assert_eq!(disk.size(), size);
        let begun = std::time::Instant::now();
        assert_eq!(data(&disk), 0, "{options}");
        assert!(begun.elapsed().as_secs() < 20, "{options}: {:?}", begun.elapsed());
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn a_size_that_is_no_whole_sector_is_rounded_up() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    qemu_img(&["create", "-f", "qcow2", image.to_str().unwrap(), "1M"]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[24..32].copy_from_slice(&(MIB as u64 - 100).to_be_bytes());
    std::fs::write(&image, bytes).unwrap();
    check(&open(&image, Format::Qcow2).unwrap(), &vec![0; MIB], "an odd size");
}

#[test]
fn tells_formats_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let vdi = [&[0; 64][..], b"\x7f\x10\xda\xbe"].concat();
    for (head, expected) in [
        (&b""[..], Ok(Format::Raw)),
        (&[0; 512], Ok(Format::Raw)),
        (b"QFI\xfb\0\0\0\x03", Ok(Format::Qcow2)),
        (b"QFI\xfb\0\0\0\x01", Err(ErrorKind::Unsupported)),
        (b"KDMV\x01", Ok(Format::Vmdk)),
        (b"COWD\x01", Ok(Format::Vmdk)),
        (b"# Disk DescriptorFile\n", Ok(Format::Vmdk)),
        (b"# Disk Descriptor", Ok(Format::Raw)),
        (b"conectix", Err(ErrorKind::Unsupported)),
        (&vdi, Err(ErrorKind::Unsupported)),
        (b"\xfd7zXZ\0\0", Err(ErrorKind::Unsupported)),
    ] {
        std::fs::write(&path, head).unwrap();
        assert_eq!(Format::probe(&path).map_err(|e| e.kind()), expected, "{head:?}");
    }
    let missing = Format::probe(dir.path().join("nothing")).map_err(|e| e.kind());
    assert_eq!(missing, Err(ErrorKind::NotFound));
    assert_eq!(Format::probe(dir.path()).map_err(|e| e.kind()), Err(ErrorKind::Unsupported));
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(Format::probe(&pipe).map_err(|e| e.kind()), Err(ErrorKind::Unsupported), "and does not wait");
}

/// Whoever reads many images is told which of them it is that cannot be read.
#[test]
fn what_cannot_be_read_later_is_named() {
    for format in [Format::Raw, Format::Qcow2, Format::Vmdk] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("upload");
        let made = disk(&content(MIB));
        export(&made, &path, &ExportOptions::new(format), &mut go_on).unwrap();
        let image = open(&path, format).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        let error = image.read_at(&mut vec![0; MIB], 0).unwrap_err().to_string();
        assert_eq!(error.matches(path.to_str().unwrap()).count(), 1, "{format}: {error}");
    }
}

//! What is installed on an image, as its own record says.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::{Ami, Grantee, ModifyImageAttribute, OperatingSystem, ProductCode, ProductCodeKind, X86_64};
use common::{TestRegion, check, disk, ext4, launch, open, register};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{CopyImage, DirectBoot, ErrorKind, ImageSource, RegionOptions};
use serde_json::Value;
use storage_block::MemoryDisk;
use storage_block::keys::LocalKey;

/// Two packages that are installed, one of them for two architectures, and what is none.
const STATUS: &str = "\
Package: nginx
Status: install ok installed
Architecture: amd64
Version: 1.22.1-9+deb12u3
Description: small, powerful, scalable web/proxy server
 Package: this is text
 .
 and goes on

Package: libc6
Status: install ok installed
Multi-Arch: same
Architecture: i386
Version: 2.36-9+deb12u10

Package: libc6
Status: hold ok installed
Architecture: amd64
Version: 2.36-9+deb12u10

Package: exim4
Status: deinstall ok config-files
Architecture: all
Version: 4.96-15

Package: half
Status: install ok half-configured
Architecture: all
Version: 1
";

/// The bills that are kept.
fn kept(dir: &Path) -> Vec<PathBuf> {
    let Ok(bills) = std::fs::read_dir(dir.join("software")) else { return Vec::new() };
    bills.map(|entry| entry.unwrap().path()).collect()
}

fn image(region: &TestRegion, name: &str, status: &[u8], os: bool) -> Option<Ami<X86_64>> {
    let bytes = ext4(&[("var/lib/dpkg/status", status)])?;
    let content = MemoryDisk::from_vec(bytes).unwrap().into_disk();
    let source = ImageSource::new(&content).boot(DirectBoot::new(tiny_elf(), None, ""));
    let mut builder = Ami::<X86_64>::builder(name);
    if os {
        builder = builder.operating_system(OperatingSystem::linux("debian", "12"));
    }
    Some(region.register_image(builder, source).unwrap())
}

#[test]
fn what_is_installed_is_read_from_the_image_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let Some(ami) = image(&region, "web", STATUS.as_bytes(), true) else { return };
    let bill = region.software_bill(ami.id()).unwrap();
    let packages: Vec<_> =
        bill.packages.iter().map(|p| format!("{} {} {}", p.name, p.version, p.architecture)).collect();
    let libc = "libc6 2.36-9+deb12u10";
    assert_eq!(
        packages,
        [format!("{libc} amd64"), format!("{libc} i386"), "nginx 1.22.1-9+deb12u3 amd64".to_owned()]
    );
    assert_eq!(bill.software().count(), 3);

    let document = bill.to_cyclonedx().unwrap();
    assert_eq!(
        region.software_bill(ami.id()).unwrap().to_cyclonedx().unwrap(),
        document,
        "it is the same each time"
    );
    let json: Value = serde_json::from_slice(&document).unwrap();
    assert_eq!((&json["bomFormat"], &json["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
    let described = &json["metadata"]["component"];
    assert_eq!(
        (&described["name"], &described["version"]),
        (&"web".into(), &ami.digest().to_string().into())
    );
    let nginx = &json["components"][2];
    assert_eq!((&nginx["name"], &nginx["version"]), (&"nginx".into(), &"1.22.1-9+deb12u3".into()));
    assert_eq!(nginx["purl"], "pkg:deb/debian/nginx@1.22.1-9+deb12u3?arch=amd64&distro=debian-12");
    let read = cyclonedx_bom::models::bom::Bom::parse_from_json(&document[..]).unwrap();
    assert!(cyclonedx_bom::prelude::Validate::validate(&read).passed());

    // What operating system it is, is not guessed.
    let unnamed = image(&region, "unnamed", STATUS.as_bytes(), false).unwrap();
    let document = region.software_bill(unnamed.id()).unwrap().to_cyclonedx().unwrap();
    assert!(!String::from_utf8(document).unwrap().contains("purl"));
}

#[test]
fn an_image_without_such_a_record_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let unsupported = |ami: &Ami<X86_64>, says: &[&str]| {
        let refused = region.software_bill(ami.id()).unwrap_err();
        check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", says);
    };
    unsupported(&register(&region, "raw", &disk(1, 7)).unwrap(), &["cannot be read"]);
    let version = "1".repeat(1_000_000);
    let long = |n| {
        format!("Package: web{n}\nStatus: install ok installed\nArchitecture: all\nVersion: {version}\n\n")
    };
    for (name, status, says) in [
        ("damaged", b"\xff\xfe no record\n\0\n : x\n".to_vec(), "is damaged: one of its lines is no field"),
        // Fields without end, of which none is worth the memory that they would take.
        ("fields", b"a:\n".repeat(400_000), "is damaged: one of its paragraphs is longer than 1 MiB"),
        ("long", (0..5).flat_map(|n| long(n).into_bytes()).collect(), "takes more than 4 MiB to say"),
        ("endless", b"a:\n\n".repeat((16 << 20) / 4 + 1), "cannot be read"),
    ] {
        if let Some(ami) = image(&region, name, &status, true) {
            unsupported(&ami, &[says]);
            let told = common::told(&region.software_bill(ami.id()).unwrap_err());
            assert!(told.len() < 200 && !told.contains("no record"), "{told}: nothing of the image's");
        }
    }
    if let Some(ami) = image(&region, "paragraphs", &b"a:\n\n".repeat(1 << 20), true) {
        assert!(region.software_bill(ami.id()).unwrap().packages.is_empty());
    }
    if let Some(bytes) = ext4(&[("etc/hostname", b"web")]) {
        let content = MemoryDisk::from_vec(bytes).unwrap().into_disk();
        unsupported(&register(&region, "bare", &content).unwrap(), &["has no /var/lib/dpkg/status"]);
    }
    if let Some(ami) = image(&region, "empty", b"", true) {
        assert!(region.software_bill(ami.id()).unwrap().packages.is_empty());
    }
    let friend = region.as_account("222222222222".parse().unwrap());
    let ami = region.images().unwrap()[0].ami().id();
    check(&friend.software_bill(ami).unwrap_err(), ErrorKind::ImageNotFound, "InvalidAMIID.NotFound", &[]);
}

/// Overwrites what is kept, so that whoever reads it is known.
fn change(path: &Path, package: &str) {
    write(path, &format!(r#"{{"version":1,"packages":[["{package}","1","all"]]}}"#));
}

fn write(path: &Path, json: &str) {
    let digest = ami_core::Digest::of(json.as_bytes());
    std::fs::write(path, [digest.as_bytes(), json.as_bytes()].concat()).unwrap();
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/software").join(name)
}

/// What is kept of this version is read for ever. It is written with `write_golden`.
#[test]
fn golden_bills_are_what_is_written_and_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let Some(ami) = image(&region, "web", STATUS.as_bytes(), true) else { return };
    let [bill] = &kept(dir.path())[..] else { panic!("none is kept") };
    let installed = region.software_bill(ami.id()).unwrap();
    assert!(std::fs::read(bill).unwrap() == std::fs::read(golden("packages")).unwrap());
    change(bill, "other");
    assert_ne!(region.software_bill(ami.id()).unwrap(), installed);
    std::fs::copy(golden("packages"), bill).unwrap();
    assert_eq!(region.software_bill(ami.id()).unwrap(), installed);
    std::fs::copy(golden("unreadable"), bill).unwrap();
    let refused = region.software_bill(ami.id()).unwrap_err();
    let bare = "the image has no /var/lib/dpkg/status: only Debian's record is read";
    assert_eq!((refused.kind(), refused.to_string()), (ErrorKind::Unsupported, bare.to_owned()));
    // One of another version is none, nor is one of none.
    for version in ["", r#""version":0,"#, r#""version":2,"#] {
        write(bill, &format!(r#"{{{version}"packages":[["other","1","all"]]}}"#));
        assert_eq!(region.software_bill(ami.id()).unwrap(), installed, "{version}");
    }
}

#[test]
#[ignore = "writes what is to stay"]
fn write_golden() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let write = |ami: Ami<X86_64>, name| {
        let content = ami.manifest().root_volume().unwrap().snapshot().unwrap().to_hex();
        std::fs::create_dir_all(golden("")).unwrap();
        std::fs::copy(dir.path().join("software").join(content), golden(name)).unwrap();
    };
    write(image(&region, "web", STATUS.as_bytes(), true).unwrap(), "packages");
    let content = MemoryDisk::from_vec(ext4(&[("etc/hostname", b"web")]).unwrap()).unwrap().into_disk();
    write(register(&region, "bare", &content).unwrap(), "unreadable");
}

/// Everybody who sees an image may ask, and it is not read for each.
#[test]
fn that_nothing_can_be_read_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "raw", &disk(1, 7)).unwrap();
    let [bill] = &kept(dir.path())[..] else { panic!("none is kept") };
    let first = common::told(&region.software_bill(ami.id()).unwrap_err());
    assert!(first.contains("cannot be read"), "{first}");
    write(bill, r#"{"version":1,"unreadable":"as it was kept"}"#);
    let again = region.software_bill(ami.id()).unwrap_err();
    check(&again, ErrorKind::Unsupported, "UnsupportedOperation", &["as it was kept"]);
    std::fs::remove_file(bill).unwrap();
    assert_eq!(common::told(&region.software_bill(ami.id()).unwrap_err()), first);
    assert!(bill.is_file(), "it is kept when it is asked for, too");
    region.deregister_image(ami.id()).unwrap();
    assert!(!dir.path().join("software").exists(), "nothing is left");
}

#[test]
fn a_copy_from_another_region_has_its_bill() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (open(&dir.path().join("here")), open(&dir.path().join("there")));
    let Some(ami) = image(&there, "web", STATUS.as_bytes(), true) else { return };
    let copy = here.copy_image_from(&there, ami.id(), CopyImage::new("copy")).unwrap();
    let names = |bills: Vec<PathBuf>| bills.into_iter().map(|p| p.file_name().unwrap().to_owned());
    let kept = |name: &str| names(kept(&dir.path().join(name))).collect::<Vec<_>>();
    assert_eq!((kept("here"), kept("here").len()), (kept("there"), 1));
    assert_eq!(here.software_bill(copy.id()).unwrap().packages.len(), 3);
}

/// A bill is not worth an image, nor a region.
#[test]
fn what_cannot_be_removed_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "raw", &disk(1, 7)).unwrap();
    std::fs::remove_dir_all(dir.path().join("software")).unwrap();
    // Nobody removes files from there, whoever it is.
    std::os::unix::fs::symlink("/proc/self/ns", dir.path().join("software")).unwrap();
    assert!(!kept(dir.path()).is_empty());
    region.deregister_image(ami.id()).unwrap();
    drop(region);
    let region = open(dir.path());
    assert!(region.images().unwrap().is_empty());
    register(&region, "raw", &disk(1, 7)).unwrap();
}

#[test]
fn a_bill_is_read_when_the_image_is_registered_and_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let Some(ami) = image(&region, "web", STATUS.as_bytes(), true) else { return };
    let names = |region: &TestRegion, id| -> Vec<String> {
        region.software_bill(id).unwrap().packages.into_iter().map(|p| p.name).collect()
    };
    // It is there without being asked for, by the digest of the content.
    let [bill] = &kept(dir.path())[..] else { panic!("none is kept") };
    let content = ami.manifest().root_volume().unwrap().snapshot().unwrap();
    assert_eq!(bill.file_name().unwrap().to_str().unwrap(), content.to_hex());
    assert_eq!(names(&region, ami.id()), ["libc6", "libc6", "nginx"]);
    // And is what is read from then on, also of a copy and when the region is opened again.
    change(bill, "kept");
    assert_eq!(names(&region, ami.id()), ["kept"]);
    let copy = region.copy_image(ami.id(), "copy").unwrap();
    assert_eq!(names(&region, copy.id()), ["kept"]);
    drop(region);
    let region = open(dir.path());
    assert_eq!(names(&region, ami.id()), ["kept"]);
    // What a crash has left of one is none: it is read and kept again.
    for damage in [&b""[..], b"short", &[7; 100]] {
        std::fs::write(bill, damage).unwrap();
        assert_eq!(names(&region, ami.id()), ["libc6", "libc6", "nginx"]);
        change(bill, "kept");
        assert_eq!(names(&region, ami.id()), ["kept"]);
    }
    // Who may see the image may read it, also where nobody may have the bytes.
    let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    let sell = ModifyImageAttribute::new().add_product_code(code).add_launch_permission(Grantee::All);
    region.modify_image_attribute(ami.id(), &sell).unwrap();
    let friend = region.as_account("222222222222".parse().unwrap());
    assert_eq!(names(&friend, ami.id()), ["kept"]);
    assert_eq!(friend.image_disk(ami.id(), "/dev/xvda").unwrap_err().kind(), ErrorKind::AuthFailure);

    region.deregister_image(ami.id()).unwrap();
    assert_eq!(kept(dir.path()), std::slice::from_ref(bill), "the copy has the same content");
    region.deregister_image(copy.id()).unwrap();
    assert!(kept(dir.path()).is_empty());
    std::fs::create_dir_all(bill.parent().unwrap()).unwrap();
    std::fs::write(bill, b"left").unwrap();
    drop((region, friend));
    drop(open(dir.path()));
    assert!(kept(dir.path()).is_empty(), "what no image has goes when the region is opened");
}

#[test]
fn an_image_of_an_instance_is_read_when_it_is_asked_about() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let Some(ami) = image(&region, "web", STATUS.as_bytes(), true) else { return };
    let server = launch(&region, &ami).unwrap();
    // Something is written at the end of its volume, where no file is.
    common::ask(&server, "write 0 100000 x", "wrote");
    let made = server.create_image("made").unwrap().ami;
    assert_ne!(
        made.manifest().root_volume().unwrap().snapshot(),
        ami.manifest().root_volume().unwrap().snapshot()
    );
    assert_eq!(kept(dir.path()).len(), 1, "making it has read nothing");
    assert_eq!(region.software_bill(made.id()).unwrap().packages.len(), 3);
    assert_eq!(kept(dir.path()).len(), 2);
}

/// A bill says what is in the content.
#[test]
fn nothing_is_kept_of_what_is_encrypted() {
    let Some(bytes) = ext4(&[("var/lib/dpkg/status", STATUS.as_bytes())]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let options = RegionOptions::new().keys(Arc::new(LocalKey::from_bytes([7; 32])));
    let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
    let content = MemoryDisk::from_vec(bytes).unwrap().into_disk();
    let source = ImageSource::new(&content).boot(DirectBoot::new(tiny_elf(), None, "")).encrypted(true);
    let ami = region.register_image(Ami::<X86_64>::builder("secret"), source).unwrap();
    assert_eq!(region.software_bill(ami.id()).unwrap().packages.len(), 3);
    assert!(kept(dir.path()).is_empty());
}

/// The bill is not worth an image.
#[test]
fn an_image_is_registered_also_where_no_bill_can_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    // A file in the place of the directory.
    std::fs::write(dir.path().join("software"), b"in the way").unwrap();
    let Some(ami) = image(&region, "web", STATUS.as_bytes(), true) else { return };
    assert_eq!(region.software_bill(ami.id()).unwrap().packages.len(), 3);
    std::fs::remove_file(dir.path().join("software")).unwrap();
    region.deregister_image(ami.id()).unwrap();
}

//! What is installed on an image, as its own record says.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{Ami, OperatingSystem, X86_64};
use common::{TestRegion, check, disk, ext4, open, register};
use instance_core::testing::tiny_elf;
use instance_core::{DirectBoot, ErrorKind, ImageSource};
use serde_json::Value;
use storage_block::MemoryDisk;

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
    if let Some(ami) = image(&region, "damaged", b"\xff\xfe no record\n\0\n : x\n", true) {
        unsupported(&ami, &["damaged"]);
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

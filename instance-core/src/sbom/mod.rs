//! What is installed on an image, read from the image itself, as a bill of materials.

mod kept;

use std::io;

use ami_core::{AmiId, OperatingSystem, Software};
use cyclonedx_bom::models::bom::{Bom, SpecVersion};
use cyclonedx_bom::models::component::{Classification, Component, Components};
use cyclonedx_bom::models::metadata::Metadata;
use cyclonedx_bom::prelude::Purl;
use deb822_fast::borrowed::{BorrowedParagraph, iter_paragraphs_borrowed};
use purl::GenericPurlBuilder;
use storage_block::Disk;

use crate::region::Region;
use crate::{Error, ErrorKind, Result};

/// Where Debian and what comes of it keep what is installed.
const STATUS: &str = "/var/lib/dpkg/status";
/// A large Debian system has some 5 MiB. Whatever an image has there is read when it is registered, so this bounds what that
/// takes.
const MAX_STATUS: u64 = 16 << 20;
/// What is said of one package; that of a package with hundreds of configuration files has some 50 KiB. The parser holds all
/// fields of a paragraph at once, of which three bytes make one.
const MAX_PARAGRAPH: usize = 1 << 20;

/// A package that is installed on an image; [`SoftwareBill`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct InstalledPackage {
    /// Its name, such as `openssh-server`.
    pub name: String,
    /// Its version, such as `1:9.2p1-2+deb12u3`.
    pub version: String,
    /// The architecture that it is for, in Debian's words: `amd64`, or `all`.
    pub architecture: String,
}

/// What is installed on an image, by its package manager's own records.
///
/// It is read when the image is registered, imported or copied from another region, and kept by the digest of its root volume's
/// content: a copy has the same, and the two go together. So it is kept where nothing can be read. It is no part of the image's
/// digest, for equal content is an equal image whether or not somebody read it. Of an image of an instance it is read when it is
/// first asked for, since such an image costs what changed and no more; of encrypted content it is read each time and not kept,
/// for it would lie beside in plain.
///
/// ```no_run
/// # fn demo(region: &instance_core::Region) -> Result<(), Box<dyn std::error::Error>> {
/// let bill = region.software_bill("ami-0123456789abcdef0".parse()?)?;
/// for package in &bill.packages {
///     println!("{} {} {}", package.name, package.version, package.architecture);
/// }
/// std::fs::write("bom.json", bill.to_cyclonedx()?)?; // CycloneDX 1.5
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SoftwareBill {
    /// The image.
    pub image_id: AmiId,
    /// Its name.
    pub image_name: String,
    /// The digest of the image, which is the version of what is described.
    pub image_digest: ami_core::Digest,
    /// Its operating system, if the image says which.
    pub operating_system: Option<OperatingSystem>,
    /// The packages, by name and architecture.
    pub packages: Vec<InstalledPackage>,
}

impl SoftwareBill {
    /// The same as a CycloneDX 1.5 document in JSON. Equal images have equal documents: there is no time and no serial
    /// number in one.
    ///
    /// A package has a [package URL](https://github.com/package-url/purl-spec) where the operating system is known.
    ///
    /// # Errors
    ///
    /// [`Internal`](ErrorKind::Internal) if the document cannot be written.
    pub fn to_cyclonedx(&self) -> Result<Vec<u8>> {
        let mut image =
            component(Classification::OperatingSystem, &self.image_name, &self.image_digest.to_string());
        image.bom_ref = Some(self.image_id.to_string());
        let metadata = Metadata { component: Some(image), ..Metadata::default() };
        let packages = self.packages.iter().map(|package| {
            let mut one = component(Classification::Library, &package.name, &package.version);
            one.purl = self.purl(package);
            one
        });
        let bom = Bom {
            version: 1,
            serial_number: None,
            metadata: Some(metadata),
            components: Some(Components(packages.collect())),
            spec_version: SpecVersion::V1_5,
            ..Bom::default()
        };
        let mut document = Vec::new();
        let failed = |e| Error::new(ErrorKind::Internal, "cannot write a bill of software").with_source(e);
        bom.output_as_json(&mut document, SpecVersion::V1_5).map_err(|e| failed(io::Error::other(e)))?;
        Ok(document)
    }

    /// The same as an image's manifest names it.
    pub fn software(&self) -> impl Iterator<Item = Software> {
        self.packages.iter().map(|package| Software::new(&package.name, &package.version))
    }

    fn purl(&self, package: &InstalledPackage) -> Option<Purl> {
        let os = self.operating_system.as_ref()?;
        let distribution = format!("{}-{}", os.name(), os.version());
        let builder = GenericPurlBuilder::new("deb".to_owned(), package.name.as_str())
            .with_namespace(os.name())
            .with_version(package.version.as_str());
        let builder = builder.with_qualifier("arch", package.architecture.as_str()).ok()?;
        let purl = builder.with_qualifier("distro", distribution.as_str()).ok()?.build().ok()?;
        purl.to_string().parse().ok()
    }
}

fn component(kind: Classification, name: &str, version: &str) -> Component {
    Component::new(kind, name, version, None)
}

impl<H> Region<H> {
    /// What is installed on an image that the account sees: of Debian and what comes of it.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`Unsupported`](ErrorKind::Unsupported) for an image that has no such
    /// record, or none that can be read, or what the host met.
    pub fn software_bill(&self, id: AmiId) -> Result<SoftwareBill> {
        let image = self.image(id)?;
        let ami = image.ami();
        Ok(SoftwareBill {
            image_id: id,
            image_name: ami.name().to_owned(),
            image_digest: ami.digest(),
            operating_system: ami.manifest().operating_system().cloned(),
            packages: self.inner.software_of(&image)?,
        })
    }
}

/// The packages that the record on a disk calls installed. It is the disk's fault that there are none where the error is
/// [`Unsupported`](ErrorKind::Unsupported), and the host's otherwise.
fn installed(disk: &Disk) -> Result<Vec<InstalledPackage>> {
    let read = boot_image::read_file(disk, STATUS, MAX_STATUS).map_err(|e| {
        let kind = match e.kind() {
            boot_image::ErrorKind::Io => ErrorKind::Internal,
            _ => ErrorKind::Unsupported,
        };
        Error::new(kind, "what is installed on the image cannot be read").with_source(e)
    })?;
    let unsupported = |what: String| Error::new(ErrorKind::Unsupported, what);
    let status =
        read.ok_or_else(|| unsupported(format!("the image has no {STATUS}: only Debian's record is read")))?;
    parse(&String::from_utf8_lossy(&status)).map_err(|why| unsupported(format!("{STATUS} is damaged: {why}")))
}

/// What the text of such a record calls installed, by name and architecture; or what is wrong with it, in words that have none
/// of it.
fn parse(status: &str) -> Result<Vec<InstalledPackage>, &'static str> {
    let mut packages = Vec::new();
    // One after the other, each no longer than one is: a hostile record has millions, or one that is all of it.
    for text in status.split("\n\n") {
        if text.len() > MAX_PARAGRAPH {
            return Err("one of its paragraphs is longer than 1 MiB");
        }
        for paragraph in iter_paragraphs_borrowed(text) {
            packages.extend(package(&paragraph.map_err(|_| "one of its lines is no field")?));
        }
    }
    packages.sort_unstable();
    packages.dedup();
    Ok(packages)
}

/// The package that a paragraph calls installed, if it does.
fn package(paragraph: &BorrowedParagraph<'_>) -> Option<InstalledPackage> {
    let field = |name| paragraph.get_single(name).map(str::to_owned);
    // The last of three words: a package that was removed may have left its configuration.
    if paragraph.get_single("Status")?.split_ascii_whitespace().nth(2) != Some("installed") {
        return None;
    }
    Some(InstalledPackage {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
    })
}

//! Putting images that were built into a region, as its Quick Start AMIs.

use ami_core::{AnyAmi, Catalog as _, Ebs, Filter, Image, ImageState, OwnerAlias, Query};
use instance_core::{ImageSource, Region};
use storage_block::RawFile;

use crate::{BuiltImage, Error, ErrorKind, Result};

/// The number of the account that the images of the catalogue belong to, in every region: what Amazon's own is in EC2.
/// All others see them as Quick Start AMIs, and may launch and copy them. Nobody else may be given this account: what it has of
/// the right name, architecture and size is taken for what was built.
///
/// ```
/// use ami_core::Query;
///
/// let published = Query::all().owner(quick_start::PUBLISHER.parse()?);
/// # Ok::<(), ami_core::Error>(())
/// ```
pub const PUBLISHER: &str = "000000000001";

/// Volumes have whole ones.
const GIB: u64 = 1 << 30;

impl BuiltImage {
    /// Registers it in a region as a Quick Start AMI: of the [`PUBLISHER`], with the owner alias `amazon`, and public.
    /// Whoever runs the region does that, whatever account its handle is for. If what is there was built from the same,
    /// that is the one.
    ///
    /// # Errors
    ///
    /// [`Region`](ErrorKind::Region), also if the image is there and was disabled;
    /// [`ImageReplaced`](ErrorKind::ImageReplaced), or [`Io`](ErrorKind::Io) if the disk cannot be opened.
    pub fn register<H>(&self, region: &Region<H>) -> Result<Image> {
        self.register_with(region, &mut |_| ())
    }

    /// The same, with somebody who is told how far the copying is and may cancel it.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register), and [`Cancelled`](ErrorKind::Cancelled).
    pub fn register_with<H>(
        &self,
        region: &Region<H>,
        progress: &mut dyn FnMut(storage_block::Progress),
    ) -> Result<Image> {
        let image = match self.registered(region)? {
            Some(image) => image,
            None => self.copy(region, progress)?,
        };
        if image.owner_alias().is_some() {
            return Ok(image);
        }
        // It is new, or a crash has cut it off.
        let mut next = image.clone();
        next.set_description(self.recipe().description())?;
        next.set_owner_alias(Some(OwnerAlias::Amazon));
        next.launch_permissions_mut().set_public(true);
        match region.catalog().update(&image, next.clone()) {
            Ok(()) => Ok(next),
            // Somebody else has finished it meanwhile.
            Err(e) if e.kind() == ami_core::ErrorKind::Conflict => {
                let finished = self.registered(region)?.filter(|image| image.owner_alias().is_some());
                finished.ok_or_else(|| self.refused(e))
            }
            Err(e) => Err(self.refused(e)),
        }
    }

    /// What the region has of it, if that can be launched.
    fn registered<H>(&self, region: &Region<H>) -> Result<Option<Image>> {
        let name = Filter::new("name", [self.ami_name()])?;
        let query = Query::all().owner(PUBLISHER.parse()?).filter(name);
        let known = region.catalog().list(&query).map_err(|e| self.refused(e))?;
        let Some(image) = known.into_iter().find(|image| image.state() != ImageState::Deregistered) else {
            return Ok(None);
        };
        let size = image.ami().manifest().root_volume().map(Ebs::volume_size);
        let wanted = self.recipe().disk_size().next_multiple_of(GIB);
        let why = match image.state() {
            ImageState::Available if image.ami().architecture() != self.architecture() => {
                format!("is for {}", image.ami().architecture())
            }
            ImageState::Available if size != Some(wanted) => "has a root volume of another size".to_owned(),
            ImageState::Available => return Ok(Some(image)),
            state => format!("is {state}"),
        };
        let why = format!("the image {} has its name and {why}", image.id());
        Err(self.refused(ami_core::Error::new(ami_core::ErrorKind::IncorrectState, why)))
    }

    /// Registers it, as what its publisher alone sees.
    fn copy<H>(
        &self,
        region: &Region<H>,
        progress: &mut dyn FnMut(storage_block::Progress),
    ) -> Result<Image> {
        let disk = RawFile::open(self.disk(), true).map_err(|e| {
            let what = format!("cannot open {}", self.disk().display());
            Error::new(ErrorKind::Io, what).with_source(e)
        })?;
        if !self.is_there() {
            let what = format!("{} has another image than was built there", self.dir().display());
            return Err(Error::new(ErrorKind::ImageReplaced, what));
        }
        let disk = disk.into_disk();
        let builder = AnyAmi::builder_for(self.architecture(), self.ami_name())
            .operating_system(self.operating_system().clone());
        let publisher = region.as_account(PUBLISHER.parse()?);
        match publisher.register_image(builder, ImageSource::new(&disk).progress(progress)) {
            Ok(ami) => publisher.image(ami.id()).map_err(|e| self.refused(e)),
            // Somebody else was quicker.
            Err(e) if e.kind() == instance_core::ErrorKind::ImageNameDuplicate => {
                self.registered(region)?.ok_or_else(|| self.refused(e))
            }
            Err(e) => Err(self.refused(e)),
        }
    }

    fn refused(&self, source: impl Into<instance_core::Error>) -> Error {
        let source = source.into();
        let kind = match source.kind() {
            instance_core::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Region,
        };
        let what = format!("cannot register {} in the region", self.dir().display());
        Error::new(kind, what).with_source(source)
    }

    /// The name that it has as an image: the recipe's, the architecture, and what it was built from.
    ///
    /// ```no_run
    /// let built = quick_start::Build::new(quick_start::recipe("minimal")?, "images/minimal").run()?;
    /// assert!(built.ami_name().starts_with("minimal-x86_64-"));
    /// # Ok::<(), quick_start::Error>(())
    /// ```
    pub fn ami_name(&self) -> String {
        const DIGITS: usize = 12;
        let digest = self.digest().to_hex();
        format!("{}-{}-{}", self.recipe().name(), self.architecture(), &digest[..DIGITS])
    }
}

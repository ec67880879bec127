//! Putting images that were built into a region, as its Quick Start AMIs.

use ami_core::{AnyAmi, Catalog as _, Filter, Image, ImageState, OwnerAlias, Query};
use instance_core::{ImageSource, Region};
use storage_block::RawFile;

use crate::{BuiltImage, Error, ErrorKind, Result};

/// The number of the account that the images of the catalogue belong to, in every region: what Amazon's own is in EC2.
/// All others see them as Quick Start AMIs, and may launch and copy them.
///
/// ```
/// use ami_core::Query;
///
/// let published = Query::all().owner(quick_start::PUBLISHER.parse()?);
/// # Ok::<(), ami_core::Error>(())
/// ```
pub const PUBLISHER: &str = "000000000001";

impl BuiltImage {
    /// Registers it in a region as a Quick Start AMI: of the [`PUBLISHER`], with the owner alias `amazon`, and public.
    /// Whoever runs the region does that, whatever account its handle is for. If what is there was built from the same,
    /// that is the one.
    ///
    /// # Errors
    ///
    /// [`Region`](ErrorKind::Region), or [`Io`](ErrorKind::Io) if the disk cannot be opened.
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
        let (catalog, publisher, name) = (region.catalog(), PUBLISHER.parse()?, self.ami_name());
        let query = Query::all().owner(publisher).filter(Filter::new("name", [&*name])?);
        let known = catalog.list(&query).map_err(|e| self.refused(e))?;
        let known = known.into_iter().find(|image| image.state() == ImageState::Available);
        let image = match known {
            Some(image) if image.owner_alias().is_some() => return Ok(image),
            // A crash has cut it off.
            Some(image) => image,
            None => {
                let disk = RawFile::open(self.disk(), true).map_err(|e| {
                    let what = format!("cannot open {}", self.disk().display());
                    Error::new(ErrorKind::Io, what).with_source(e)
                })?;
                let disk = disk.into_disk();
                let builder = AnyAmi::builder_for(self.architecture(), name)
                    .operating_system(self.operating_system().clone());
                let publisher = region.as_account(publisher);
                let registered =
                    publisher.register_image(builder, ImageSource::new(&disk).progress(progress));
                let ami = registered.map_err(|e| self.refused(e))?;
                publisher.image(ami.id()).map_err(|e| self.refused(e))?
            }
        };
        let mut next = image.clone();
        next.set_description(self.recipe().description())?;
        next.set_owner_alias(Some(OwnerAlias::Amazon));
        next.launch_permissions_mut().set_public(true);
        catalog.update(&image, next.clone()).map_err(|e| self.refused(e))?;
        Ok(next)
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

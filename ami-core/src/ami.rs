//! The image: a manifest in a region, under a name, with an owner.

mod json;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, quote};
use crate::{
    AccountId, AmiBuilder, AmiId, AnyArch, Arch, Architecture, Arm64, Digest, DigestWriter, Manifest,
    RegionName, Timestamp, X86, X86_64,
};

/// An Amazon Machine Image: the class of which instances are the objects.
///
/// An `Ami` never changes. Its [`digest`](Self::digest) is that of its [`Manifest`] and says what it
/// is; its [`id`](Self::id) is derived from region, owner, name and digest and says which it is: with its
/// [incarnation](Self::incarnation), where there was such an image before. Two are equal if these are. Cloning is cheap.
///
/// ```
/// use ami_core::{Ami, Architecture, BlockDeviceMapping, Digest, Timestamp, X86_64};
///
/// let ami = Ami::<X86_64>::builder("web")
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// assert_eq!((ami.name(), ami.region().as_str()), ("web", "us-east-1"));
/// assert_eq!((ami.architecture(), *ami.owner()), (Architecture::X86_64, "123456789012".parse()?));
/// assert_eq!(ami.id().to_string(), "ami-087247d1bddbcf84e");
/// assert_eq!(ami.digest(), ami.manifest().digest());
/// assert!(ami.created() <= Timestamp::now());
/// # Ok::<(), ami_core::Error>(())
/// ```
///
/// The type parameter is the architecture, where it is known when the program is compiled:
///
/// ```
/// use ami_core::{Ami, X86_64};
///
/// fn launch_on_x86(image: &Ami<X86_64>) {}
///
/// fn launch(image: &Ami<X86_64>) {
///     launch_on_x86(image);
/// }
/// ```
///
/// ```compile_fail,E0308
/// use ami_core::{Ami, Arm64, X86_64};
///
/// fn launch_on_x86(image: &Ami<X86_64>) {}
///
/// fn launch(image: &Ami<Arm64>) {
///     launch_on_x86(image); // does not compile
/// }
/// ```
///
/// Where it is not, [`AnyAmi`] holds an image of any architecture, and [`typed`](Self::typed) asks for
/// the one that is needed:
///
/// ```
/// use ami_core::{Ami, AnyAmi, ArchitectureMismatch, Arm64, X86_64};
///
/// fn launch_on_x86(image: &AnyAmi) -> Result<(), ArchitectureMismatch> {
///     let image: Ami<X86_64> = image.typed()?;
///     Ok(())
/// }
/// ```
pub struct Ami<A: Arch = AnyArch> {
    inner: Arc<Inner>,
    arch: PhantomData<A>,
}

/// An image whose architecture is known only at run time.
///
/// ```
/// use ami_core::{AnyAmi, Arm64, BlockDeviceMapping, Digest, X86_64};
///
/// let architecture = "arm64".parse()?; // as a user typed it
/// let ami: AnyAmi = AnyAmi::builder_for(architecture, "web")
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// assert_eq!(ami.typed::<Arm64>()?.into_any(), ami);
/// assert!(ami.typed::<X86_64>().is_err());
/// # Ok::<(), ami_core::Error>(())
/// ```
pub type AnyAmi = Ami<AnyArch>;

struct Inner {
    id: AmiId,
    region: RegionName,
    owner: AccountId,
    name: String,
    created: Timestamp,
    incarnation: u64,
    manifest: Manifest,
}

impl<A: Arch> Ami<A> {
    /// Begins an image named `name`. With [`AnyArch`], see [`AnyAmi::builder_for`] instead.
    pub fn builder(name: impl Into<String>) -> AmiBuilder<A> {
        AmiBuilder::new(A::ARCHITECTURE, name.into())
    }

    /// The one way to an image: checks the name and derives the id. The caller vouches for the
    /// architecture.
    pub(crate) fn assemble(
        region: RegionName,
        owner: AccountId,
        name: String,
        created: Timestamp,
        manifest: Manifest,
    ) -> Result<Self, Error> {
        check_name(&name)?;
        let id = derive_id(&region, &owner, &name, &manifest.digest(), 0);
        Ok(Self::share(Arc::new(Inner { id, region, owner, name, created, incarnation: 0, manifest })))
    }

    fn share(inner: Arc<Inner>) -> Self {
        Self { inner, arch: PhantomData }
    }

    /// The id, unique to the region.
    pub fn id(&self) -> AmiId {
        self.inner.id
    }

    /// The region that the image is in.
    pub fn region(&self) -> &RegionName {
        &self.inner.region
    }

    /// The account that owns the image.
    pub fn owner(&self) -> &AccountId {
        &self.inner.owner
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// When the image was made. A note, no part of what the image is: neither id nor digest nor
    /// equality look at it, and a copy keeps it.
    pub fn created(&self) -> Timestamp {
        self.inner.created
    }

    /// How many images there were before it of the same region, owner, name and digest: none, for most. The id of one that
    /// is gone is not used again, so that who kept it does not find another image by it.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let again = ami.with_incarnation(1);
    /// assert_ne!(again.id(), ami.id());
    /// assert_eq!((again.digest(), again.incarnation()), (ami.digest(), 1));
    /// assert_eq!(again.with_incarnation(0), ami);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// The same image, after so many others that were alike: for those who keep images and know which were there.
    #[must_use]
    pub fn with_incarnation(&self, incarnation: u64) -> Self {
        let Inner { region, owner, name, created, manifest, .. } = &*self.inner;
        let (region, owner, name, manifest) = (region.clone(), *owner, name.clone(), manifest.clone());
        let id = derive_id(&region, &owner, &name, &manifest.digest(), incarnation);
        Self::share(Arc::new(Inner { id, region, owner, name, created: *created, incarnation, manifest }))
    }

    /// The architecture.
    pub fn architecture(&self) -> Architecture {
        self.inner.manifest.architecture()
    }

    /// What the image is.
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// The digest of the manifest: equal for every copy of the image.
    pub fn digest(&self) -> Digest {
        self.inner.manifest.digest()
    }

    /// The same image in another region, for another owner, or under another name, made now: a new id and the
    /// same digest. The content of its snapshots is not copied by this.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let copy = ami.copy_to(&"eu-west-1".parse()?, ami.owner(), ami.name())?;
    /// assert_ne!(copy.id(), ami.id());
    /// assert_eq!(copy.digest(), ami.digest());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::MalformedName`].
    pub fn copy_to(&self, region: &RegionName, owner: &AccountId, name: &str) -> Result<Self, Error> {
        Self::assemble(region.clone(), *owner, name.to_owned(), Timestamp::now(), self.manifest().clone())
    }

    /// The same image, with its architecture known only at run time.
    pub fn into_any(self) -> AnyAmi {
        Ami::share(self.inner)
    }

    /// The same image, with the architecture `B` known when the program is compiled.
    ///
    /// # Errors
    ///
    /// If the image is of another architecture.
    pub fn typed<B: Arch>(&self) -> Result<Ami<B>, ArchitectureMismatch> {
        match B::ARCHITECTURE {
            Some(wanted) if wanted != self.architecture() => {
                Err(ArchitectureMismatch { id: self.id(), wanted, found: self.architecture() })
            }
            _ => Ok(Ami::share(self.inner.clone())),
        }
    }
}

impl AnyAmi {
    /// Begins an image named `name` of an architecture that is known only at run time.
    pub fn builder_for(architecture: Architecture, name: impl Into<String>) -> AmiBuilder<AnyArch> {
        AmiBuilder::new(Some(architecture), name.into())
    }
}

/// An image is of another architecture than the one asked for.
///
/// ```
/// use ami_core::{Architecture, ArchitectureMismatch};
///
/// let id = "ami-0123456789abcdef0".parse()?;
/// let err = ArchitectureMismatch::new(id, Architecture::X86_64, Architecture::Arm64);
/// assert_eq!((err.id(), err.wanted(), err.found()), (id, Architecture::X86_64, Architecture::Arm64));
/// assert_eq!(err.to_string(), "the architecture of ami-0123456789abcdef0 is arm64, not x86_64");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the architecture of {id} is {found}, not {wanted}")]
pub struct ArchitectureMismatch {
    id: AmiId,
    wanted: Architecture,
    found: Architecture,
}

impl ArchitectureMismatch {
    /// The image `id` is of architecture `found` where `wanted` is needed.
    pub fn new(id: AmiId, wanted: Architecture, found: Architecture) -> Self {
        Self { id, wanted, found }
    }

    /// The image.
    pub fn id(&self) -> AmiId {
        self.id
    }

    /// The architecture that was asked for.
    pub fn wanted(&self) -> Architecture {
        self.wanted
    }

    /// The architecture of the image.
    pub fn found(&self) -> Architecture {
        self.found
    }
}

/// EC2's rule for the names of images.
fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"()[] ./-'@_".contains(&b);
    if (3..=128).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    let message = format!(
        "{} is no name of an image; use 3 to 128 letters, digits, spaces and ( ) [ ] . / - ' @ _",
        quote(name)
    );
    Err(Error::new(ErrorKind::MalformedName, message))
}

/// The id of an image: the first 68 bits of the SHA-256 digest of all that makes it this one, each
/// part after its length, so that no two lists of parts give the same bytes. The first of its kind is told from later ones
/// by the first part and the last.
fn derive_id(region: &RegionName, owner: &AccountId, name: &str, digest: &Digest, incarnation: u64) -> AmiId {
    let (owner, incarnation) = (owner.to_string(), (incarnation > 0).then(|| incarnation.to_be_bytes()));
    let scheme: &[u8] = if incarnation.is_some() { b"ami-core image id 2" } else { b"ami-core image id 1" };
    let parts = [scheme, region.as_str().as_bytes(), owner.as_bytes(), name.as_bytes(), digest.as_bytes()];
    let parts = parts.into_iter().chain(incarnation.as_ref().map(|bytes| bytes.as_slice()));
    let mut writer = DigestWriter::new();
    for part in parts {
        writer.update(&(part.len() as u64).to_be_bytes());
        writer.update(part);
    }
    let mut first = [0; 16];
    first.copy_from_slice(&writer.finish().as_bytes()[..16]);
    AmiId::from_bytes(first)
}

impl<A: Arch> Clone for Ami<A> {
    fn clone(&self) -> Self {
        Self::share(self.inner.clone())
    }
}

impl<A: Arch, B: Arch> PartialEq<Ami<B>> for Ami<A> {
    fn eq(&self, other: &Ami<B>) -> bool {
        let key = |inner: &Inner| (inner.id, inner.owner, inner.manifest.digest());
        Arc::ptr_eq(&self.inner, &other.inner)
            || key(&self.inner) == key(&other.inner)
                && self.region() == other.region()
                && self.name() == other.name()
    }
}

impl<A: Arch> Eq for Ami<A> {}

impl<A: Arch> Hash for Ami<A> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inner.id.hash(state);
    }
}

impl<A: Arch> fmt::Debug for Ami<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ami")
            .field("id", &self.id())
            .field("region", self.region())
            .field("owner", self.owner())
            .field("name", &self.name())
            .field("architecture", &self.architecture())
            .field("digest", &self.digest())
            .finish_non_exhaustive()
    }
}

macro_rules! conversions {
    ($($arch:ty),*) => {$(
        impl From<Ami<$arch>> for AnyAmi {
            fn from(ami: Ami<$arch>) -> Self {
                ami.into_any()
            }
        }

        impl TryFrom<AnyAmi> for Ami<$arch> {
            type Error = ArchitectureMismatch;

            fn try_from(ami: AnyAmi) -> Result<Self, ArchitectureMismatch> {
                ami.typed()
            }
        }
    )*};
}

conversions!(X86, X86_64, Arm64);

//! `ModifyImageAttribute`: what an owner changes of an image.

use std::str::FromStr;

use crate::error::{Error, ErrorKind};
use crate::{AccountId, Image, ImageState, ImdsSupport, LaunchPermissions, ProductCode};

/// Who is given a permission: everybody, or an account.
///
/// ```
/// use ami_core::Grantee;
///
/// assert_eq!("all".parse::<Grantee>()?, Grantee::All);
/// assert_eq!("123456789012".parse::<Grantee>()?, Grantee::Account("123456789012".parse()?));
/// assert_eq!("1234-5678-9012".parse::<Grantee>().unwrap_err().code(), "InvalidAMIAttributeItemValue");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grantee {
    /// The group `all`.
    All,
    /// This account.
    Account(AccountId),
}

impl FromStr for Grantee {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "all" => Ok(Self::All),
            account => account.parse().map(Self::Account).map_err(|e: Error| {
                // Of a permission EC2 says another code than of an account elsewhere.
                Error::new(ErrorKind::InvalidAttributeItemValue, e.to_string())
            }),
        }
    }
}

/// A change of an image's attributes, all of it or nothing (`ModifyImageAttribute`).
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Catalog, Digest, Image, MemoryCatalog, X86_64};
/// use ami_core::{CatalogExt, Grantee, ModifyImageAttribute};
///
/// # let (region, owner) = ("us-east-1".parse()?, "123456789012".parse()?);
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&region, &owner)?;
/// # let catalog = MemoryCatalog::new();
/// # catalog.put(Image::new(ami.clone()))?;
/// let friend = "210987654321".parse()?;
/// let change = ModifyImageAttribute::new()
///     .description("serves the web")
///     .add_launch_permission(Grantee::Account(friend))
///     .remove_launch_permission(Grantee::All);
/// let image = catalog.as_account(owner).modify(&ami.id(), &change)?;
/// assert!(image.may_launch(&friend) && image.description() == "serves the web");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a change does nothing by itself"]
pub struct ModifyImageAttribute {
    description: Option<String>,
    reset: bool,
    add: Vec<Grantee>,
    remove: Vec<Grantee>,
    product_codes: Vec<ProductCode>,
    imds_support: Option<ImdsSupport>,
}

impl ModifyImageAttribute {
    /// Nothing is changed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the description.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = Some(description.into());
        self
    }

    /// Lets everybody or an account launch.
    pub fn add_launch_permission(mut self, grantee: Grantee) -> Self {
        self.add.push(grantee);
        self
    }

    /// Takes a permission back. It is no error if there was none.
    pub fn remove_launch_permission(mut self, grantee: Grantee) -> Self {
        self.remove.push(grantee);
        self
    }

    /// Takes all permissions back, before others are added (`ResetImageAttribute`).
    pub fn reset_launch_permission(mut self) -> Self {
        self.reset = true;
        self
    }

    /// Adds a product code, which cannot be taken away again: who launches the image accepts the terms of the product
    /// first, and nobody copies it or reads its bytes.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
    /// use ami_core::{ModifyImageAttribute, ProductCode, ProductCodeKind};
    ///
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// # let mut image = Image::new(ami);
    /// let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    /// ModifyImageAttribute::new().add_product_code(code.clone()).apply(&mut image)?;
    /// assert!(image.product_codes().eq([&code]));
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn add_product_code(mut self, code: ProductCode) -> Self {
        self.product_codes.push(code);
        self
    }

    /// Says which version of the metadata service the image is made for, which cannot be taken back. [`ImdsSupport`] shows
    /// it in use.
    pub fn imds_support(mut self, support: ImdsSupport) -> Self {
        self.imds_support = Some(support);
        self
    }

    /// Makes the change. Who may is the caller's to decide, by [`Image::authorize`].
    ///
    /// # Errors
    ///
    /// [`MissingParameter`](ErrorKind::MissingParameter) if it changes nothing,
    /// [`InvalidParameterValue`](ErrorKind::InvalidParameterValue) for a long description or a product code that is none,
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for a permission that is given
    /// and taken in one, and [`Unavailable`](ErrorKind::Unavailable) for one that is given to a disabled image.
    pub fn apply(&self, image: &mut Image) -> Result<(), Error> {
        if *self == Self::default() {
            return Err(Error::new(ErrorKind::MissingParameter, "no attribute is given that is to change"));
        }
        if self.add.iter().any(|grantee| self.remove.contains(grantee)) {
            let message = "a launch permission cannot be added and removed in one";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, message));
        }
        if image.state() == ImageState::Disabled && !self.add.is_empty() {
            let message = format!("the image {} is disabled and cannot be shared", image.id());
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        self.product_codes.iter().try_for_each(ProductCode::validate)?;
        if let Some(description) = &self.description {
            image.set_description(description.clone())?;
        }
        for code in &self.product_codes {
            image.add_product_code(code.clone())?;
        }
        if let Some(support) = self.imds_support {
            image.set_imds_support(support);
        }
        if self.reset {
            *image.launch_permissions_mut() = LaunchPermissions::private();
        }
        for (grantees, allowed) in [(&self.add, true), (&self.remove, false)] {
            for grantee in grantees {
                let permissions = image.launch_permissions_mut();
                match grantee {
                    Grantee::All => permissions.set_public(allowed),
                    Grantee::Account(account) if allowed => drop(permissions.add(*account)),
                    Grantee::Account(account) => drop(permissions.remove(account)),
                }
            }
        }
        Ok(())
    }
}

//! Who may do what with an image: the one place that decides it.

use crate::error::{Error, ErrorKind};
use crate::{AccountId, Category, Image, ImageState, OwnerAlias, ProductCode};

/// What an account wants to do with an image.
///
/// | Action | The owner | Who has launch permission | Others | Who may not is told |
/// |---|---|---|---|---|
/// | See | always | while it is available | never | [`NotFound`](ErrorKind::NotFound) |
/// | Launch | while it is available | while it is available | never | [`AuthFailure`](ErrorKind::AuthFailure); by the state, [`Unavailable`](ErrorKind::Unavailable) |
/// | Copy | as to launch | as to launch, but nothing with a product code | never | the same |
/// | Export | as to copy, but nothing with a product code | as to copy | never | the same |
/// | Change | always | never | never | [`AuthFailure`](ErrorKind::AuthFailure), or [`NotFound`](ErrorKind::NotFound) who does not see it |
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
/// use ami_core::{Action, ErrorKind};
///
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let mut image = Image::new(ami);
/// let other = "210987654321".parse()?;
/// let refused = |image: &Image, action| image.authorize(&other, action).err().map(|e| e.kind());
/// assert_eq!(refused(&image, Action::See), Some(ErrorKind::NotFound));
/// image.launch_permissions_mut().add(other);
/// assert_eq!(refused(&image, Action::Launch), None);
/// assert_eq!(refused(&image, Action::Change), Some(ErrorKind::AuthFailure));
/// # Ok::<(), ami_core::Error>(())
/// ```
///
/// Product codes go wherever the content goes: to instances, their volumes, snapshots of these, and images of all of
/// them. So an image with a product code that somebody owns who does not sell the product is none to carry away,
/// either. What an account has to agree to before it launches such an image, [`Image::check_terms`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Learn that it is there, and all that is known of it.
    See,
    /// Make instances of it.
    Launch,
    /// Make an image of one's own of it.
    Copy,
    /// Have its bytes: read them, take them out of the region, make another image or volume begin with them.
    Export,
    /// Change what can be changed of it, tag it, deregister it.
    Change,
}

impl Image {
    /// Whether `account` may do `action` now, and if not, why.
    ///
    /// # Errors
    ///
    /// As the table of [`Action`] says. An account without permission does not learn the state.
    pub fn authorize(&self, account: &AccountId, action: Action) -> Result<(), Error> {
        let owns = self.ami().owner() == account;
        let permitted = owns || self.launch_permissions().allows(account);
        let available = self.state() == ImageState::Available;
        let visible = owns || permitted && available;
        let id = self.id();
        let refused = |message: String| Err(Error::new(ErrorKind::AuthFailure, message));
        match action {
            Action::See | Action::Change if !visible => Err(Error::not_found(&id)),
            Action::See => Ok(()),
            Action::Change if !owns => {
                refused(format!("the image {id} is not account {account}'s to change"))
            }
            Action::Change => Ok(()),
            Action::Launch | Action::Copy | Action::Export if !permitted => {
                refused(format!("account {account} has no permission for the image {id}"))
            }
            Action::Launch | Action::Copy | Action::Export if !available => {
                let message = format!("the image {id} is {}", self.state());
                Err(Error::new(ErrorKind::Unavailable, message))
            }
            Action::Copy if !owns && self.product_codes().len() > 0 => {
                refused(format!("the image {id} has a product code and cannot be copied by {account}"))
            }
            Action::Export => may_export(self.product_codes.iter(), &format!("the image {id}")),
            Action::Launch | Action::Copy => Ok(()),
        }
    }

    /// Whether `account`, which may launch the image, has agreed to what the sellers of its products ask for: to the
    /// terms of each product code, of which `accepted` says whether they are accepted. The owner needs not: it sells the
    /// product, or has launched an image of it and made its own of that.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
    /// use ami_core::{ErrorKind, ProductCode, ProductCodeKind};
    ///
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// # let mut image = Image::new(ami);
    /// image.add_product_code(ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace })?;
    /// let buyer = "210987654321".parse()?;
    /// let refused = image.check_terms(&buyer, |_| false).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::OptInRequired);
    /// image.check_terms(&buyer, |code| code.id == "8vk2x")?;
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OptInRequired`].
    pub fn check_terms(
        &self,
        account: &AccountId,
        accepted: impl Fn(&ProductCode) -> bool,
    ) -> Result<(), Error> {
        if self.ami().owner() == account {
            return Ok(());
        }
        check_terms(self.product_codes.iter(), account, accepted)
    }

    /// Whether `account` sees the image in a list. The owner always does; others do while it is
    /// available and they may launch it. See also [`is_deprecated`](Self::is_deprecated).
    pub fn is_visible_to(&self, account: &AccountId) -> bool {
        self.authorize(account, Action::See).is_ok()
    }

    /// Whether `account` may launch the image now.
    pub fn may_launch(&self, account: &AccountId) -> bool {
        self.authorize(account, Action::Launch).is_ok()
    }

    /// Where the image stands in the view of `viewer`, or `None` if they do not see it.
    ///
    /// | Category | Which images |
    /// |---|---|
    /// | My AMIs | the viewer owns it |
    /// | Quick Start | the owner alias is `amazon` |
    /// | Marketplace | the owner alias is `aws-marketplace` |
    /// | Shared | the viewer is named in the launch permissions |
    /// | Community | it is public |
    ///
    /// The first row that fits decides.
    pub fn category(&self, viewer: &AccountId) -> Option<Category> {
        if !self.is_visible_to(viewer) {
            return None;
        }
        Some(match self.owner_alias() {
            _ if self.ami().owner() == viewer => Category::MyAmis,
            Some(OwnerAlias::Amazon) => Category::QuickStart,
            Some(OwnerAlias::AwsMarketplace) => Category::Marketplace,
            _ if self.launch_permissions().accounts().any(|named| named == viewer) => Category::Shared,
            _ => Category::Community,
        })
    }
}

/// Whether the bytes of what has these product codes may leave: those of a product stay where it is sold.
///
/// ```
/// use ami_core::{ErrorKind, ProductCode, ProductCodeKind, may_export};
///
/// let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
/// assert!(may_export([], "the snapshot").is_ok());
/// assert_eq!(may_export([&code], "the snapshot").unwrap_err().kind(), ErrorKind::AuthFailure);
/// ```
///
/// # Errors
///
/// [`ErrorKind::AuthFailure`].
pub fn may_export<'a>(codes: impl IntoIterator<Item = &'a ProductCode>, what: &str) -> Result<(), Error> {
    match codes.into_iter().next() {
        None => Ok(()),
        Some(code) => {
            let message = format!("{what} has the product code {}, whose content is not given out", code.id);
            Err(Error::new(ErrorKind::AuthFailure, message))
        }
    }
}

/// Whether the terms of all these product codes are accepted, as [`Image::check_terms`] asks it of an image's: for what
/// else has some, such as a volume that is attached.
///
/// # Errors
///
/// [`ErrorKind::OptInRequired`].
pub fn check_terms<'a>(
    codes: impl IntoIterator<Item = &'a ProductCode>,
    account: &AccountId,
    accepted: impl Fn(&ProductCode) -> bool,
) -> Result<(), Error> {
    match codes.into_iter().find(|code| !accepted(code)) {
        None => Ok(()),
        Some(code) => {
            let message = format!(
                "account {account} has not accepted the terms of the product {}; do that first",
                code.id
            );
            Err(Error::new(ErrorKind::OptInRequired, message))
        }
    }
}

//! Codes of products that are on images.

use serde::{Deserialize, Serialize};

use crate::error::{Error, check_text, words};

words! {
    /// The kind of a [`ProductCode`], which shows it in use.
    ProductCodeKind, "kind of product code" {
        /// DevPay.
        Devpay = "devpay",
        /// AWS Marketplace.
        Marketplace = "marketplace",
    }
}

/// The code of a product whose use is billed with the image.
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, ErrorKind, Image, X86_64};
/// use ami_core::{ProductCode, ProductCodeKind};
///
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let mut image = Image::new(ami);
/// image.launch_permissions_mut().set_public(true);
/// image.add_product_code(ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace })?;
/// assert_eq!(image.product_codes().len(), 1);
/// // Others may launch it now, but not carry it away.
/// let other = "210987654321".parse()?;
/// assert!(image.may_launch(&other));
/// let copied = image.copy_to(&other, &"eu-west-1".parse()?, "mine");
/// assert_eq!(copied.err().map(|e| e.kind()), Some(ErrorKind::AuthFailure));
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProductCode {
    /// The code.
    pub id: String,
    /// Its kind.
    pub kind: ProductCodeKind,
}

impl ProductCode {
    /// Whether the code is one: 1 to 255 printable characters.
    ///
    /// # Errors
    ///
    /// [`InvalidParameterValue`](crate::ErrorKind::InvalidParameterValue).
    pub fn validate(&self) -> Result<(), Error> {
        check_text("product code", &self.id, 255)
    }
}

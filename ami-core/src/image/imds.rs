//! Which versions of the metadata service an image is made for.

use crate::error::words;

words! {
    /// Which version of the instance metadata service the software on an image is made for (`ImdsSupport`).
    ///
    /// An instance of an image that says `v2.0` asks for a token with each request for metadata (`HttpTokens`), unless its
    /// launch says otherwise. It cannot be taken back; copies of the image, and images of its instances, say it too.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
    /// use ami_core::{Filter, ImdsSupport, ModifyImageAttribute};
    ///
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// # let mut image = Image::new(ami);
    /// assert_eq!(image.imds_support(), None);
    /// ModifyImageAttribute::new().imds_support(ImdsSupport::V2_0).apply(&mut image)?;
    /// assert!(Filter::new("imds-support", ["v2.0"])?.matches(&image));
    /// let copy = image.copy_to(image.ami().owner(), &"eu-west-1".parse()?, "web")?;
    /// assert_eq!(copy.imds_support(), Some(ImdsSupport::V2_0));
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    ImdsSupport, "support for the metadata service" {
        /// It needs no more than the second version, whose requests have tokens.
        V2_0 = "v2.0",
    }
}

//! Who publishes an image, and where it stands in the view of an account.

use crate::error::words;

words! {
    /// A name that EC2 gives to a group of accounts that publish images.
    ///
    /// ```
    /// use ami_core::{OwnerAlias, Query};
    ///
    /// let published = Query::all().owner_alias("amazon".parse()?);
    /// assert_eq!(OwnerAlias::ALL.len(), 3);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    OwnerAlias, "owner alias" {
        /// Amazon itself.
        Amazon = "amazon",
        /// AWS Backup.
        AwsBackupVault = "aws-backup-vault",
        /// The sellers of the AWS Marketplace.
        AwsMarketplace = "aws-marketplace",
    }
}

words! {
    /// Where an image stands in the view of an account, as EC2's console sorts them.
    ///
    /// ```
    /// use ami_core::{Category, Query};
    ///
    /// let mine = Query::all().in_category("123456789012".parse()?, Category::MyAmis);
    /// assert_eq!(Category::MyAmis.as_str(), "my-amis");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    Category, "category of images" {
        /// Published by Amazon.
        QuickStart = "quick-start",
        /// Offered on the AWS Marketplace.
        Marketplace = "marketplace",
        /// The account's own.
        MyAmis = "my-amis",
        /// Another account's, shared with this one by name.
        Shared = "shared",
        /// Another account's, shared with everybody.
        Community = "community",
    }
}

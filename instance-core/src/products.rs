//! Product codes: whose terms an account has accepted, and what they are on.
//!
//! They are on an image first, and go with its content: to instances, to volumes, to snapshots of these, and to images
//! and volumes that are made of any of it. What may be done with what has one, `ami_core` decides.

use std::collections::BTreeSet;

use ami_core::{AccountId, Action, Digest, ProductCode, Timestamp, check_terms};
use serde::{Deserialize, Serialize};

use crate::record::{ImageRecord, SnapshotRecord};
use crate::region::{Inner, Region};
use crate::store::Record;
use crate::{Error, ErrorKind, Result};

/// The product codes of something.
pub(crate) type ProductCodes = BTreeSet<ProductCode>;

/// That an account has accepted the terms of a product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TermsRecord {
    pub(crate) account: AccountId,
    pub(crate) product_code: String,
    pub(crate) accepted: Timestamp,
}

impl TermsRecord {
    fn key_of(account: &AccountId, product_code: &str) -> String {
        format!("{account}/{product_code}")
    }
}

impl Record for TermsRecord {
    const TABLE: &'static str = "accepted-terms";

    fn key(&self) -> String {
        Self::key_of(&self.account, &self.product_code)
    }
}

impl<H> Region<H> {
    /// Accepts the terms of a product for the account, as a subscription on EC2's Marketplace does. Without it the account
    /// launches no image of another's that has the product's code. Does nothing where they are accepted.
    ///
    /// ```
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// use ami_core::{Ami, Grantee, ModifyImageAttribute, ProductCode, ProductCodeKind, X86_64};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    /// let offer = ModifyImageAttribute::new().add_product_code(code).add_launch_permission(Grantee::All);
    /// region.modify_image_attribute(ami.id(), &offer)?;
    ///
    /// let buyer = region.as_account("210987654321".parse()?);
    /// let refused = buyer.launch(&ami, LaunchSpec::new("t2.nano".parse()?)).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::OptInRequired);
    /// buyer.accept_terms("8vk2x")?;
    /// assert_eq!(buyer.accepted_terms()?, ["8vk2x"]);
    /// let server = buyer.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// assert_eq!(server.describe().product_codes.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for what is no product code, or what the host met.
    pub fn accept_terms(&self, product_code: &str) -> Result<()> {
        let code = ProductCode { id: product_code.to_owned(), kind: ami_core::ProductCodeKind::Marketplace };
        code.validate()?;
        let account = *self.account();
        let store = &self.inner.store;
        if store.get::<TermsRecord>(&TermsRecord::key_of(&account, product_code))?.is_some() {
            return Ok(());
        }
        let record = TermsRecord { account, product_code: code.id, accepted: Timestamp::now() };
        store.commit(|c| c.put(&record))
    }

    /// The codes of the products whose terms the account has accepted.
    ///
    /// # Errors
    ///
    /// What reading the state store met.
    pub fn accepted_terms(&self) -> Result<Vec<String>> {
        let mut all = self.inner.store.all::<TermsRecord>()?;
        all.retain(|terms| terms.account == *self.account());
        Ok(all.into_iter().map(|terms| terms.product_code).collect())
    }
}

impl Inner {
    /// Whose terms an account has accepted, of the codes that are asked about.
    pub(crate) fn accepted<'a>(
        &self,
        account: &AccountId,
        codes: impl IntoIterator<Item = &'a ProductCode>,
    ) -> Result<BTreeSet<&'a ProductCode>> {
        let mut accepted = BTreeSet::new();
        for code in codes {
            if self.store.get::<TermsRecord>(&TermsRecord::key_of(account, &code.id))?.is_some() {
                accepted.insert(code);
            }
        }
        Ok(accepted)
    }

    /// That an account has accepted the terms of all these.
    pub(crate) fn check_accepted(&self, account: &AccountId, codes: &ProductCodes) -> Result<()> {
        let accepted = self.accepted(account, codes)?;
        Ok(check_terms(codes, account, |code| accepted.contains(code))?)
    }

    /// The product codes of content that an account names by its digest in something of its own, which it may if a
    /// snapshot of its own has it, or an image whose bytes it may have.
    pub(crate) fn codes_of_content(&self, account: &AccountId, digest: &Digest) -> Result<ProductCodes> {
        let mut snapshots = self.store.all::<SnapshotRecord>()?;
        snapshots.retain(|snapshot| snapshot.owner == *account && snapshot.digest == *digest);
        // Whoever has it without any has it free.
        if let Some(snapshot) = snapshots.into_iter().min_by_key(|snapshot| snapshot.product_codes.len()) {
            return Ok(snapshot.product_codes);
        }
        let names = |record: &ImageRecord| {
            let mappings = record.image.ami().manifest().block_device_mappings();
            mappings.iter().any(|mapping| mapping.content() == Some(digest))
        };
        let mut images = self.store.all::<ImageRecord>()?.into_iter().filter(names);
        match images.any(|record| record.image.authorize(account, Action::Export).is_ok()) {
            true => Ok(ProductCodes::new()),
            // Nobody learns here what others have.
            false => {
                let what = format!("the account has no snapshot whose content is {digest}");
                Err(Error::new(ErrorKind::SnapshotNotFound, what))
            }
        }
    }
}

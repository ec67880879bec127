//! Who may launch an image.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::AccountId;

/// Who beside the owner may launch an image.
///
/// ```
/// use ami_core::{AccountId, LaunchPermissions};
///
/// let friend: AccountId = "210987654321".parse()?;
/// let mut permissions = LaunchPermissions::private();
/// permissions.add(friend);
/// assert!(permissions.allows(&friend) && !permissions.is_public());
/// assert_eq!(permissions.accounts().collect::<Vec<_>>(), [&friend]);
/// permissions.remove(&friend);
/// permissions.set_public(true);
/// assert_eq!(permissions, LaunchPermissions::public());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchPermissions {
    public: bool,
    accounts: BTreeSet<AccountId>,
}

impl LaunchPermissions {
    /// Nobody.
    pub fn private() -> Self {
        Self::default()
    }

    /// Everybody.
    pub fn public() -> Self {
        Self { public: true, accounts: BTreeSet::new() }
    }

    /// Lets everybody launch, or only the accounts that were added.
    pub fn set_public(&mut self, public: bool) {
        self.public = public;
    }

    /// Lets an account launch; gives whether that is new.
    pub fn add(&mut self, account: AccountId) -> bool {
        self.accounts.insert(account)
    }

    /// Takes an account's permission back; gives whether it had one.
    pub fn remove(&mut self, account: &AccountId) -> bool {
        self.accounts.remove(account)
    }

    /// Whether everybody may launch.
    pub fn is_public(&self) -> bool {
        self.public
    }

    /// The accounts that were added.
    pub fn accounts(&self) -> impl ExactSizeIterator<Item = &AccountId> {
        self.accounts.iter()
    }

    /// Whether `account` may launch, be it as one of everybody.
    pub fn allows(&self, account: &AccountId) -> bool {
        self.public || self.accounts.contains(account)
    }
}

//! `DescribeImages`: which images an account asks for, and the answer.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::error::Error;
use crate::{AccountId, Action, AmiId, Filter, Image, ImageState, OwnerAlias, Page, PageRequest, Timestamp};

/// Whose images: a value of `Owners`.
///
/// ```
/// use ami_core::{Owner, OwnerAlias};
///
/// assert_eq!("self".parse::<Owner>()?, Owner::Caller);
/// assert_eq!("amazon".parse::<Owner>()?, Owner::Alias(OwnerAlias::Amazon));
/// assert_eq!("123456789012".parse::<Owner>()?, Owner::Account("123456789012".parse()?));
/// assert!("somebody".parse::<Owner>().is_err());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Owner {
    /// `self`: the account that asks.
    Caller,
    /// A group of publishers, such as `amazon`.
    Alias(OwnerAlias),
    /// An account by its number.
    Account(AccountId),
}

impl FromStr for Owner {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "self" => Ok(Self::Caller),
            digits if digits.starts_with(|c: char| c.is_ascii_digit()) => digits.parse().map(Self::Account),
            alias => alias.parse().map(Self::Alias),
        }
    }
}

impl From<AccountId> for Owner {
    fn from(account: AccountId) -> Self {
        Self::Account(account)
    }
}

/// Who was given permission to launch: a value of `ExecutableUsers`.
///
/// ```
/// use ami_core::ExecutableUser;
///
/// assert_eq!("all".parse::<ExecutableUser>()?, ExecutableUser::Everybody);
/// assert_eq!("self".parse::<ExecutableUser>()?, ExecutableUser::Caller);
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExecutableUser {
    /// `all`: everybody, so the image is public.
    Everybody,
    /// `self`: the account that asks, by name.
    Caller,
    /// This account, by name.
    Account(AccountId),
}

impl FromStr for ExecutableUser {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "all" => Ok(Self::Everybody),
            "self" => Ok(Self::Caller),
            account => account.parse().map(Self::Account),
        }
    }
}

/// A request for images (`DescribeImages`). Without any condition it asks for all that the account may
/// launch, and its own.
///
/// ```
/// use ami_core::{Catalog, CatalogExt, DescribeImages, Filter, MemoryCatalog};
///
/// let catalog = MemoryCatalog::new();
/// let me = catalog.as_account("123456789012".parse()?);
/// let request = DescribeImages::new()
///     .owner("self".parse()?)
///     .owner("amazon".parse()?)
///     .filter(Filter::new("name", ["debian-*"])?)
///     .max_results(100);
/// let page = me.describe(&request)?;
/// assert!(page.items.is_empty() && page.next_token.is_none());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct DescribeImages {
    ids: Vec<AmiId>,
    owners: Vec<Owner>,
    executable_users: Vec<ExecutableUser>,
    filters: Vec<Filter>,
    include_deprecated: bool,
    include_disabled: bool,
    page: PageRequest,
}

impl DescribeImages {
    /// All images.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only this image, or one of those that are named so.
    pub fn id(mut self, id: AmiId) -> Self {
        self.ids.push(id);
        self
    }

    /// Only images of this owner, or of one of those that are named so.
    pub fn owner(mut self, owner: Owner) -> Self {
        self.owners.push(owner);
        self
    }

    /// Only images that were shared with this user, or with one of those that are named so.
    pub fn executable_by(mut self, user: ExecutableUser) -> Self {
        self.executable_users.push(user);
        self
    }

    /// Only images for which this holds too.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filters.push(filter);
        self
    }

    /// Deprecated images of others too. One's own are always there, and so is what is named by its id.
    pub fn include_deprecated(mut self, include: bool) -> Self {
        self.include_deprecated = include;
        self
    }

    /// Disabled images too, which nobody but their owner sees.
    pub fn include_disabled(mut self, include: bool) -> Self {
        self.include_disabled = include;
        self
    }

    /// At most so many, 1 to 1000, and a token for the rest.
    pub fn max_results(mut self, max: usize) -> Self {
        self.page = self.page.with_max_results(max);
        self
    }

    /// Goes on where an earlier page ended.
    pub fn next_token(mut self, token: impl Into<String>) -> Self {
        self.page = self.page.with_next_token(token);
        self
    }

    /// The answer that `caller` gets, from all images of a catalog, at the moment `now`.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) for an id of no image that the caller sees,
    /// [`InvalidParameterValue`](crate::ErrorKind::InvalidParameterValue),
    /// [`InvalidParameterCombination`](crate::ErrorKind::InvalidParameterCombination) and
    /// [`InvalidNextToken`](crate::ErrorKind::InvalidNextToken).
    pub fn answer<'a>(
        &self,
        caller: &AccountId,
        now: Timestamp,
        images: impl IntoIterator<Item = &'a Image>,
    ) -> Result<Page<Image>, Error> {
        self.page.check(1, !self.ids.is_empty())?;
        let after: Option<AmiId> = self.page.after_key()?;
        let seen: BTreeMap<AmiId, &Image> = images
            .into_iter()
            .filter(|i| i.authorize(caller, Action::See).is_ok() && i.state() != ImageState::Deregistered)
            .map(|image| (image.id(), image))
            .collect();
        if let Some(missing) = self.ids.iter().find(|id| !seen.contains_key(id)) {
            return Err(Error::not_found(missing));
        }
        let found = seen.values().filter(|image| {
            after.is_none_or(|after| image.id() > after) && self.asks_for(image, caller, now)
        });
        Ok(Page::collect(found, self.page.max_results(), |image| image.id()).map(|image| (*image).clone()))
    }

    fn asks_for(&self, image: &Image, caller: &AccountId, now: Timestamp) -> bool {
        let owner = image.ami().owner();
        let is_owner = |asked: &Owner| match asked {
            Owner::Caller => owner == caller,
            Owner::Alias(alias) => image.owner_alias() == Some(*alias),
            Owner::Account(account) => owner == account,
        };
        let named = |account: &AccountId| image.launch_permissions().accounts().any(|a| a == account);
        let is_shared = |user: &ExecutableUser| match user {
            ExecutableUser::Everybody => image.launch_permissions().is_public(),
            ExecutableUser::Caller => named(caller),
            ExecutableUser::Account(account) => named(account),
        };
        let by_id = self.ids.contains(&image.id());
        let shows_deprecated = self.include_deprecated || by_id;
        (self.ids.is_empty() || by_id)
            && (self.owners.is_empty() || self.owners.iter().any(is_owner))
            && (self.executable_users.is_empty() || self.executable_users.iter().any(is_shared))
            && (self.include_disabled || image.state() != ImageState::Disabled)
            && (shows_deprecated || owner == caller || !image.is_deprecated(now))
            && self.filters.iter().all(|filter| filter.matches(image))
    }
}

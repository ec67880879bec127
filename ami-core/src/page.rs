//! Long answers in pages (`MaxResults`, `NextToken`).

use std::fmt;

use crate::error::{Error, ErrorKind, invalid_value, quote};

/// A part of an answer, and where the next one begins.
///
/// ```
/// use ami_core::{Page, PageRequest};
///
/// let numbers = ["1", "2", "3", "4", "5", "6", "7"];
/// let ask = |request: &PageRequest| -> Result<Page<&str>, ami_core::Error> {
///     let after = request.after()?;
///     let rest = numbers.into_iter().filter(|n| after.as_deref().is_none_or(|after| *n > after));
///     Ok(Page::collect(rest, request.max_results(), |n| *n))
/// };
/// let first = ask(&PageRequest::new().with_max_results(5))?;
/// assert_eq!(first.items, ["1", "2", "3", "4", "5"]);
/// let token = first.next_token.ok_or("there is more")?;
/// let second = ask(&PageRequest::new().with_max_results(5).with_next_token(token))?;
/// assert_eq!((second.items, second.next_token), (vec!["6", "7"], None));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page<T> {
    /// What was found.
    pub items: Vec<T>,
    /// What to ask with for the rest, if there is more.
    pub next_token: Option<String>,
}

impl<T> Page<T> {
    /// The first `max` of `found`, which is sorted by what `key` tells of each.
    pub fn collect<K: fmt::Display>(
        found: impl IntoIterator<Item = T>,
        max: Option<usize>,
        key: impl Fn(&T) -> K,
    ) -> Self {
        let mut found = found.into_iter();
        let Some(max) = max else { return Self { items: found.collect(), next_token: None } };
        let items: Vec<T> = found.by_ref().take(max).collect();
        let more = items.len() == max && found.next().is_some();
        let next_token = items.last().filter(|_| more).map(|last| hex::encode(key(last).to_string()));
        Self { items, next_token }
    }

    /// The same page with each item made into something else.
    pub fn map<U>(self, make: impl FnMut(T) -> U) -> Page<U> {
        Page { items: self.items.into_iter().map(make).collect(), next_token: self.next_token }
    }
}

/// Which page of an answer is asked for. [`Page`] shows it in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageRequest {
    max_results: Option<usize>,
    next_token: Option<String>,
}

impl PageRequest {
    /// The most results that a page has.
    pub const MAX: usize = 1000;

    /// All in one page.
    pub fn new() -> Self {
        Self::default()
    }

    /// At most so many results.
    #[must_use]
    pub fn with_max_results(mut self, max: usize) -> Self {
        self.max_results = Some(max);
        self
    }

    /// Goes on where an earlier page ended.
    #[must_use]
    pub fn with_next_token(mut self, token: impl Into<String>) -> Self {
        self.next_token = Some(token.into());
        self
    }

    /// How many results are asked for.
    pub fn max_results(&self) -> Option<usize> {
        self.max_results
    }

    /// Checks the request as EC2 does: at least `min` results, at most [`MAX`](Self::MAX), and no pages of
    /// what is asked for by `ids`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameterValue`] and [`ErrorKind::InvalidParameterCombination`].
    pub fn check(&self, min: usize, ids: bool) -> Result<(), Error> {
        let Some(max) = self.max_results else { return Ok(()) };
        if !(min..=Self::MAX).contains(&max) {
            return Err(invalid_value(format!(
                "{max} results cannot be asked for; use {min} to {}",
                Self::MAX
            )));
        }
        if ids {
            let message = "what is asked for by its id does not come in pages; leave out one of both";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, message));
        }
        Ok(())
    }

    /// The key of the last item of the page before, as [`Page::collect`] was told it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidNextToken`].
    pub fn after(&self) -> Result<Option<String>, Error> {
        let Some(token) = &self.next_token else { return Ok(None) };
        let key = hex::decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        key.map(Some).ok_or_else(|| self.bad_token())
    }

    /// The same where the keys are of a type of their own, such as ids.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidNextToken`].
    pub fn after_key<K: std::str::FromStr>(&self) -> Result<Option<K>, Error> {
        let key = self.after()?.map(|key| key.parse());
        key.transpose().map_err(|_| self.bad_token())
    }

    fn bad_token(&self) -> Error {
        let token = quote(self.next_token.as_deref().unwrap_or_default());
        let message = format!("{token} is no token of an earlier page; ask for the first page again");
        Error::new(ErrorKind::InvalidNextToken, message)
    }
}

//! Searching the catalogue, as images are searched.

use ami_core::{OwnerAlias, Page, PageRequest, Pattern};

use crate::{Error, ErrorKind, Recipe, Result, recipes};

/// A request for recipes: all, or those for which every filter holds.
///
/// A filter has values with the wildcards `*` and `?`, as a [`Pattern`] has them; it holds if one of its values does.
///
/// | Name | Compared with |
/// |---|---|
/// | `architecture` | `i386`, `x86_64`, `arm64`: each that the recipe is for |
/// | `buildable` | `true`, `false`: whether [this machine can](Recipe::check_host); not in EC2 |
/// | `description`, `name` | |
/// | `operating-system` | name and version, such as `debian 12`; not in EC2 |
/// | `owner-alias` | `amazon`, which is what images of the catalogue are [registered](crate::BuiltImage::register) as |
///
/// ```
/// use quick_start::DescribeRecipes;
///
/// let mut request = DescribeRecipes::new().filter("name", ["debian-*"]).max_results(2);
/// let first = request.clone().answer()?;
/// assert!(first.items.iter().map(|recipe| recipe.name()).eq(["debian-12-cloud", "debian-12-minimal"]));
/// if let Some(token) = first.next_token {
///     request = request.next_token(token);
/// }
/// assert_eq!(request.answer()?.items[0].name(), "debian-13-minimal");
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct DescribeRecipes {
    filters: Vec<(String, Vec<Pattern>)>,
    page: PageRequest,
}

/// The names of filters.
const NAMES: &[&str] =
    &["architecture", "buildable", "description", "name", "operating-system", "owner-alias"];
/// The most values that a filter has.
const MAX_VALUES: usize = ami_core::Filter::MAX_VALUES;

impl DescribeRecipes {
    /// All of them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only those for which this holds too.
    pub fn filter<V: Into<String>>(
        mut self,
        name: impl Into<String>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        let patterns = values.into_iter().take(MAX_VALUES + 1).map(Pattern::new).collect();
        self.filters.push((name.into(), patterns));
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

    /// The recipes that are asked for, in the order of their names.
    ///
    /// # Errors
    ///
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a name of no filter, for too many values or none, and for a
    /// page of no size that there is; [`InvalidNextToken`](ErrorKind::InvalidNextToken).
    pub fn answer(&self) -> Result<Page<&'static Recipe>> {
        self.page.check(1, false)?;
        for (name, patterns) in &self.filters {
            if !NAMES.contains(&name.as_str()) {
                let what = format!("{name:?} is no name of a filter for recipes");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
            if !(1..=MAX_VALUES).contains(&patterns.len()) {
                let what = format!("the filter {name:?} must have 1 to {MAX_VALUES} values");
                return Err(Error::new(ErrorKind::InvalidParameter, what));
            }
        }
        let after = self.page.after()?;
        let rest =
            recipes().iter().filter(|recipe| after.as_deref().is_none_or(|after| recipe.name() > after));
        let found = rest.filter(|recipe| self.filters.iter().all(|filter| holds(filter, recipe)));
        Ok(Page::collect(found, self.page.max_results(), |recipe| recipe.name()))
    }
}

fn holds((name, patterns): &(String, Vec<Pattern>), recipe: &Recipe) -> bool {
    values(name, recipe).iter().any(|value| patterns.iter().any(|pattern| pattern.matches(value)))
}

/// What a recipe has under the name of a filter.
fn values(name: &str, recipe: &Recipe) -> Vec<String> {
    match name {
        "architecture" => recipe.architectures().map(|architecture| architecture.to_string()).collect(),
        "buildable" => vec![recipe.check_host().is_ok().to_string()],
        "description" => vec![recipe.description().to_owned()],
        "name" => vec![recipe.name().to_owned()],
        "operating-system" => {
            let of = recipe.operating_system();
            of.iter().map(|of| format!("{} {}", of.name(), of.version())).collect()
        }
        "owner-alias" => vec![OwnerAlias::Amazon.to_string()],
        _ => Vec::new(),
    }
}

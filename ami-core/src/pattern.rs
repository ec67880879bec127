//! Patterns with EC2's wildcards, as the values of filters are.

use std::fmt;

/// A text with wildcards: `*` stands for any characters, `?` for one, and `\` takes the meaning away from
/// the character after it. Upper and lower case differ.
///
/// ```
/// use ami_core::Pattern;
///
/// let debian = Pattern::new("debian-1?-*");
/// assert!(debian.matches("debian-12-amd64") && !debian.matches("debian-9-amd64"));
/// assert_eq!(debian.literal(), None);
/// assert_eq!(Pattern::new(r"50\*").literal().as_deref(), Some("50*"), "the only text that it matches");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// A pattern of this text. Every text is one.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The one text that it matches, if it has no wildcard.
    pub fn literal(&self) -> Option<String> {
        let mut literal = String::with_capacity(self.0.len());
        let mut rest = self.0.chars();
        while let Some(c) = rest.next() {
            match c {
                '*' | '?' => return None,
                '\\' => literal.push(rest.next().unwrap_or('\\')),
                c => literal.push(c),
            }
        }
        Some(literal)
    }

    /// Whether `text` has this form. Takes at most the product of both lengths: on a mismatch only the last
    /// `*` takes one character more, since the earlier ones gain nothing by it.
    pub fn matches(&self, text: &str) -> bool {
        let (mut pattern, mut text) = (self.0.chars(), text.chars());
        // Where to go on after a mismatch: after the last `*`, and one character further in the text.
        let mut retry = None;
        loop {
            let text_before = text.clone();
            let fits = match (pattern.next(), text.next()) {
                (None, None) => return true,
                (Some('*'), _) => {
                    text = text_before;
                    retry = Some((pattern.clone(), text.clone()));
                    true
                }
                (Some('?'), Some(_)) => true,
                // A backslash at the very end stands for itself.
                (Some('\\'), Some(c)) => pattern.next().unwrap_or('\\') == c,
                (Some(p), Some(c)) => p == c,
                (None, Some(_)) | (Some(_), None) => false,
            };
            if !fits {
                let Some((after_star, mut rest)) = retry else { return false };
                if rest.next().is_none() {
                    return false;
                }
                pattern = after_star.clone();
                text = rest.clone();
                retry = Some((after_star, rest));
            }
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

//! Entries of the Boot Loader Specification, type 1.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::filesystem::MAX_PATH;
use crate::search::MAX_INITRDS;
use crate::version;

/// One `loader/entries/*.conf` file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LoaderEntry {
    /// The file's name without `.conf` and boot counter.
    id: String,
    /// The boot counter says that no tries are left.
    is_bad: bool,
    sort_key: Option<String>,
    machine_id: Option<String>,
    pub(crate) title: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) linux: String,
    pub(crate) initrds: Vec<String>,
    pub(crate) options: String,
}

impl LoaderEntry {
    /// Parses an entry; `None` if it boots no Linux kernel directly. Variables in the options, which
    /// some distributions leave to GRUB, are taken from `environment`, and empty as in GRUB where
    /// that has none.
    pub(crate) fn parse(file_name: &str, text: &str, environment: &BTreeMap<String, String>) -> Option<Self> {
        let (id, is_bad) = split_counter(file_name.strip_suffix(".conf")?);
        let mut entry = Self { id: id.to_owned(), is_bad, ..Self::default() };
        let mut options = String::new();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
            let value = value.trim();
            match key {
                "title" => entry.title = Some(value.to_owned()),
                "version" => entry.version = Some(value.to_owned()),
                "sort-key" => entry.sort_key = Some(value.to_owned()),
                "machine-id" => entry.machine_id = Some(value.to_owned()),
                "linux" => entry.linux = value.to_owned(),
                // The specification has one file per line; GRUB's entries name several in a line. Of too many,
                // one is kept: it shows that they are.
                "initrd" => {
                    let room = (MAX_INITRDS + 1).saturating_sub(entry.initrds.len());
                    if room > 0 {
                        let line = expand(value, environment);
                        // What is left of a path that is too long is one still.
                        let path = |word: &str| word.chars().take(MAX_PATH + 1).collect();
                        entry.initrds.extend(line.split_whitespace().take(room).map(path));
                    }
                }
                "options" if options.len() <= MAX_EXPANDED => {
                    for word in expand(value, environment).split_whitespace() {
                        let space = if options.is_empty() { "" } else { " " };
                        options.extend([space, word]);
                    }
                }
                _ => {}
            }
        }
        entry.options = options;
        if entry.linux.is_empty() { None } else { Some(entry) }
    }

    /// The order in which a menu shows entries; the first is booted.
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        let newest_first = |a: &str, b: &str| version::compare(a, b).reverse();
        let bad = self.is_bad.cmp(&other.is_bad);
        let keyed = match (&self.sort_key, &other.sort_key) {
            (Some(a), Some(b)) => {
                a.cmp(b).then_with(|| self.machine_id.cmp(&other.machine_id)).then_with(|| {
                    let version = |e: &Self| e.version.clone().unwrap_or_default();
                    newest_first(&version(self), &version(other))
                })
            }
            (a, b) => b.is_some().cmp(&a.is_some()),
        };
        bad.then(keyed).then_with(|| newest_first(&self.id, &other.id))
    }
}

/// Takes a boot counter (`+LEFT` or `+LEFT-DONE`) off an id; whether no tries are left.
fn split_counter(name: &str) -> (&str, bool) {
    let number = |s: &str| !s.is_empty() && s.bytes().all(|c| c.is_ascii_digit());
    let Some((id, counter)) = name.rsplit_once('+') else { return (name, false) };
    let (left, done) = counter.split_once('-').map_or((counter, None), |(left, done)| (left, Some(done)));
    if number(left) && done.is_none_or(number) {
        (id, left.bytes().all(|c| c == b'0'))
    } else {
        (name, false)
    }
}

/// How much a line may become with its variables: far more than a command line may have, so that what is left
/// out of a longer one changes nothing, and far less than a file of variables could make of it.
const MAX_EXPANDED: usize = 128 << 10;

/// Replaces `$name` and `${name}`.
fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if out.len() > MAX_EXPANDED {
            return out;
        }
        let (name, next) = variable_name(after);
        match name {
            Some(name) => out.push_str(variables.get(name).map_or("", String::as_str)),
            None => out.push('$'),
        }
        rest = next;
    }
    out + rest
}

/// Splits the name of a variable, with or without braces, off what follows a `$`.
pub(crate) fn variable_name(after: &str) -> (Option<&str>, &str) {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (name, rest) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
        Some(split) => split,
        None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
    };
    if name.is_empty() || !name.chars().all(is_name) { (None, after) } else { (Some(name), rest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> BTreeMap<String, String> {
        [("kernelopts".to_owned(), "root=/dev/vda1 ro".to_owned())].into()
    }

    #[test]
    fn parses() {
        let text = "# comment\ntitle  Debian GNU/Linux 12\nversion\t6.1\nlinux /vmlinuz\ninitrd /a\n\
                    initrd /b /c\noptions  root=LABEL=x  ro\noptions console=ttyS0\narchitecture x64\njunk\n";
        let entry = LoaderEntry::parse("debian.conf", text, &environment()).unwrap();
        assert_eq!(entry.title.as_deref(), Some("Debian GNU/Linux 12"));
        assert_eq!(entry.version.as_deref(), Some("6.1"));
        assert_eq!(entry.linux, "/vmlinuz");
        assert_eq!(entry.initrds, ["/a", "/b", "/c"]);
        assert_eq!(entry.options, "root=LABEL=x ro console=ttyS0");
        for (name, text) in
            [("x.conf", "title no kernel\nefi /shell.efi\n"), ("x.txt", "linux /vmlinuz"), ("x.conf", "")]
        {
            assert_eq!(LoaderEntry::parse(name, text, &environment()), None, "{name} {text:?}");
        }
    }

    #[test]
    fn expands_variables() {
        for (options, expected) in [
            ("$kernelopts quiet", "root=/dev/vda1 ro quiet"),
            ("a=${kernelopts}b", "a=root=/dev/vda1 rob"),
            ("x $tuned_params y", "x y"),
            ("cost=5$ $", "cost=5$ $"),
            ("${unclosed", "${unclosed"),
            ("${}", "${}"),
        ] {
            let entry = LoaderEntry::parse("e.conf", &format!("linux /k\noptions {options}"), &environment())
                .unwrap();
            assert_eq!(entry.options, expected, "{options}");
        }
    }

    #[test]
    fn what_variables_come_to_is_bounded() {
        let environment = [("a".to_owned(), "x".repeat(4000))].into();
        for separator in ["", " ", "\noptions "] {
            let text = format!("linux /k\noptions {}", format!("$a{separator}").repeat(10_000));
            let entry = LoaderEntry::parse("e.conf", &text, &environment).unwrap();
            assert!((64 << 10..1 << 20).contains(&entry.options.len()), "{}", entry.options.len());
        }
    }

    #[test]
    fn of_too_many_initrds_one_is_kept() {
        for separator in [" ", "\ninitrd "] {
            for (names, kept) in [(1, 1), (MAX_INITRDS, MAX_INITRDS), (1000, MAX_INITRDS + 1)] {
                let text = format!("linux /k\ninitrd {}/a", format!("/a{separator}").repeat(names - 1));
                let entry = LoaderEntry::parse("e.conf", &text, &environment()).unwrap();
                assert_eq!(entry.initrds.len(), kept, "{names} with {separator:?}");
            }
        }
    }

    #[test]
    fn orders() {
        // Name and text; each is before the next.
        let entries = [
            ("z.conf", "linux /k\nsort-key a\nversion 1"),
            ("y.conf", "linux /k\nsort-key b\nmachine-id 1\nversion 1"),
            ("c.conf", "linux /k\nsort-key b\nmachine-id 2\nversion 10"),
            ("d.conf", "linux /k\nsort-key b\nmachine-id 2\nversion 9"),
            ("linux-6.10.conf", "linux /k\nversion 1"),
            ("linux-6.9+3.conf", "linux /k\nversion 2"),
            ("linux-6.9~rc1+2-1.conf", "linux /k"),
            ("linux-7.0+0-3.conf", "linux /k"),
        ];
        let entries = entries.map(|(name, text)| LoaderEntry::parse(name, text, &environment()).unwrap());
        for (i, a) in entries.iter().enumerate() {
            for (j, b) in entries.iter().enumerate() {
                assert_eq!(a.order(b), i.cmp(&j), "{} and {}", a.id, b.id);
            }
        }
    }
}

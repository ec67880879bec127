//! The part of GRUB's configuration language that `grub-mkconfig` writes: which menu entry is the
//! default, and which kernel it names.
//!
//! Commands are not run. Assignments at the top of the file and in a menu entry are followed;
//! conditions are not decided, and a kernel inside of one is an error.

use std::collections::BTreeMap;

use crate::loader_entry::variable_name;
use crate::{Error, ErrorKind, Result};

/// How deep blocks may lie in each other, and how long a word may become; `grub-mkconfig` stays far
/// below, and the time that reading takes depends on both.
const MAX_NESTING: usize = 64;
const MAX_WORD: usize = 64 << 10;
/// How much all words of a configuration come to with their variables. The file itself has 1 MiB at most, but a
/// variable of two bytes may stand for a whole word.
const MAX_EXPANDED: usize = 16 << 20;

/// What a menu entry boots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MenuEntry {
    pub(crate) title: String,
    pub(crate) linux: String,
    pub(crate) initrds: Vec<String>,
    pub(crate) options: String,
}

/// The default menu entry of `grub.cfg`, or else the first; `None` if no entry boots Linux.
/// `environment` is what `grubenv` holds.
pub(crate) fn default_entry(text: &str, environment: &BTreeMap<String, String>) -> Result<Option<MenuEntry>> {
    let mut menu = Menu::read(text, environment)?;
    let Some(index) = menu.default().or_else(|| menu.items.iter().position(Item::boots_linux)) else {
        return Ok(None);
    };
    let Item { title, linux, initrd, .. } = menu.items.swap_remove(index);
    let kernel = linux.ok_or_else(|| unsupported(&title, "boots no Linux kernel"))?;
    let kernel = kernel.map_err(|why| unsupported(&title, &why))?;
    let initrds = initrd.unwrap_or(Ok(Vec::new())).map_err(|why| unsupported(&title, &why))?;
    let mut words = kernel.iter().map(String::as_str);
    let linux = without_device(words.next().unwrap_or_default());
    if linux.is_empty() {
        return Err(unsupported(&title, "has a linux command that names no file"));
    }
    let options: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let initrds = initrds.iter().map(|path| without_device(path)).filter(|path| !path.is_empty()).collect();
    Ok(Some(MenuEntry { title, linux, initrds, options: options.join(" ") }))
}

/// The variables of an environment block (`grubenv`).
pub(crate) fn environment(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn unsupported(title: &str, why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the GRUB menu entry {title:?} {why}"))
}

/// `(hd0,gpt1)/vmlinuz` without its device: files are looked for where the configuration lies.
fn without_device(path: &str) -> String {
    let path = match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        Some((_, path)) => path,
        None => path,
    };
    path.to_owned()
}

/// The words of a command, or why they cannot be known.
type Words = Result<Vec<String>, String>;

/// A menu entry or a submenu.
#[derive(Debug, Default)]
struct Item {
    parent: Option<usize>,
    is_submenu: bool,
    title: String,
    id: Option<String>,
    linux: Option<Words>,
    initrd: Option<Words>,
}

impl Item {
    fn boots_linux(&self) -> bool {
        self.linux.is_some()
    }
}

#[derive(Debug)]
struct Menu {
    items: Vec<Item>,
    default: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Block {
    Item,
    Function,
    Condition,
}

impl Menu {
    fn read(text: &str, environment: &BTreeMap<String, String>) -> Result<Self> {
        let mut items: Vec<Item> = Vec::new();
        let mut variables = environment.clone();
        // GRUB sets it to the device that it reads from, which is the one that is read here.
        variables.insert("root".to_owned(), String::new());
        let mut blocks: Vec<Block> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut default = None;
        let mut expanded = 0;

        for command in commands(text) {
            if blocks.len() > MAX_NESTING {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "GRUB's configuration has too many nested blocks",
                ));
            }
            let mut words: Vec<Words> = Vec::new();
            for word in &command {
                let word = word.expand(&variables);
                expanded += word.as_ref().map_or(0, String::len);
                if expanded > MAX_EXPANDED {
                    return Err(Error::new(
                        ErrorKind::TooLarge,
                        format!("the words of GRUB's configuration come to more than {MAX_EXPANDED} bytes"),
                    ));
                }
                words.push(word.map(|w| vec![w]));
            }
            let plain = |i: usize| words.get(i).and_then(|w| w.as_ref().ok()).map(|w| w[0].as_str());
            let arguments = || {
                words[1..].iter().cloned().try_fold(Vec::new(), |mut all, w| {
                    all.extend(w?);
                    Ok(all)
                })
            };
            let in_condition =
                blocks.iter().rev().take_while(|b| **b != Block::Item).any(|b| *b == Block::Condition);
            let in_function = blocks.contains(&Block::Function);
            match plain(0).unwrap_or_default() {
                "if" | "for" | "while" | "until" => blocks.push(Block::Condition),
                "fi" | "done" if blocks.last() == Some(&Block::Condition) => {
                    blocks.pop();
                }
                "function" => blocks.push(Block::Function),
                kind @ ("menuentry" | "submenu") => {
                    let id = (1..words.len()).find(|i| {
                        plain(*i) == Some("--id") || command[*i].is_variable("menuentry_id_option")
                    });
                    items.push(Item {
                        parent: open.last().copied(),
                        is_submenu: kind == "submenu",
                        title: plain(1).unwrap_or_default().to_owned(),
                        id: id.and_then(|i| plain(i + 1)).map(str::to_owned),
                        ..Item::default()
                    });
                    open.push(items.len() - 1);
                    blocks.push(Block::Item);
                }
                "}" => {
                    let closed = blocks.pop();
                    if closed == Some(Block::Item) {
                        open.pop();
                    }
                }
                "set" if !in_function => {
                    let Some(word) = command.get(1) else { continue };
                    let Some((name, value)) = word.assignment(&variables) else { continue };
                    // Both sides of a condition set the default; the last one is `else`, and it is
                    // the one that holds unless an entry was chosen for a single boot.
                    if name == "default" {
                        default = value.filter(|v| !v.is_empty()).or(default);
                    } else if name != "root" {
                        match value.filter(|_| !in_condition) {
                            Some(value) => variables.insert(name, value),
                            None => variables.remove(&name),
                        };
                    }
                }
                kind @ ("linux" | "linux16" | "linuxefi" | "initrd" | "initrd16" | "initrdefi") => {
                    let Some(item) = open.last().and_then(|i| items.get_mut(*i)) else { continue };
                    let words: Words = if in_condition {
                        Err(format!("has its {kind} command under a condition, which is not decided here"))
                    } else {
                        arguments()
                    };
                    let place = if kind.starts_with("linux") { &mut item.linux } else { &mut item.initrd };
                    *place = Some(words);
                }
                _ => {}
            }
        }
        Ok(Self { items, default })
    }

    /// The entry that `default` names by number, title or id, in submenus separated with `>`.
    fn default(&self) -> Option<usize> {
        let mut at = None;
        for name in self.default.as_deref().unwrap_or("0").split('>') {
            let mut children = self.items.iter().enumerate().filter(|(_, item)| item.parent == at);
            let name = name.trim();
            let child = match name.parse::<usize>() {
                Ok(number) => children.nth(number),
                Err(_) => children.find(|(_, item)| item.title == name || item.id.as_deref() == Some(name)),
            };
            at = Some(child?.0);
        }
        // A submenu boots its first entry.
        while let Some(index) = at.filter(|index| self.items[*index].is_submenu) {
            at = Some(self.items.iter().position(|item| item.parent == Some(index))?);
        }
        at.filter(|index| self.items[*index].boots_linux())
    }
}

/// A word of the configuration, before its variables are known.
#[derive(Debug, Default)]
struct Word {
    parts: Vec<Part>,
    /// A part of it was quoted or escaped: it is then no keyword and no brace.
    is_quoted: bool,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Variable(String),
}

impl Word {
    fn push(&mut self, c: char) {
        match self.parts.last_mut() {
            Some(Part::Text(text)) => text.push(c),
            _ => self.parts.push(Part::Text(c.to_string())),
        }
    }

    fn is_variable(&self, name: &str) -> bool {
        matches!(&self.parts[..], [Part::Variable(v)] if v == name)
    }

    /// The word with its variables replaced, or which one is not known.
    fn expand(&self, variables: &BTreeMap<String, String>) -> Result<String, String> {
        self.parts.iter().try_fold(String::new(), |mut out, part| {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Variable(name) => match variables.get(name) {
                    Some(value) => out.push_str(value),
                    None => {
                        return Err(format!("uses the variable {name}, whose value is known only to GRUB"));
                    }
                },
            }
            if out.len() > MAX_WORD { Err("has a word that is too long".to_owned()) } else { Ok(out) }
        })
    }

    /// `name=value`; the value is `None` where it is not known.
    fn assignment(&self, variables: &BTreeMap<String, String>) -> Option<(String, Option<String>)> {
        let Some(Part::Text(first)) = self.parts.first() else { return None };
        let (name, _) = first.split_once('=')?;
        let value = self.expand(variables).ok().map(|word| word[name.len() + 1..].to_owned());
        Some((name.to_owned(), value))
    }
}

/// Splits a script into commands. A command ends with a line, a semicolon or a brace; a closing
/// brace is a command of its own, and the keywords that only introduce one are left out.
fn commands(text: &str) -> Vec<Vec<Word>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<Word> = None;
    let mut rest = text;
    let end_word = |commands: &mut Vec<Vec<Word>>, word: &mut Option<Word>| {
        let (Some(word), Some(command)) = (word.take(), commands.last_mut()) else { return };
        let text = match &word.parts[..] {
            [Part::Text(text)] if !word.is_quoted => text.as_str(),
            _ => "",
        };
        match text {
            "then" | "else" | "do" if command.is_empty() => {}
            "{" => commands.push(Vec::new()),
            "}" => commands.extend([vec![word], Vec::new()]),
            _ => command.push(word),
        }
    };
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\n' | ';' => {
                end_word(&mut commands, &mut word);
                commands.push(Vec::new());
            }
            c if c.is_whitespace() => end_word(&mut commands, &mut word),
            '#' if word.is_none() => rest = rest.find('\n').map_or("", |end| &rest[end..]),
            '\'' => {
                let (quoted, after) = rest.split_once('\'').unwrap_or((rest, ""));
                let word = word.get_or_insert_default();
                word.is_quoted = true;
                quoted.chars().for_each(|c| word.push(c));
                rest = after;
            }
            '"' => {
                let word = word.get_or_insert_default();
                word.is_quoted = true;
                rest = double_quoted(rest, word);
            }
            '\\' => {
                if let Some(c) = rest.chars().next() {
                    rest = &rest[c.len_utf8()..];
                    // A line that ends with a backslash goes on in the next.
                    if c != '\n' {
                        let word = word.get_or_insert_default();
                        word.is_quoted = true;
                        word.push(c);
                    }
                }
            }
            '$' => rest = variable(rest, word.get_or_insert_default()),
            c => word.get_or_insert_default().push(c),
        }
    }
    end_word(&mut commands, &mut word);
    commands.retain(|command| !command.is_empty());
    commands
}

/// Reads up to the closing quote; returns what follows it.
fn double_quoted<'a>(mut rest: &'a str, word: &mut Word) -> &'a str {
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '"' => break,
            '\\' if rest.starts_with(['"', '\\', '$']) => {
                word.push(rest.as_bytes()[0].into());
                rest = &rest[1..];
            }
            '$' => rest = variable(rest, word),
            c => word.push(c),
        }
    }
    rest
}

/// Reads a variable's name after the `$`; returns what follows it.
fn variable<'a>(after: &'a str, word: &mut Word) -> &'a str {
    let (name, rest) = variable_name(after);
    match name {
        Some(name) => word.parts.push(Part::Variable(name.to_owned())),
        None => word.push('$'),
    }
    rest
}

#[cfg(test)]
#[path = "grub_tests.rs"]
mod tests;

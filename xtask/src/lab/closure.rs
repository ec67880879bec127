//! A program with all it needs to run elsewhere: its interpreter and its shared libraries.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::process;

/// The files that must be at these very paths where `program` is to run: none for a static program.
pub(super) fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = process::command("ldd").arg(program).output().context("cannot run ldd")?;
    let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        if said.contains("not a dynamic executable") || text.contains("not a dynamic executable") {
            return Ok(Vec::new());
        }
        bail!("ldd {} failed: {}", program.display(), said.trim());
    }
    parse(&text).with_context(|| format!("cannot collect the libraries of {}", program.display()))
}

/// Reads `ldd`'s answer: `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`, and `NAME (ADDRESS)` for what the
/// kernel brings.
fn parse(text: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("not found") {
            bail!("missing library: {line}");
        }
        let file = line.split_once("=> ").map_or(line, |(_, file)| file);
        let file = file.rsplit_once(" (").map_or(file, |(file, _)| file);
        if file.starts_with('/') {
            libraries.push(PathBuf::from(file));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f30)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f31)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(parse(text).unwrap(), expected.map(PathBuf::from));
        assert!(parse("\tstatically linked\n").unwrap().is_empty());
        assert!(parse("\tlibodd.so => not found\n").is_err());
    }

    #[test]
    fn finds_this_programs_own_libraries() {
        let own = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(own.iter().any(|path| path.ends_with("libc.so.6")), "{own:?}");
    }
}

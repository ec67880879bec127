//! The lab's disk: the root file system a command runs on, with all that is brought in.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::{Lab, closure};
use crate::process;

/// The disk's size; it is a hole but for what is written.
const DISK_SIZE: u64 = 16 << 30;

/// Makes the disk image `disk` for `lab`, by way of the empty directory `tree`.
pub(super) fn build(lab: &Lab, tree: &Path, disk: &Path) -> anyhow::Result<()> {
    for dir in ["etc", "lab/bin", "root", "sbin", "tmp", "usr/bin", "usr/sbin"] {
        fs::create_dir_all(tree.join(dir)).context("cannot make the lab's directories")?;
    }
    let programs = std::iter::once(&lab.program).chain(&lab.programs);
    for program in programs {
        copy_program(tree, program)?;
    }
    for (from, to) in &lab.files {
        copy(from, &inside(tree, to)?)?;
    }
    // Some programs ask who they are.
    write(&tree.join("etc/passwd"), b"root:x:0:0:root:/root:/bin/sh\n", 0o644)?;
    if lab.network {
        write(&tree.join("etc/resolv.conf"), b"nameserver 10.0.2.3\n", 0o644)?;
    }
    write(&tree.join("lab/bring-back"), &archiving(lab), 0o755)?;
    write(&tree.join("lab/run"), &script(lab), 0o755)?;

    File::create_new(disk).and_then(|file| file.set_len(DISK_SIZE)).context("cannot make the lab's disk")?;
    let mut mke2fs = process::command("fakeroot");
    mke2fs.args(["--", "mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"]).arg(tree).arg(disk);
    process::output(&mut mke2fs).context("cannot make the lab's file system").map(drop)
}

/// Where a program of the host is found in the lab.
pub(super) fn program_path(program: &Path) -> anyhow::Result<PathBuf> {
    let name = program.file_name().with_context(|| format!("{} names no program", program.display()))?;
    Ok(Path::new("/lab/bin").join(name))
}

fn copy_program(tree: &Path, program: &Path) -> anyhow::Result<()> {
    copy(program, &inside(tree, &program_path(program)?)?)?;
    for library in closure::libraries(program)? {
        let to = inside(tree, &library)?;
        if !to.exists() {
            copy(&library, &to)?;
        }
    }
    Ok(())
}

/// The shell script that becomes the command.
fn script(lab: &Lab) -> Vec<u8> {
    let mut script = b"cd /root\nexport HOME=/root TMPDIR=/tmp LANG=C.UTF-8 AMI_LAB=1\n\
        export PATH=/lab/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        .to_vec();
    for (name, value) in &lab.env {
        script.extend([b"export ", name.as_bytes(), b"=", &quoted(value), b"\n"].concat());
    }
    let name = lab.program.file_name().unwrap_or_default();
    script.extend(
        [b"exec ", &quoted(OsStr::from_bytes(&[b"/lab/bin/", name.as_bytes()].concat()))[..]].concat(),
    );
    for arg in &lab.args {
        script.push(b' ');
        script.extend(quoted(arg));
    }
    script.push(b'\n');
    script
}

/// The shell script that writes an archive of what is brought back.
fn archiving(lab: &Lab) -> Vec<u8> {
    if lab.outputs.is_empty() {
        return Vec::new();
    }
    let mut script = b"exec /bin/busybox tar -c -f - -C / --".to_vec();
    for (from, _) in &lab.outputs {
        script.push(b' ');
        script.extend(quoted(relative(from).as_os_str()));
    }
    script
}

/// `text` as one word of a shell command.
fn quoted(text: &OsStr) -> Vec<u8> {
    let mut word = vec![b'\''];
    for &byte in text.as_bytes() {
        if byte == b'\'' {
            word.extend(b"'\\''");
        } else {
            word.push(byte);
        }
    }
    word.push(b'\'');
    word
}

/// `path` without the leading `/`.
pub(super) fn relative(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

/// Where the absolute path `path` of the lab lies in `tree`; its parent is made.
fn inside(tree: &Path, path: &Path) -> anyhow::Result<PathBuf> {
    let upwards = path.components().any(|part| part == Component::ParentDir);
    ensure!(path.is_absolute() && !upwards, "{} is no absolute path in the lab", path.display());
    let path = tree.join(relative(path));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    Ok(path)
}

/// Copies a file or a directory tree, following links; holes stay holes.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let context = || format!("cannot bring {} into the lab", from.display());
    if !from.metadata().with_context(context)?.is_dir() {
        return copy_file(from, to).with_context(context);
    }
    fs::create_dir_all(to).with_context(context)?;
    for entry in fs::read_dir(from).with_context(context)? {
        let name = entry.with_context(context)?.file_name();
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};

    let (source, target) = (File::open(from)?, File::create(to)?);
    let size = source.metadata()?.len();
    target.set_len(size)?;
    target.set_permissions(source.metadata()?.permissions())?;
    let mut offset = 0;
    while offset < size {
        let Ok(start) = seek(&source, SeekFrom::Data(offset)) else { break };
        let end = seek(&source, SeekFrom::Hole(start))?;
        seek(&source, SeekFrom::Start(start))?;
        seek(&target, SeekFrom::Start(start))?;
        io::copy(&mut io::Read::take(&source, end - start), &mut &target)?;
        offset = end;
    }
    Ok(())
}

fn write(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    let written =
        fs::write(path, content).and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn quoting_survives_the_shell() {
        for text in ["", "plain", "two words", "it's", "'", "$HOME `id` \"x\" \\ *", "line\nline"] {
            let mut script = b"printf %s ".to_vec();
            script.extend(quoted(OsStr::new(text)));
            let output = Command::new("sh").arg("-c").arg(OsString::from_vec(script)).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
    }

    #[test]
    fn paths_stay_inside_the_tree() {
        let tree = tempfile::tempdir().unwrap();
        assert_eq!(inside(tree.path(), Path::new("/a/b")).unwrap(), tree.path().join("a/b"));
        assert!(tree.path().join("a").is_dir());
        for path in ["a/b", "/a/../../b", ""] {
            assert!(inside(tree.path(), Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn copies_keep_content_holes_and_mode() {
        use std::os::unix::fs::{FileExt as _, MetadataExt as _};

        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"middle", 32 << 20).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o751)).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        let copied = to.metadata().unwrap();
        assert_eq!(copied.permissions().mode() & 0o777, 0o751);
        assert!(copied.blocks() * 512 < 1 << 20, "{} blocks", copied.blocks());
    }
}

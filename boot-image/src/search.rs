//! The search for a kernel over the file systems of a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use storage_block::Disk;

use crate::budget::Budget;
use crate::filesystem::FileSystem;
use crate::loader_entry::LoaderEntry;
use crate::partition::{self, Layout, Place};
use crate::window::Window;
use crate::{BootSource, Error, ErrorKind, Result, grub, version};

const MAX_LOADER_ENTRY: u64 = 64 << 10;
const MAX_GRUB_CONFIG: u64 = 1 << 20;
/// GRUB's environment block is 1 KiB.
const MAX_GRUB_ENVIRONMENT: u64 = 4 << 10;
const MAX_LOADER_ENTRIES: usize = 256;
/// How many initial RAM disks an entry may name.
pub(crate) const MAX_INITRDS: usize = 64;

/// Where `/boot` may be, seen from the root of a file system: a directory of the root file system,
/// or the root of a file system of its own.
const BOOT_DIRECTORIES: [&str; 2] = ["/boot", ""];

/// What a disk boots, found and not yet read.
pub(crate) struct Located {
    pub(crate) fs: FileSystem,
    pub(crate) partition: Option<u32>,
    pub(crate) kernel_path: String,
    pub(crate) initrd_paths: Vec<String>,
    pub(crate) command_line: String,
    pub(crate) title: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) source: BootSource,
}

/// An entry as a configuration has it, with the paths that were found for it.
struct Choice {
    /// Which file system of the search it is on.
    index: usize,
    kernel_path: String,
    initrd_paths: Vec<String>,
    command_line: String,
    title: Option<String>,
    version: Option<String>,
    source: BootSource,
}

/// The file systems of a disk, and what was met on the way.
pub(crate) struct Search {
    found: Vec<(Place, FileSystem)>,
    /// What explains a failure: file systems that are not read, entries whose files are missing.
    notes: Vec<String>,
    /// The first file system or configuration that could not be read.
    failure: Option<Error>,
}

pub(crate) fn locate(disk: &Disk) -> Result<Located> {
    let mut search = Search::open(disk)?;
    let Some(choice) = search.choose() else { return Err(search.explain()) };
    let (place, fs) = search.found.swap_remove(choice.index);
    Ok(Located {
        fs,
        partition: place.partition.map(|(number, _)| number),
        kernel_path: choice.kernel_path,
        initrd_paths: choice.initrd_paths,
        command_line: choice.command_line,
        title: choice.title,
        version: choice.version,
        source: choice.source,
    })
}

impl Search {
    pub(crate) fn open(disk: &Disk) -> Result<Self> {
        let (places, has_table) = match partition::layout(disk)? {
            Layout::Gpt(places) => (places, true),
            Layout::Whole(place) => (vec![place], false),
            Layout::Mbr => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the disk has an MBR partition table; only GUID partition tables (GPT) are read",
                ));
            }
        };
        if places.is_empty() {
            return Err(Error::new(ErrorKind::NoPartition, "the GUID partition table of the disk is empty"));
        }
        let budget = Budget::new();
        let mut search = Self { found: Vec::new(), notes: Vec::new(), failure: None };
        for place in places {
            match FileSystem::open(place.open(disk), &budget) {
                Ok(Some(fs)) => search.found.push((place, fs)),
                Ok(None) => {
                    if let Some(kind) = foreign_file_system(place.open(disk)).map_err(cannot_read)? {
                        search.notes.push(format!("{} holds {kind}, which is not read", place.name()));
                    }
                }
                Err(e) => search.failed(e.about(&place.name())),
            }
        }
        if !search.found.is_empty() {
            return Ok(search);
        }
        if let Some(failure) = search.failure {
            return Err(failure);
        }
        let kind = if search.notes.is_empty() { ErrorKind::NoFileSystem } else { ErrorKind::Unsupported };
        let what = if has_table {
            "no partition of the disk holds an ext4 file system"
        } else {
            "the disk has no partition table and no ext4 file system"
        };
        Err(Error::new(kind, with_notes(what, &search.notes)))
    }

    /// The bytes of a regular file, on the first file system that has it.
    pub(crate) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let mut read =
            self.found.iter().map(|(place, fs)| fs.read(path, limit).map_err(|e| e.about(&place.name())));
        read.find(|file| !matches!(file, Ok(None))).unwrap_or(Ok(None))
    }

    fn failed(&mut self, e: Error) {
        self.failure.get_or_insert(e);
    }

    /// The first that names a kernel, over all file systems and directories, in the order of
    /// [`BootEntry::find`](crate::BootEntry::find).
    fn choose(&mut self) -> Option<Choice> {
        type Look = fn(&mut Search, usize, &str) -> Result<Option<Choice>>;
        let looks: [Look; 3] = [Self::loader_entry, Self::grub_entry, Self::kernel_file];
        // Where a configuration is there and cannot be read, it is not passed over for a guess.
        let mut unreadable = BTreeSet::new();
        for look in looks {
            for index in 0..self.found.len() {
                for boot in BOOT_DIRECTORIES {
                    if unreadable.contains(&index) {
                        break;
                    }
                    match look(self, index, boot) {
                        Ok(None) => {}
                        Ok(choice) => return choice,
                        Err(e) => {
                            unreadable.insert(index);
                            let name = self.found[index].0.name();
                            self.failed(e.about(&name));
                        }
                    }
                }
            }
        }
        None
    }

    fn explain(self) -> Error {
        self.failure.unwrap_or_else(|| {
            let what = "no kernel was found: neither /boot/loader/entries/*.conf, /boot/grub/grub.cfg nor \
                        /boot/vmlinuz-* name one; install a kernel package in the image";
            Error::new(ErrorKind::NoKernel, with_notes(what, &self.notes))
        })
    }

    fn loader_entry(&mut self, index: usize, boot: &str) -> Result<Option<Choice>> {
        let fs = &self.found[index].1;
        let directory = format!("{boot}/loader/entries");
        let mut files = fs.names(&directory)?;
        files.retain(|name| name.ends_with(".conf"));
        if files.len() > MAX_LOADER_ENTRIES {
            let count = files.len();
            return Err(Error::new(ErrorKind::TooLarge, format!("{directory} has {count} entries")));
        }
        if files.is_empty() {
            return Ok(None);
        }
        let environment = grub_environment(fs, boot)?;
        let mut entries = Vec::new();
        for file in files {
            let path = format!("{directory}/{file}");
            if let Some(text) = fs.read_text(&path, MAX_LOADER_ENTRY)? {
                entries.extend(LoaderEntry::parse(&file, &text, &environment).map(|entry| (entry, path)));
            }
        }
        entries.sort_by(|(a, _), (b, _)| a.order(b));
        for (entry, path) in entries {
            if let Some((kernel_path, initrd_paths)) =
                self.files(index, boot, &path, &entry.linux, &entry.initrds)?
            {
                return Ok(Some(Choice {
                    index,
                    version: entry.version.or_else(|| version_in(&kernel_path)),
                    kernel_path,
                    initrd_paths,
                    command_line: entry.options,
                    title: entry.title,
                    source: BootSource::LoaderEntry(path),
                }));
            }
        }
        Ok(None)
    }

    fn grub_entry(&mut self, index: usize, boot: &str) -> Result<Option<Choice>> {
        for directory in ["grub", "grub2"] {
            let fs = &self.found[index].1;
            let path = format!("{boot}/{directory}/grub.cfg");
            let Some(text) = fs.read_text(&path, MAX_GRUB_CONFIG)? else { continue };
            let environment = grub_environment(fs, boot)?;
            let Some(entry) = grub::default_entry(&text, &environment).map_err(|e| e.about(&path))? else {
                continue;
            };
            if let Some((kernel_path, initrd_paths)) =
                self.files(index, boot, &path, &entry.linux, &entry.initrds)?
            {
                return Ok(Some(Choice {
                    index,
                    version: version_in(&kernel_path),
                    kernel_path,
                    initrd_paths,
                    command_line: entry.options,
                    title: Some(entry.title),
                    source: BootSource::Grub(path),
                }));
            }
        }
        Ok(None)
    }

    fn kernel_file(&mut self, index: usize, boot: &str) -> Result<Option<Choice>> {
        let fs = &self.found[index].1;
        let mut names = fs.names(if boot.is_empty() { "/" } else { boot })?;
        let leftover = |name: &str| [".old", ".bak", ".sig", ".hmac"].iter().any(|end| name.ends_with(end));
        names.retain(|name| name.starts_with("vmlinuz-") && !leftover(name) && !name.contains(".dpkg-"));
        names.sort_by(|a, b| version::compare(b, a));

        let links = ["/vmlinuz".to_owned(), format!("{boot}/vmlinuz")];
        let candidates = links.into_iter().chain(names.into_iter().map(|name| format!("{boot}/{name}")));
        for candidate in candidates {
            let Some(kernel_path) = fs.file(&candidate)? else { continue };
            let initrd_paths: Vec<String> = self.initrd_for(index, &kernel_path)?.into_iter().collect();
            let command_line = self.default_command_line(index, !initrd_paths.is_empty())?;
            return Ok(Some(Choice {
                index,
                version: version_in(&kernel_path),
                kernel_path,
                initrd_paths,
                command_line,
                title: None,
                source: BootSource::KernelFile,
            }));
        }
        Ok(None)
    }

    /// The initial RAM disk beside a kernel, under the names of Debian, Fedora and openSUSE.
    fn initrd_for(&self, index: usize, kernel_path: &str) -> Result<Option<String>> {
        let fs = &self.found[index].1;
        let (directory, name) = kernel_path.rsplit_once('/').unwrap_or(("", kernel_path));
        let names = match name.strip_prefix("vmlinuz-") {
            Some(v) => vec![format!("initrd.img-{v}"), format!("initramfs-{v}.img"), format!("initrd-{v}")],
            None => vec!["initrd.img".to_owned(), "initrd".to_owned()],
        };
        for name in names {
            if let Some(path) = fs.file(&format!("{directory}/{name}"))? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    fn default_command_line(&self, index: usize, has_initrd: bool) -> Result<String> {
        // The kernel may lie on a partition that is only /boot; the root is the one with /etc.
        let mut root = None;
        for (place, fs) in self.found[index..].iter().chain(&self.found[..index]) {
            if fs.is_directory("/etc")? {
                root = Some((place, fs));
                break;
            }
        }
        let (place, fs) = root.unwrap_or((&self.found[index].0, &self.found[index].1));
        let root = match &place.partition {
            Some((_, uuid)) => format!("PARTUUID={uuid}"),
            None if has_initrd => format!("UUID={}", fs.uuid()),
            None => "/dev/vda".to_owned(),
        };
        Ok(format!("root={root} ro"))
    }

    /// The files that an entry names: as paths from the root of the file system, or else in the
    /// directory of the boot loader. `None`, and a note, where one is missing.
    fn files(
        &mut self,
        index: usize,
        boot: &str,
        entry: &str,
        linux: &str,
        initrds: &[String],
    ) -> Result<Option<(String, Vec<String>)>> {
        if initrds.len() > MAX_INITRDS {
            let what = format!("{entry} names more than {MAX_INITRDS} initial RAM disks");
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let fs = &self.found[index].1;
        let mut paths = Vec::new();
        for named in std::iter::once(linux).chain(initrds.iter().map(String::as_str)) {
            let mut path = None;
            for candidate in [named.to_owned(), format!("{boot}/{named}")] {
                path = fs.file(&candidate)?;
                if path.is_some() {
                    break;
                }
            }
            match path {
                Some(path) => paths.push(path),
                None => {
                    self.notes.push(format!("{entry} names {named}, which does not exist"));
                    return Ok(None);
                }
            }
        }
        let initrds = paths.split_off(1);
        Ok(paths.pop().map(|kernel| (kernel, initrds)))
    }
}

fn grub_environment(fs: &FileSystem, boot: &str) -> Result<BTreeMap<String, String>> {
    for directory in ["grub", "grub2"] {
        if let Some(text) = fs.read_text(&format!("{boot}/{directory}/grubenv"), MAX_GRUB_ENVIRONMENT)? {
            return Ok(grub::environment(&text));
        }
    }
    Ok(BTreeMap::new())
}

/// The version in a kernel's file name.
fn version_in(kernel_path: &str) -> Option<String> {
    let (_, name) = kernel_path.rsplit_once('/')?;
    name.strip_prefix("vmlinuz-").map(str::to_owned)
}

fn with_notes(what: &str, notes: &[String]) -> String {
    // An image may have as many as it likes.
    let notes: Vec<&str> = notes.iter().take(8).map(String::as_str).collect();
    if notes.is_empty() { what.to_owned() } else { format!("{what} ({})", notes.join("; ")) }
}

/// A file system or volume that is known by its first bytes and is not read here.
fn foreign_file_system(mut window: Window) -> io::Result<Option<&'static str>> {
    const KINDS: [(u64, &[u8], &str); 7] = [
        (0, b"XFSB", "an XFS file system"),
        (0x1_0040, b"_BHRfS_M", "a Btrfs file system"),
        (82, b"FAT32   ", "a FAT file system"),
        (54, b"FAT16   ", "a FAT file system"),
        (54, b"FAT12   ", "a FAT file system"),
        (0, b"LUKS\xba\xbe", "an encrypted (LUKS) volume"),
        (512, b"LABELONE", "an LVM volume"),
    ];
    for (offset, magic, name) in KINDS {
        let mut bytes = vec![0; magic.len()];
        match window.read_exact_at(&mut bytes, offset) {
            Ok(()) if bytes == magic => return Ok(Some(name)),
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

fn cannot_read(e: io::Error) -> Error {
    Error::new(ErrorKind::Io, "the disk cannot be read").because(e)
}

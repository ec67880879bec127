//! Kernel modules: which ones a guest needs, and in which order they load.
//!
//! The packages leave `modules.dep` to be made on the target, so dependencies are read where the
//! kernel's build put them: in each module's `.modinfo` section. Modules that come packed are unpacked,
//! for busybox cannot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;
use object::{Object as _, ObjectSection as _};
use ruzstd::decoding::StreamingDecoder as ZstdReader;

use crate::error::Context as _;
use crate::{Error, ErrorKind, Result};

/// The modules of one kernel, by name.
#[derive(Debug)]
pub(crate) struct Modules {
    /// `lib/modules/VERSION` of the unpacked package.
    root: PathBuf,
    /// Paths under `root`.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// One module that is to be loaded.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Its path under `lib/modules/VERSION`, unpacked.
    pub(crate) path: PathBuf,
    pub(crate) content: Vec<u8>,
    /// What it depends on directly.
    depends: Vec<String>,
}

impl Module {
    /// `virtio_blk.ko` of `kernel/drivers/block/virtio_blk.ko`.
    pub(crate) fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Modules {
    /// Finds the modules under `lib/modules/VERSION`.
    pub(crate) fn index(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect(root, Path::new("kernel"), &mut files)?;
        let builtin = fs::read_to_string(root.join("modules.builtin"))
            .context(|| format!("cannot read the built-in modules under {}", root.display()))?;
        let builtin = builtin.lines().filter_map(|line| name_of(Path::new(line))).collect();
        Ok(Self { root: root.to_owned(), files, builtin })
    }

    /// `wanted` and all they need, each after what it depends on; built-in ones left out.
    pub(crate) fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut found: BTreeMap<String, Module> = BTreeMap::new();
        let order = order(wanted, |name| {
            let Some(module) = self.load(name)? else { return Ok(None) };
            let depends = module.depends.clone();
            found.insert(name.to_owned(), module);
            Ok(Some(depends))
        })?;
        Ok(order.iter().filter_map(|name| found.remove(name)).collect())
    }

    fn load(&self, name: &str) -> Result<Option<Module>> {
        let Some(path) = self.files.get(name) else {
            if self.builtin.contains(name) {
                return Ok(None);
            }
            return Err(Error::new(ErrorKind::PackageNotFound, format!("the kernel has no module {name}")));
        };
        let file = self.root.join(path);
        let content = fs::read(&file).context(|| format!("cannot read {}", file.display()))?;
        let content = unpack(content, path).map_err(|e| e.about(file.display()))?;
        let depends = depends(&content).map_err(|e| e.about(file.display()))?;
        let path = if is_packed(path) { path.with_extension("") } else { path.clone() };
        Ok(Some(Module { path, content, depends }))
    }
}

/// `modules.dep` for `modules`, which must be closed under dependency and in load order.
pub(crate) fn modules_dep(modules: &[Module]) -> String {
    let path_of = |wanted: &String| {
        modules.iter().find(|m| name_of(&m.path).as_ref() == Some(wanted)).map(|m| m.path.as_path())
    };
    let mut text = String::new();
    for module in modules {
        let names = order(&module.depends.iter().map(String::as_str).collect::<Vec<_>>(), |name| {
            let found = modules.iter().find(|m| name_of(&m.path).as_deref() == Some(name));
            Ok(found.map(|m| m.depends.clone()))
        });
        text += &format!("{}:", module.path.display());
        // The file wants them in unload order: the last to load first.
        for path in names.unwrap_or_default().iter().rev().filter_map(path_of) {
            text += &format!(" {}", path.display());
        }
        text.push('\n');
    }
    text
}

/// `wanted` with all dependencies, each name once and after all that it depends on. `depends` answers
/// `None` for what is built into the kernel.
fn order(
    wanted: &[&str],
    mut depends: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Vec<String>> {
    /// What is left to do, last first.
    enum Todo {
        Visit(String),
        Emit(String),
    }
    let mut todo: Vec<Todo> = wanted.iter().rev().map(|name| Todo::Visit(normal(name))).collect();
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    while let Some(next) = todo.pop() {
        match next {
            Todo::Emit(name) => order.push(name),
            Todo::Visit(name) => {
                if !seen.insert(name.clone()) {
                    continue;
                }
                if let Some(depends) = depends(&name)? {
                    todo.push(Todo::Emit(name));
                    todo.extend(depends.iter().rev().map(|name| Todo::Visit(normal(name))));
                }
            }
        }
    }
    Ok(order)
}

fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension != "ko")
}

/// The module in the file `path`, which ends in `.ko`, or with what packed it.
fn unpack(content: Vec<u8>, path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => Ok(content),
        Some("xz") => read_all(XzReader::new(&content[..], true)),
        Some("zst") => {
            let reader = ZstdReader::new(&content[..]);
            read_all(reader.map_err(|e| corrupt(format!("cannot be unpacked: {e}")))?)
        }
        _ => Err(corrupt("is packed in an unknown way")),
    }
}

fn read_all(mut reader: impl Read) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    reader.read_to_end(&mut content).map_err(|e| corrupt(format!("cannot be unpacked: {e}")))?;
    Ok(content)
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// The direct dependencies in a module's `.modinfo`, a section of NUL-terminated `key=value` texts.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module).map_err(|e| corrupt(format!("is no kernel module: {e}")))?;
    let section = file.section_by_name(".modinfo").ok_or_else(|| corrupt("has no .modinfo section"))?;
    let info = section.data().map_err(|e| corrupt(format!("has an unreadable .modinfo section: {e}")))?;
    Ok(parse_depends(info))
}

fn parse_depends(modinfo: &[u8]) -> Vec<String> {
    let values = modinfo.split(|byte| *byte == 0).filter_map(|entry| entry.strip_prefix(b"depends="));
    let names = values.flat_map(|value| value.split(|byte| *byte == b','));
    names.filter(|name| !name.is_empty()).map(|name| normal(&String::from_utf8_lossy(name))).collect()
}

fn collect(root: &Path, dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let absolute = root.join(dir);
    let context = || format!("cannot read {}", absolute.display());
    for entry in fs::read_dir(&absolute).context(context)? {
        let entry = entry.context(context)?;
        let path = dir.join(entry.file_name());
        if entry.file_type().context(context)?.is_dir() {
            collect(root, &path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `kvm_amd` of `…/kvm-amd.ko` and of `…/kvm-amd.ko.xz`.
fn name_of(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(normal(stem))
}

/// The kernel takes `-` and `_` in module names for the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few modules as Debian's kernel has them; `ext4` stands for what is built in.
    fn sample(name: &str) -> Result<Option<Vec<String>>> {
        let depends: &[&str] = match name {
            "virtio" | "irqbypass" => &[],
            "virtio_ring" | "virtio_pci_modern_dev" => &["virtio"],
            "virtio_pci" => &["virtio_ring", "virtio_pci_modern_dev", "virtio"],
            "virtio_blk" => &["virtio", "virtio_ring"],
            "kvm" => &["irqbypass"],
            "kvm_amd" => &["kvm"],
            "ext4" => return Ok(None),
            "a" => &["b"],
            "b" => &["a"],
            _ => return Err(corrupt(name)),
        };
        Ok(Some(depends.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn orders_dependencies_first() {
        for (wanted, expected) in [
            (&[][..], ""),
            (&["ext4"], ""),
            (&["virtio"], "virtio"),
            (&["kvm-amd"], "irqbypass kvm kvm_amd"),
            (&["kvm_amd", "kvm-amd", "kvm"], "irqbypass kvm kvm_amd"),
            (
                &["virtio_pci", "ext4", "virtio_blk"],
                "virtio virtio_ring virtio_pci_modern_dev virtio_pci virtio_blk",
            ),
            // The kernel's build refuses circles; here they must merely end.
            (&["a"], "b a"),
        ] {
            assert_eq!(order(wanted, sample).unwrap().join(" "), expected, "{wanted:?}");
        }
        assert!(order(&["virtio", "missing"], sample).is_err());
    }

    /// Packed as the kernel's build does it: `xz --check=crc32 --lzma2=dict=1MiB` and `zstd -T0 --rm`.
    const XZ: &str = "fd377a585a0000016922de360200210110000000a8708e860100056120626f6479000000f686474900011a06c5eac8799042990d010000000001595a";
    const ZST: &str = "28b52ffd04583100006120626f6479c49c9b3b";

    #[test]
    fn unpacks_what_distributions_pack() {
        let module = |name: &str, hex: &str| unpack(hex::decode(hex).unwrap(), Path::new(name));
        for (name, packed) in [("a.ko", "6120626f6479"), ("a.ko.xz", XZ), ("a.ko.zst", ZST)] {
            assert_eq!(module(name, packed).unwrap(), b"a body", "{name}");
            assert_eq!(is_packed(Path::new(name)), name != "a.ko");
        }
        for (name, packed) in
            [("a.ko.xz", ZST), ("a.ko.zst", XZ), ("a.ko.xz", &XZ[..60]), ("a.ko.gz", "6120626f6479")]
        {
            assert!(module(name, packed).is_err(), "{name} {packed}");
        }
    }

    #[test]
    fn reads_modinfo() {
        for (modinfo, expected) in [
            (&b""[..], ""),
            (b"license=GPL\0depends=\0name=virtio\0", ""),
            (b"license=GPL\0depends=virtio-ring,virtio\0name=virtio_blk\0", "virtio_ring virtio"),
            (b"depends=kvm", "kvm"),
        ] {
            assert_eq!(parse_depends(modinfo).join(" "), expected);
        }
        assert!(depends(b"\xfd7zXZ\0").is_err());
    }

    #[test]
    fn writes_modules_dep_in_unload_order() {
        let module = |path: &str, depends: &[&str]| Module {
            path: path.into(),
            content: Vec::new(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        };
        let modules = [
            module("kernel/virt/irqbypass.ko", &[]),
            module("kernel/kvm/kvm.ko", &["irqbypass"]),
            module("kernel/kvm/kvm-amd.ko", &["kvm"]),
        ];
        assert_eq!(
            modules_dep(&modules),
            "kernel/virt/irqbypass.ko:\n\
             kernel/kvm/kvm.ko: kernel/virt/irqbypass.ko\n\
             kernel/kvm/kvm-amd.ko: kernel/kvm/kvm.ko kernel/virt/irqbypass.ko\n"
        );
    }
}

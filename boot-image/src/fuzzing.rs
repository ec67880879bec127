//! What the fuzz targets run, and the tests over the corpus. No part of the interface.

use std::collections::BTreeMap;

use storage_block::{Disk, MemoryDisk};

use crate::loader_entry::LoaderEntry;
use crate::partition::{self, Layout};
use crate::superblock::{self, Superblock};
use crate::{BootEntry, grub, unpack_kernel, version};

fn disk(bytes: &[u8]) -> Option<Disk> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    MemoryDisk::from_vec(bytes).ok().map(MemoryDisk::into_disk)
}

/// A disk: whatever is found lies on it, and is what a second look finds.
pub fn boot_entry(bytes: &[u8]) {
    let Some(disk) = disk(bytes) else { return };
    let Ok(found) = BootEntry::find(&disk) else { return };
    assert!(!found.kernel.is_empty() && found.kernel_path.starts_with('/'));
    assert!(!found.command_line.contains(|c: char| c.is_control() && c != '\t'));
    assert_eq!(found.initrd.is_some(), !found.initrd_paths.is_empty());
    assert_eq!(BootEntry::find(&disk).ok(), Some(found), "a second look differs");
}

/// A partition table: no partition reaches out of the disk.
pub fn partition_table(bytes: &[u8]) {
    let Some(disk) = disk(bytes) else { return };
    match partition::layout(&disk) {
        Ok(Layout::Gpt(places)) => places.iter().for_each(|p| assert!(p.open(&disk).len() <= disk.size())),
        Ok(Layout::Whole(place)) => assert_eq!(place.open(&disk).len(), disk.size()),
        Ok(Layout::Mbr) | Err(_) => {}
    }
}

/// A superblock that is taken speaks of no more than the partition, and its journal is read from
/// within.
pub fn superblock(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<{ superblock::SIZE }>() else { return };
    let len = bytes.len() as u64 * 1024;
    let Ok(mut taken) = Superblock::parse(Box::new(*head), len) else { return };
    assert!(taken.block_size.is_power_of_two() && (1024..=65536).contains(&taken.block_size));
    let blocks = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    assert!(u64::from(blocks) * taken.block_size <= len);
    let _ = taken.check_journal(|buf, offset| {
        assert!(buf.len() <= 128);
        buf.iter_mut()
            .zip(rest.iter().cycle().skip((offset % 4096) as usize))
            .for_each(|(to, from)| *to = *from);
        Ok(())
    });
    Superblock::costly_extent_node(rest);
}

/// A configuration of GRUB. What it is made to say, whatever the words, is what is read.
pub fn grub_config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(Some(entry)) = grub::default_entry(&text, &grub::environment(&text)) {
        assert!(!entry.linux.is_empty());
    }
    let words: Vec<&str> = text.split_whitespace().filter(|w| !w.contains('\'')).take(20).collect();
    let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
    let config = format!("menuentry 'x' {{\n linux /kernel {}\n initrd /a\n}}\n", quoted.join(" "));
    match grub::default_entry(&config, &BTreeMap::new()) {
        Ok(Some(entry)) => {
            assert_eq!((entry.linux.as_str(), entry.options.as_str()), ("/kernel", &*words.join(" ")));
            assert_eq!(entry.initrds, ["/a"]);
        }
        other => panic!("{config:?} is read as {other:?}"),
    }
}

/// Two loader entries, and the order of them and of versions.
pub fn loader_entries(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let parts: Vec<&str> = text.splitn(5, '\0').collect();
    let [name, other, first, second, rest] = parts[..] else { return };
    let environment = grub::environment(rest);
    let entries: Vec<LoaderEntry> = [(name, first), (other, second), (name, second)]
        .iter()
        .filter_map(|(name, text)| LoaderEntry::parse(&format!("{name}.conf"), text, &environment))
        .collect();
    for a in &entries {
        assert!(!a.linux.is_empty());
        for b in &entries {
            assert_eq!(a.order(b), b.order(a).reverse());
            for c in &entries {
                assert!(!(a.order(b).is_lt() && b.order(c).is_lt()) || a.order(c).is_lt());
            }
        }
    }
    let versions = [name, other, first.get(..12).unwrap_or(first)];
    for a in versions {
        for b in versions {
            assert_eq!(version::compare(a, b), version::compare(b, a).reverse(), "{a:?} {b:?}");
        }
    }
}

/// A kernel: what it unpacks to needs no unpacking and is for the same machine.
pub fn kernel(bytes: &[u8]) {
    let Ok(kernel) = unpack_kernel(bytes) else { return };
    assert!(!kernel.image.is_empty());
    let again = unpack_kernel(&kernel.image);
    assert_eq!(again.ok().as_ref(), Some(&kernel), "what was unpacked is packed");
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_target_bears_the_corpus() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        let mut run = 0;
        for dir in std::fs::read_dir(corpus).unwrap() {
            for file in std::fs::read_dir(dir.unwrap().path()).unwrap() {
                let bytes = std::fs::read(file.unwrap().path()).unwrap();
                for target in [
                    super::boot_entry,
                    super::partition_table,
                    super::superblock,
                    super::grub_config,
                    super::loader_entries,
                    super::kernel,
                ] {
                    target(&bytes);
                    run += 1;
                }
            }
        }
        assert!(run > 50, "the corpus is not there");
    }
}

//! What the fuzz targets run, and the tests over the corpus. No part of the interface.

use crate::{Image, Manifest};

/// A manifest and an image from outside: what is taken is valid, has one canonical form, and comes
/// back from it.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::from_json(bytes) {
        let canonical = manifest.to_canonical_json();
        assert_eq!(Manifest::from_canonical_json(&canonical).ok().as_ref(), Some(&manifest));
        assert_eq!(crate::Digest::of(&canonical), manifest.digest());
        assert!(Manifest::from_json_with_digest(bytes, &manifest.digest()).is_ok());
        assert!(manifest.root_device().is_some());
    }
    let Ok(image) = serde_json::from_slice::<Image>(bytes) else { return };
    let json = serde_json::to_vec(&image);
    let again = json.and_then(|json| serde_json::from_slice::<Image>(&json));
    let again = again.unwrap_or_else(|e| panic!("what was written cannot be read: {e}"));
    assert_eq!(again.ami(), image.ami());
    assert_eq!(again, image);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn every_target_bears_the_corpus() {
        let mut run = 0;
        for dir in ["tests/golden", "../fuzz/seeds/manifest"] {
            for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)).unwrap() {
                super::manifest(&std::fs::read(file.unwrap().path()).unwrap());
                run += 1;
            }
        }
        assert!(run > 3, "the corpus is not there");
    }
}

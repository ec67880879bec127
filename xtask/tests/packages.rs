//! What a published crate has beside its code.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The directories of the crates that are published.
fn published() -> Vec<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let published = packages.filter(|package| package["publish"].is_null());
    published
        .map(|package| Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned())
        .collect()
}

#[test]
fn published_crates_have_their_licenses_and_a_readme_whose_code_is_compiled() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let compiled = fs::read_to_string(workspace.join("examples/src/lib.rs")).unwrap();
    let published = published();
    assert!(published.len() >= 6, "{published:?}");
    for dir in published {
        for license in ["LICENSE-APACHE", "LICENSE-MIT"] {
            let own =
                fs::read(dir.join(license)).unwrap_or_else(|e| panic!("{}/{license}: {e}", dir.display()));
            assert!(own == fs::read(workspace.join(license)).unwrap(), "{}/{license} differs", dir.display());
        }
        let name = dir.file_name().unwrap().to_str().unwrap();
        let readme = fs::read_to_string(dir.join("README.md")).unwrap();
        assert!(readme.contains("```rust"), "the README of {name} has no example");
        let included = format!("include_str!(\"../../{name}/README.md\")");
        assert!(compiled.contains(&included), "nothing compiles the example of {name}");
    }
}

//! What must not compile: an image on a hypervisor that does not run its architecture.
//!
//! The examples in the documentation that show it pass with any error of the compiler. Here the same lines compile
//! when only the architecture is changed, and the error is the one that it should be.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Lines with the architecture of an image left open, the error where it is the wrong one, and what the error says.
const CASES: [(&str, &str, &str, &str); 3] = [
    (
        "launch",
        "use ami_core::{Ami, ARCHITECTURE};
        use instance_core::machine::{Hypervisor, Runs};
        use instance_core::{InstanceType, LaunchSpec, Region};
        pub fn launch<H>(region: &Region<H>, ami: &Ami<ARCHITECTURE>, hardware: InstanceType)
        where
            H: Hypervisor + Runs<ami_core::X86_64>,
        {
            let _ = region.launch(ami, LaunchSpec::new(hardware));
        }",
        "E0308",
        "expected `&Ami<X86_64>`, found `&Ami<Arm64>`",
    ),
    (
        "launch_where_the_hypervisor_is_known",
        "use ami_core::{Ami, ARCHITECTURE, X86_64 as Known};
        use instance_core::machine::{Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, Runs};
        use instance_core::{InstanceType, LaunchSpec, Region};
        #[derive(Debug)]
        pub struct Only;
        impl Hypervisor for Only {
            fn capabilities(&self) -> Capabilities {
                loop {}
            }
            fn execution(&self) -> Result<Execution, MachineError> {
                loop {}
            }
            fn create(&self, _: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
                loop {}
            }
        }
        impl Runs<Known> for Only {}
        pub fn launch(region: &Region<Only>, ami: &Ami<ARCHITECTURE>, hardware: InstanceType) {
            let _ = region.launch(ami, LaunchSpec::new(hardware));
        }",
        "E0277",
        "`Only` does not run images of architecture",
    ),
    (
        "pass_an_image",
        "use ami_core::{Ami, ARCHITECTURE};
        fn launch_on_x86(_: &Ami<ami_core::X86_64>) {}
        pub fn launch(ami: &Ami<ARCHITECTURE>) {
            launch_on_x86(ami);
        }",
        "E0308",
        "expected `&Ami<X86_64>`, found `&Ami<Arm64>`",
    ),
];

/// A package of its own with all cases, for each architecture. It shares nothing with the workspace but the versions
/// of what it depends on, so that nothing has to be fetched.
fn package() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile");
    fs::create_dir_all(package.join("src/bin")).unwrap();
    let path = |name: &str| toml_text(&crates.join(name));
    let manifest = format!(
        "[package]\nname = \"compile\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n\
         ami-core.path = {}\ninstance-core.path = {}\n",
        path("ami-core"),
        path("instance-core"),
    );
    fs::write(package.join("Cargo.toml"), manifest).unwrap();
    fs::copy(crates.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    for (name, lines, ..) in CASES {
        for architecture in ["X86_64", "Arm64"] {
            let lines = lines.replace("ARCHITECTURE", architecture);
            let file = package.join(format!("src/bin/{name}_{}.rs", architecture.to_lowercase()));
            fs::write(file, format!("{lines}\nfn main() {{}}\n")).unwrap();
        }
    }
    package
}

fn toml_text(path: &Path) -> String {
    Value::from(path.to_str().unwrap()).to_string()
}

fn check(package: &Path, programs: &[String]) -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["check", "--quiet", "--offline", "--message-format=json"]);
    cargo.args(programs.iter().flat_map(|name| ["--bin", name.as_str()]));
    cargo.current_dir(package).env("CARGO_TARGET_DIR", package.join("target"));
    cargo.stdin(Stdio::null()).output().unwrap()
}

/// The codes and texts of the errors that the compiler gave.
fn errors(output: &Output) -> Vec<(String, String)> {
    let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let messages = lines.map(|line| serde_json::from_slice::<Value>(line).unwrap());
    let errors = messages.filter(|m| m["reason"] == "compiler-message" && m["message"]["level"] == "error");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    errors.map(|m| (text(&m["message"]["code"]["code"]), text(&m["message"]["rendered"]))).collect()
}

#[test]
fn only_the_architecture_is_refused() {
    let package = package();
    let names = |architecture: &str| CASES.map(|(name, ..)| format!("{name}_{architecture}"));
    let right = check(&package, &names("x86_64"));
    assert!(right.status.success(), "{:?}\n{}", errors(&right), String::from_utf8_lossy(&right.stderr));
    for ((.., code, says), name) in CASES.iter().zip(names("arm64")) {
        let wrong = errors(&check(&package, std::slice::from_ref(&name)));
        let codes: BTreeSet<&str> =
            wrong.iter().map(|(code, _)| code.as_str()).filter(|c| !c.is_empty()).collect();
        assert_eq!(codes, BTreeSet::from([*code]), "{name}: {wrong:?}");
        assert!(wrong.iter().any(|(_, text)| text.contains(says)), "{name}: {wrong:?}");
    }
}

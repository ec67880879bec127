//! `cargo xtask proofs`: the tests that try many random lives, crashes and kills, with the numbers that one night is good
//! for. `cargo xtask test` runs the same tests with fewer.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::builder::PossibleValuesParser;

/// Run the random tests with their large numbers, which takes hours
#[derive(clap::Args)]
pub(crate) struct ProofsArgs {
    /// What to prove (everything if nothing is named)
    #[arg(value_parser = PossibleValuesParser::new(PROOFS.iter().map(|proof| proof.name)))]
    proofs: Vec<String>,
}

/// A test, and how much it is to do.
struct Proof {
    name: &'static str,
    package: &'static str,
    /// The target of the package that has the test, and the test's name in there.
    target: &'static [&'static str],
    test: &'static str,
    numbers: &'static [(&'static str, u32)],
}

const LIB: &[&str] = &["--lib"];
/// Of so many operations that are not durable every part is tried.
const FEW: (&str, u32) = ("STORAGE_BLOCK_POWER_FEW", 8);

const PROOFS: &[Proof] = &[
    Proof {
        name: "volumes-model",
        package: "storage-block",
        target: LIB,
        test: "tests::model::random_histories_agree_with_memory",
        numbers: &[("STORAGE_BLOCK_MODEL_STEPS", 1_000_000)],
    },
    Proof {
        name: "volumes-kills",
        package: "storage-block",
        target: &["--test", "kill"],
        test: "what_a_killed_process_had_done_is_there",
        numbers: &[("STORAGE_BLOCK_KILLS", 1000)],
    },
    Proof {
        name: "volumes-kills-importer",
        package: "storage-block",
        target: &["--test", "kill"],
        test: "importer::what_a_killed_importer_had_done_is_there",
        numbers: &[("STORAGE_BLOCK_IMPORTER_KILLS", 1000)],
    },
    Proof {
        name: "volumes-power",
        package: "storage-block",
        target: LIB,
        test: "tests::power::power_cuts_lose_nothing_that_was_promised",
        numbers: &[FEW, ("STORAGE_BLOCK_POWER_SEEDS", 6), ("STORAGE_BLOCK_POWER_ACTS", 200)],
    },
    Proof {
        name: "volumes-power-beside",
        package: "storage-block",
        target: LIB,
        test: "tests::beside::power_cuts_lose_nothing_that_was_promised_beside_others",
        numbers: &[FEW, ("STORAGE_BLOCK_BESIDE_SEEDS", 20), ("STORAGE_BLOCK_BESIDE_WRITES", 120)],
    },
    Proof {
        name: "volumes-power-taken-over",
        package: "storage-block",
        target: LIB,
        test: "tests::power::what_the_dead_left_is_durable_before_it_is_relied_on",
        numbers: &[FEW, ("STORAGE_BLOCK_POWER_STRIDE", 20)],
    },
    Proof {
        name: "volumes-power-undone",
        package: "storage-block",
        target: LIB,
        test: "tests::power::what_is_undone_does_not_come_back_in_parts",
        numbers: &[FEW, ("STORAGE_BLOCK_POWER_FAILED_STRIDE", 2)],
    },
    Proof {
        name: "region-model",
        package: "instance-core",
        target: &["--test", "model"],
        test: "any_life_is_as_the_reference_says",
        numbers: &[("REGION_MODEL_STEPS", 100_000)],
    },
    Proof {
        name: "region-resources",
        package: "instance-core",
        target: &["--test", "resources_model"],
        test: "resources_are_as_the_reference_says",
        numbers: &[("REGION_RESOURCES_STEPS", 100_000)],
    },
    Proof {
        name: "region-kills",
        package: "instance-core",
        target: &["--test", "recovery"],
        test: "nothing_acknowledged_is_lost_and_nothing_else_is_left",
        numbers: &[("REGION_KILLS", 1000)],
    },
    Proof {
        name: "machines-dropped",
        package: "hypervisor-kvm",
        target: &["--test", "drops"],
        test: "machines_dropped_at_any_moment_leave_nothing",
        numbers: &[("KVM_DROPS", 1000)],
    },
];

/// Runs one after the other, until one fails. What a test says shows how far it is.
pub(crate) fn run(args: &ProofsArgs) -> Result<ExitCode> {
    let asked = |proof: &&Proof| args.proofs.is_empty() || args.proofs.iter().any(|name| name == proof.name);
    let mut times = Vec::new();
    for proof in PROOFS.iter().filter(asked) {
        let begun = Instant::now();
        proof.run().with_context(|| format!("{} failed", proof.name))?;
        times.push((proof.name, begun.elapsed()));
    }
    eprintln!();
    for (name, took) in times {
        eprintln!("{name:<26} {:>8.1} s", took.as_secs_f64());
    }
    Ok(ExitCode::SUCCESS)
}

impl Proof {
    fn run(&self) -> Result<()> {
        let numbers = self.numbers.iter().map(|(name, number)| (*name, number.to_string()));
        let said: Vec<String> = numbers.clone().map(|(name, number)| format!("{name}={number}")).collect();
        eprintln!("==> {}: {}", self.name, said.join(" "));
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["test", "--quiet", "--package", self.package]).args(self.target);
        cargo.args(["--", "--exact", self.test, "--nocapture"]).envs(numbers);
        let status = cargo.status().context("cannot run cargo")?;
        ensure!(status.success(), "cargo test failed ({status})");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    /// A test that is called otherwise by now would prove nothing, and say so by no error.
    #[test]
    fn there_are_such_tests_and_they_ask_for_the_numbers() {
        let mut sources = String::new();
        for dir in ["storage-block", "instance-core", "hypervisor-kvm"] {
            for below in ["src", "tests"] {
                read(&workspace::root().join(dir).join(below), &mut sources);
            }
        }
        for proof in PROOFS {
            let test = proof.test.rsplit("::").next().unwrap();
            assert!(sources.contains(&format!("fn {test}(")), "{test}");
            for (name, _) in proof.numbers {
                assert!(sources.contains(&format!("\"{name}\"")), "{name}");
            }
        }
    }

    fn read(path: &std::path::Path, to: &mut String) {
        if path.is_dir() {
            std::fs::read_dir(path).unwrap().for_each(|entry| read(&entry.unwrap().path(), to));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            to.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

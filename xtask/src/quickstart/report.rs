//! The quick start's results: a table for people, an object for programs.

use std::time::{Duration, Instant};

use ami_core::AnyAmi;
use anyhow::Result;
use instance_core::machine::{Execution, Hypervisor};
use instance_core::{CreatedImage, Instance, InstanceDescription};
use serde::Serialize;

use super::display::Display;
use super::states::Changes;

/// What is known so far.
pub(crate) struct Report {
    display: Display,
    results: Results,
}

/// The object that `--json` prints.
#[derive(Default, Serialize)]
struct Results {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    hypervisor: Option<HypervisorResult>,
    images: Vec<ImageResult>,
    instances: Vec<InstanceResult>,
    steps: Vec<StepResult>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<Left>,
}

#[derive(Serialize)]
struct HypervisorResult {
    name: &'static str,
    execution: &'static str,
    measured: String,
}

#[derive(Serialize)]
struct ImageResult {
    id: String,
    name: String,
    architecture: String,
    digest: String,
    #[serde(flatten)]
    change: Option<ChangeResult>,
}

#[derive(Serialize)]
struct ChangeResult {
    made_of: String,
    bytes_changed: u64,
    bytes_stored: u64,
    paused_seconds: f64,
}

#[derive(Serialize)]
struct InstanceResult {
    id: String,
    image: String,
    state_changes: Vec<super::states::Change>,
}

#[derive(Serialize)]
struct StepResult {
    step: String,
    seconds: f64,
}

/// What is left when everything is over: of this process nothing, in the region's directory the files
/// that its images name.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Left {
    pub(crate) images: usize,
    pub(crate) files: usize,
    pub(crate) bytes_on_disk: u64,
}

impl Report {
    pub(crate) fn new(steps: usize) -> Self {
        Self { display: Display::new(steps), results: Results::default() }
    }

    pub(crate) fn display(&self) -> &Display {
        &self.display
    }

    /// A line for whoever watches.
    pub(crate) fn say(&self, line: &str) {
        self.display.say(line);
    }

    /// Does a step, showing that it is under way and how long it took.
    pub(crate) fn step<T>(&mut self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.display.begin(what);
        let begun = Instant::now();
        let done = work();
        let took = begun.elapsed();
        let end = if done.is_ok() { "done" } else { "failed" };
        self.say(&format!("{what}: {end} in {took:.2?}"));
        self.display.advance();
        self.results.steps.push(StepResult { step: what.to_owned(), seconds: took.as_secs_f64() });
        done
    }

    pub(crate) fn hypervisor(&mut self, hypervisor: &dyn Hypervisor) -> Result<()> {
        let (execution, measured) = in_words(&hypervisor.execution()?);
        let name = hypervisor.capabilities().name;
        self.say(&format!("machines on {name}, {execution}: {measured}"));
        self.results.hypervisor = Some(HypervisorResult { name, execution, measured });
        Ok(())
    }

    pub(crate) fn image(&mut self, ami: &AnyAmi) {
        self.say(&format!("    {} {} {} {}", ami.id(), ami.architecture(), ami.name(), ami.digest()));
        self.results.images.push(ImageResult {
            id: ami.id().to_string(),
            name: ami.name().to_owned(),
            architecture: ami.architecture().to_string(),
            digest: ami.digest().to_string(),
            change: None,
        });
    }

    pub(crate) fn image_of(&mut self, instance: &Instance, created: &CreatedImage) {
        self.image(&created.ami);
        let (changed, stored, paused) = (created.changed_bytes, created.stored_bytes, created.paused);
        self.say(&format!("    {changed} bytes changed, {stored} bytes stored, paused for {paused:.1?}"));
        if let Some(image) = self.results.images.last_mut() {
            image.change = Some(ChangeResult {
                made_of: instance.id().to_string(),
                bytes_changed: changed,
                bytes_stored: stored,
                paused_seconds: paused.as_secs_f64(),
            });
        }
    }

    /// All instances there were, with what was heard of them.
    pub(crate) fn instances(&mut self, instances: &[InstanceDescription], mut changes: Changes) {
        for instance in instances {
            let (id, image) = (instance.id.to_string(), instance.image_id.to_string());
            let state_changes = changes.remove(&id).unwrap_or_default();
            self.results.instances.push(InstanceResult { id, image, state_changes });
        }
    }

    /// The ids of the images that were made.
    pub(crate) fn image_ids(&self) -> impl Iterator<Item = &str> {
        self.results.images.iter().map(|image| image.id.as_str())
    }

    pub(crate) fn left(&mut self, left: Left) {
        let Left { images, files, bytes_on_disk } = left;
        self.say(&format!(
            "    {files} files, {bytes_on_disk} bytes, for {images} images; nothing else of this run"
        ));
        self.results.left = Some(left);
    }

    /// The table of the steps, or all as JSON, on standard output.
    pub(crate) fn print(mut self, outcome: &Result<()>, json: bool) -> Result<()> {
        self.display.clear();
        self.results.ok = outcome.is_ok();
        self.results.error = outcome.as_ref().err().map(|error| format!("{error:#}"));
        if json {
            println!("{}", serde_json::to_string_pretty(&self.results)?);
        } else if self.results.ok {
            self.print_table();
        }
        Ok(())
    }

    fn print_table(&self) {
        println!("\n{:<44} {:>10}", "step", "seconds");
        for StepResult { step, seconds } in &self.results.steps {
            println!("{step:<44} {seconds:>10.3}");
        }
        let total: Duration = self.results.steps.iter().map(|s| Duration::from_secs_f64(s.seconds)).sum();
        println!("{:<44} {:>10.3}", "all", total.as_secs_f64());
    }
}

/// Whether guest code runs on the processor, in a word, and how that was found out.
pub(crate) fn in_words(execution: &Execution) -> (&'static str, String) {
    match execution {
        Execution::Hardware { measured } => ("hardware", measured.clone()),
        Execution::Emulated { measured } => ("emulated", measured.clone()),
        other => ("unknown", format!("{other:?}")),
    }
}

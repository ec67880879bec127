//! What the quick start says while it works and at its end, and what it leaves behind.

use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use instance_core::StateChange;

/// Times of the steps, told as they are taken.
pub(crate) struct Report {
    json: bool,
    steps: Vec<(String, Duration)>,
    watcher: Option<JoinHandle<()>>,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, steps: Vec::new(), watcher: None }
    }

    /// A line for whoever watches.
    pub(crate) fn say(&self, line: &str) {
        eprintln!("{line}");
    }

    /// Does a step, showing that it is under way and how long it took.
    pub(crate) fn step<T>(&mut self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let spinner = indicatif::ProgressBar::new_spinner().with_message(what.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(100));
        let begun = Instant::now();
        let done = work();
        let took = begun.elapsed();
        spinner.finish_and_clear();
        let end = if done.is_ok() { "done" } else { "failed" };
        self.say(&format!("{what}: {end} in {took:.2?}"));
        self.steps.push((what.to_owned(), took));
        done
    }

    /// Tells every change of state, with the time since the one before.
    pub(crate) fn watch(&mut self, changes: Receiver<StateChange>) {
        self.watcher = Some(std::thread::spawn(move || {
            let mut last = Instant::now();
            for change in changes {
                eprintln!("  {} is {} ({:.1?})", change.instance_id, change.state, last.elapsed());
                last = Instant::now();
            }
        }));
    }

    /// Ends the telling: `close` drops what sends the changes.
    pub(crate) fn stop_watching(&mut self, close: impl FnOnce()) {
        close();
        if let Some(watcher) = self.watcher.take() {
            // It has nothing to lose.
            let _ = watcher.join();
        }
    }

    /// The times of all steps, on standard output.
    pub(crate) fn print_table(&self) {
        if self.json {
            let steps: Vec<_> = self
                .steps
                .iter()
                .map(|(n, t)| serde_json::json!({"step": n, "seconds": t.as_secs_f64()}))
                .collect();
            println!("{}", serde_json::json!({"ok": true, "steps": steps}));
            return;
        }
        println!("\n{:<44} {:>10}", "step", "seconds");
        for (name, took) in &self.steps {
            println!("{name:<44} {:>10.3}", took.as_secs_f64());
        }
    }
}

/// What this process holds: threads, children, descriptors.
#[derive(Debug, PartialEq)]
pub(crate) struct Held {
    threads: usize,
    descriptors: usize,
    children: String,
}

impl Held {
    pub(crate) fn now() -> Result<Self> {
        let mut children = String::new();
        for task in std::fs::read_dir("/proc/self/task")? {
            children += &std::fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        }
        let count = |dir| std::fs::read_dir(dir).map(Iterator::count);
        Ok(Self { threads: count("/proc/self/task")?, descriptors: count("/proc/self/fd")?, children })
    }

    /// That no more is held than then, but for this step's own display.
    pub(crate) fn check(&self) -> Result<()> {
        let now = Self::now()?;
        let display = 1;
        ensure!(
            now.threads <= self.threads + display,
            "threads are left: {} before, {} now",
            self.threads,
            now.threads
        );
        ensure!(now.descriptors <= self.descriptors, "descriptors are left: {self:?} before, {now:?} now");
        ensure!(now.children == self.children, "child processes are left: {}", now.children);
        Ok(())
    }
}

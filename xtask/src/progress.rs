//! What a long step says while it runs: one line each on standard error, with a spinner where that is
//! a terminal.

use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use quick_start::Progress;

/// Runs `work` under the line `what`.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let line = Line::begin(what);
    let result = work();
    if result.is_ok() {
        line.end();
    }
    result
}

/// Runs `work`, which tells what it is at, under a line for each step of it.
pub(crate) fn told<T>(
    work: impl FnOnce(&mut dyn FnMut(Progress)) -> quick_start::Result<T>,
) -> anyhow::Result<T> {
    let mut line: Option<Line> = None;
    let mut tell = |progress: Progress| {
        if let Some(line) = line.take() {
            line.end();
        }
        line = (progress.done < progress.total).then(|| Line::begin(&progress.what));
    };
    Ok(work(&mut tell)?)
}

/// A step that is under way. Dropped without an end, it says nothing.
struct Line {
    what: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

impl Line {
    fn begin(what: &str) -> Self {
        let spinner = stderr().is_terminal().then(|| spinner(what));
        Self { what: what.to_owned(), started: Instant::now(), spinner }
    }

    fn end(self) {
        let (what, took) = (self.what.clone(), self.started.elapsed());
        drop(self);
        eprintln!("  {what} ({:.1} s)", took.as_secs_f64());
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

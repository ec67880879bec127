//! What a long step says while it runs: one line each on standard error, with a spinner where that is
//! a terminal.

use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Runs `work` under the line `what`.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    let spinner = stderr().is_terminal().then(|| spinner(what));
    let result = work();
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    if result.is_ok() {
        eprintln!("  {what} ({:.1} s)", started.elapsed().as_secs_f64());
    }
    result
}

fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

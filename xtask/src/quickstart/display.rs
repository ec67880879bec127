//! What the quick start shows while it works: on a terminal a line that says how far it is, and above
//! it, or alone where there is no terminal, what it has to tell. All of it on standard error.

use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The display. Clones are the same.
#[derive(Clone)]
pub(crate) struct Display {
    bar: ProgressBar,
}

impl Display {
    /// A display for so many steps. It shows nothing of them until [`animate`](Self::animate).
    pub(crate) fn new(steps: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:22} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        Self { bar }
    }

    /// Shows the progress, where this is a terminal. Costs a thread until the display is dropped.
    pub(crate) fn animate(&self) {
        self.bar.set_draw_target(ProgressDrawTarget::stderr());
        self.bar.enable_steady_tick(Duration::from_millis(100));
    }

    /// A line.
    pub(crate) fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// A step begins.
    pub(crate) fn begin(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// How far the step is.
    pub(crate) fn bytes(&self, what: &str, done: u64, total: u64) {
        self.bar.set_message(format!("{what}: {} of {}", HumanBytes(done), HumanBytes(total)));
    }

    /// The step is done.
    pub(crate) fn advance(&self) {
        self.bar.set_message("");
        self.bar.inc(1);
    }

    /// Shows no progress any more.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

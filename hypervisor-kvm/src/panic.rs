//! The port by which a guest's kernel says that it panics (QEMU, `docs/specs/pvpanic.rst`).

use std::ops::ControlFlow;

use instance_core::machine::ExitCause;

/// The guest has panicked and can do no more.
const PANICKED: u8 = 1 << 0;
/// It has panicked, and another kernel is about to save what is left.
const CRASH_LOADED: u8 = 1 << 1;

/// What the guest may say: it reads this.
pub(crate) const EVENTS: u8 = PANICKED | CRASH_LOADED;

/// The guest says something. A kernel that saves a crash ends the machine by itself.
pub(crate) fn write(event: u8) -> ControlFlow<ExitCause> {
    if event & PANICKED != 0 {
        return ControlFlow::Break(ExitCause::Panic);
    }
    if event & CRASH_LOADED != 0 {
        tracing::debug!("a guest has panicked and saves what is left");
    }
    ControlFlow::Continue(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_panic_without_a_kernel_for_it_is_the_end() {
        for event in 0..=u8::MAX {
            let expect = if event & 1 == 1 { Some(ExitCause::Panic) } else { None };
            assert_eq!(write(event).break_value(), expect, "{event:#x}");
        }
    }
}

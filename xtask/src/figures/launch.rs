//! The figures of launching.

use super::Area;
use super::bar::{Bar, Figure, Place};

pub(super) const AREA: Area = Area { name: "launch", figures: FIGURES, tools: &[], disk: None };

const FIGURES: &[Figure] = &[
    // From the call to the guest's first instruction, as a multiple of KVM's bare system calls.
    Figure { name: "first_instruction", unit: "x", bar: Bar::AtMost(3.0), place: Place::Host },
    // Guards against regressions: a tenth more than was measured when the figure was set, 1.612 s.
    Figure { name: "first_userspace_line", unit: "s", bar: Bar::AtMost(1.77), place: Place::CountedLab },
    // Constant in the size of the image.
    Figure { name: "launch_256g_over_1g", unit: "x", bar: Bar::AtMost(1.5), place: Place::Host },
];

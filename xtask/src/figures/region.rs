//! The figures of the region itself.

use super::Area;
use super::bar::{Bar, Figure, Place};

pub(super) const AREA: Area = Area { name: "region", figures: FIGURES, tools: &[], disk: None };

const FIGURES: &[Figure] = &[
    // From the call of `launch` until all is durable, as a multiple of one append that is made durable.
    Figure { name: "launch_over_append", unit: "x", bar: Bar::AtMost(2.0), place: Place::Host },
    // A page of 100 of 10,000 instances by a filter.
    Figure { name: "describe_10000", unit: "ms", bar: Bar::AtMost(1.0), place: Place::Host },
    // The same as a multiple of that of 100 instances.
    Figure { name: "describe_10000_over_100", unit: "x", bar: Bar::AtMost(3.0), place: Place::Host },
    // A launch from 16 threads takes a fifth of the time of one from one thread, with the same durability. The
    // time of the 16 is steady and that of the one is what an fsync has to wait for: where the disk is busy the
    // figure is small for that reason, so it says something of the region on a quiet host alone.
    Figure { name: "launch_16_threads_over_1", unit: "x", bar: Bar::AtMost(0.2), place: Place::Host },
];

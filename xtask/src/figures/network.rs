//! The figures of a network: its switch and its firewall. Those of a guest in it need a guest.

use super::Area;
use super::bar::{Bar, Figure, Place};

pub(super) const AREA: Area = Area { name: "network", figures: FIGURES, tools: &[], disk: None };

const FIGURES: &[Figure] = &[
    // Frames a second where the last of 100 rules allows them, as a share of those with a single rule: of a
    // conversation that goes on, and where every frame begins one.
    Figure { name: "firewall_100_rules_over_0", unit: "x", bar: Bar::AtLeast(0.8), place: Place::Host },
    Figure {
        name: "firewall_100_rules_over_0_beginning",
        unit: "x",
        bar: Bar::AtLeast(0.8),
        place: Place::Host,
    },
    // What an interface takes that remembers a million conversations.
    Figure { name: "tracked_1000000", unit: "MiB", bar: Bar::AtMost(256.0), place: Place::Host },
    // How many of them a million SYNs cost that the instance answers.
    Figure { name: "established_lost_to_flood", unit: "", bar: Bar::AtMost(0.0), place: Place::Host },
    // Bytes for the processor's time through the switch, without guests, as a multiple of loopback TCP's.
    Figure { name: "switch_over_loopback", unit: "x", bar: Bar::AtLeast(0.5), place: Place::Host },
];

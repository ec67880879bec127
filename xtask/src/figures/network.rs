//! The figures of a network: its switch, its firewall, and what its guests see of it.

use super::Area;
use super::bar::{Bar, Figure, Place};
use crate::prerequisites::PASST;

pub(super) const AREA: Area = Area { name: "network", figures: FIGURES, tools: &[PASST], disk: None };

const FIGURES: &[Figure] = &[
    // Frames a second where the last of 100 rules allows them, as a share of those with none, of a conversation that goes on;
    // and where every frame begins one, of those with the one rule without which none would pass.
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
    // TCP through the host's sockets, as a multiple of what passt brings the same guest: out of it and into it.
    Figure { name: "nat_out_over_passt", unit: "x", bar: Bar::AtLeast(1.0), place: Place::Host },
    Figure { name: "nat_in_over_passt", unit: "x", bar: Bar::AtLeast(1.0), place: Place::Host },
    // TCP from a Linux guest to another, as a multiple of loopback TCP's on the machine that both run on.
    Figure { name: "tcp_guests_over_loopback", unit: "x", bar: Bar::AtLeast(0.5), place: Place::CountedLab },
    // How much later a Linux guest is answered by the metadata service than by itself.
    Figure { name: "metadata_beyond_loopback", unit: "ms", bar: Bar::AtMost(1.0), place: Place::CountedLab },
];

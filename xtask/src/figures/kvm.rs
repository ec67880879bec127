//! The figures of machines on KVM.

use super::Area;
use super::bar::{Bar, Figure, Place};

pub(super) const AREA: Area = Area { name: "kvm", figures: FIGURES, tools: &[], disk: None };

const FIGURES: &[Figure] = &[
    // From making a machine to its guest's first instruction, as a multiple of KVM's bare system calls.
    Figure { name: "machine_first_instruction", unit: "x", bar: Bar::AtMost(1.5), place: Place::Host },
    // From restoring a machine of 128 MiB to its guest's next instruction, as a multiple of the same; and of 2 GiB.
    Figure { name: "restored_instruction", unit: "x", bar: Bar::AtMost(3.0), place: Place::Host },
    Figure { name: "restored_2g_over_128m", unit: "x", bar: Bar::AtMost(1.2), place: Place::Host },
    // What of that is KVM's own: the same of the bare system calls.
    Figure { name: "bare_2g_over_128m", unit: "x", bar: Bar::None, place: Place::Host },
    // A thousand machines live in one process, and the last is made nearly as fast as the first.
    Figure { name: "thousandth_machine_over_first", unit: "x", bar: Bar::AtMost(1.5), place: Place::Host },
    // What of that is KVM's own: the same of guests made by the bare system calls.
    Figure { name: "thousandth_bare_over_first", unit: "x", bar: Bar::None, place: Place::Host },
    // Of a machine at rest, without its guest's memory and what the host's kernel keeps.
    Figure { name: "machine_beyond_guest", unit: "KiB", bar: Bar::AtMost(1024.0), place: Place::Host },
    // Of a guest's processor, with 32 block requests under way; what the host's kernel sees to is among them.
    Figure { name: "machine_exits_per_request", unit: "", bar: Bar::AtMost(0.1), place: Place::Host },
    // Random requests of 4 KiB to a raw file, 32 under way, as a share of what io_uring does on the host.
    Figure { name: "machine_random_reads_over_host", unit: "x", bar: Bar::AtLeast(0.8), place: Place::Host },
    Figure { name: "machine_random_writes_over_host", unit: "x", bar: Bar::AtLeast(0.8), place: Place::Host },
    // A stock kernel and a busybox that reboots: from the start of the program to its end.
    Figure { name: "machine_boot_to_exit", unit: "s", bar: Bar::AtMost(1.45), place: Place::CountedLab },
];

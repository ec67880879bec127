//! How fast a machine's time stamp counters run: its guest has measured it, and is told that it never changes.

use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::error::{Result, saved};

/// What KVM takes for no difference, in millionths: its clocks agree on no more (`tsc_tolerance_ppm`).
const TOLERANCE: u64 = 250;

/// In kHz; none where the host's counters have no speed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Speed(pub(crate) Option<u32>);

impl Speed {
    /// That of a processor.
    pub(crate) fn of(vcpu: &VcpuFd) -> Self {
        Self(vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0))
    }

    /// Has a new processor's counter run like the saved one's. Fails where the host's runs otherwise and KVM cannot scale it.
    pub(crate) fn restore(self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<()> {
        match self.scaled_on(Self::of(vcpu), || kvm.check_extension(Cap::TscControl))? {
            Some(khz) => vcpu.set_tsc_khz(khz).map_err(|e| {
                saved(format!("KVM does not have time stamp counters run at {khz} kHz")).with_source(e)
            }),
            None => Ok(()),
        }
    }

    /// To what the counters of a host are to be scaled, if they have to be.
    fn scaled_on(self, host: Self, can_scale: impl FnOnce() -> bool) -> Result<Option<u32>> {
        let (Some(had), true) = (self.0, self != host) else { return Ok(None) };
        if can_scale() {
            return Ok(Some(had));
        }
        let here = match host.0 {
            Some(here) if u64::from(had.abs_diff(here)) * 1_000_000 <= TOLERANCE * u64::from(here) => {
                return Ok(None);
            }
            Some(here) => format!("here at {here} kHz"),
            None => "here at no one speed".to_owned(),
        };
        Err(saved(format!(
            "the saved machine's time stamp counter ran at {had} kHz, {here}, and this host's KVM cannot scale it"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_runs_otherwise_is_scaled_or_refused() {
        for (had, here, can_scale, expect) in [
            (Some(2_500_000), Some(2_500_000), false, Some(None)),
            (Some(2_500_000), Some(3_000_000), true, Some(Some(2_500_000))),
            (Some(2_500_000), Some(3_000_000), false, None),
            (Some(2_500_000), None, true, Some(Some(2_500_000))),
            (Some(2_500_000), None, false, None),
            // 250 millionths more or less.
            (Some(2_000_500), Some(2_000_000), false, Some(None)),
            (Some(1_999_500), Some(2_000_000), false, Some(None)),
            (Some(2_000_501), Some(2_000_000), false, None),
            (Some(1_999_499), Some(2_000_000), false, None),
            (Some(u32::MAX), Some(1), false, None),
            // Machines of earlier versions do not tell.
            (None, Some(3_000_000), false, Some(None)),
        ] {
            let done = Speed(had).scaled_on(Speed(here), || can_scale);
            assert_eq!(done.ok(), expect, "{had:?} on {here:?}, {can_scale}");
        }
    }
}
